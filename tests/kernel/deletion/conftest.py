# SPDX-License-Identifier: LGPL-2.1-or-later
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.deletion.trees import snapshot


@pytest.fixture
def sentinel(base: Path) -> Iterator[Path]:
    """A tree beside the instance, which must not change."""
    root = base / "sentinel"
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "file").write_text("precious")
    (root / "sub" / "file").write_text("precious too")
    before = snapshot(root)
    yield root
    assert snapshot(root) == before
