# SPDX-License-Identifier: LGPL-2.1-or-later
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from polytmpd.blocking import deletion
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


@pytest.fixture(autouse=True, params=[True, False], ids=["swept", "unswept"])
def swept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the first pass of a deletion takes place. Without it, the second one has everything to do."""

    def nothing(_barrier: int) -> Generator[int]:
        yield 0

    if not request.param:
        monkeypatch.setattr(deletion, "sweep", nothing)
    return bool(request.param)
