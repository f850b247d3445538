# SPDX-License-Identifier: LGPL-2.1-or-later
"""The texts of errors, as people read them."""

import errno
import os

import pytest

from polytmpd.kernel.host import in_words

pytestmark = pytest.mark.unit


def _error(number: int, *names: str, text: str = "") -> OSError:
    return OSError(number, text or os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (_error(errno.ENOENT, "/proc/1/root/tmp/x"), "No such file or directory: /tmp/x"),
        (
            _error(errno.EMFILE, "/tmp/x"),
            "Too many open files (raise LimitNOFILE= of polytmpd.service): /tmp/x",
        ),
        (_error(errno.ENFILE), "Too many open files in system (raise fs.file-max, see sysctl(8))"),
        (_error(errno.EMFILE, text="too many, or another limit"), "too many, or another limit"),
        (
            RuntimeError("can't start new thread"),
            "can't start new thread (raise TasksMax= of polytmpd.service)",
        ),
        (ValueError("no"), "no"),
    ],
)
def test_in_words(error: BaseException, text: str) -> None:
    assert in_words(error) == text
