# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file descriptor that knows whether it is open, so that it is closed once.

Not here: what the descriptor is for.
"""

import os
from types import TracebackType
from typing import Self


class Descriptor(int):
    """An open file descriptor; the code that holds this object owns it.

    It is an int, so every function of `os` and every system call takes it. Use it as a context manager, or
    call close(). Garbage collection does not close it: a leaked descriptor is a defect that tests find.
    """

    closed = False

    @classmethod
    def open(
        cls,
        path: str | bytes | os.PathLike[str],
        flags: int,
        *,
        dir_fd: int | None = None,
        mode: int = 0o777,
    ) -> Self:
        """open(2), or openat(2) with dir_fd. O_CLOEXEC is added. Raises OSError."""
        return cls(os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd))

    def dup(self) -> "Descriptor":
        """Duplicate it; the caller closes the duplicate. Raises OSError (EMFILE)."""
        return Descriptor(os.dup(self))

    def close(self) -> None:
        """Close it, unless it is closed already."""
        if not self.closed:
            self.closed = True
            os.close(self)

    def detach(self) -> int:
        """Give up ownership: the caller, or the function that it passes the number to, closes it."""
        self.closed = True
        return int(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
