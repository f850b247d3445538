# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who pays for a long search: whose namespaces and processes they are, and how long each user may keep us.

Not here: what is searched (kernel/namespaces), and what follows if it is not searched to the end.

Hard facts
- A mount namespace that a user makes without privileges belongs to a user namespace of theirs. Only its
  owner, and what is privileged over it, can join it (setns(2)): another user's process is in it only if
  root puts it there.
- A user namespace made in that one may belong to a subordinate UID. The outermost one below our own belongs
  to the user.
- /proc/PID belongs to root if the process is not dumpable (prctl(2)), and a process may have any of the
  user's subordinate UIDs. Its user namespace and its real UID say whose it is.
"""

import contextlib
import errno
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Final

from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.syscalls import get_owner_uid, get_parent, get_userns

ROOT: Final = 0
SECONDS: Final = 5.0
"""How long everything of one user is searched at most, if nobody looks for what is theirs."""
UNATTRIBUTED: Final = 1.0
"""How long is searched before it is asked whose that is: mostly all of it takes less."""
_OUR_LACK: Final = (errno.EMFILE, errno.ENFILE)

Cancelled = Callable[[], bool]


class Patience:
    """How long one search may take because of each user."""

    def __init__(self, cancelled: Cancelled, searched_for: Collection[int] = ()) -> None:
        """searched_for: the users for whom the search is made. There is no limit for theirs and root's."""
        self.cancelled = cancelled
        self.unread: dict[int, OSError] = {}
        """Users of whose namespaces or processes something was not read, and why."""
        self._unlimited = {ROOT, *searched_for}
        self._spent: defaultdict[int | None, float] = defaultdict(float)
        self._unattributed = 0.0

    @contextlib.contextmanager
    def on_account_of(
        self, whose: Callable[[], int], others: Callable[[], Collection[int]] = lambda: ()
    ) -> Iterator[Cancelled]:
        """Search what is a user's; the result says whether to give up.

        If it raises OSError, that is noted, and the search goes on with what follows. whose(): the user; not
        asked before the search has taken UNATTRIBUTED seconds. It may raise ProcessLookupError or
        FileNotFoundError: then nothing is left to search. others(): users who may be concerned, too. Raises
        OSError if the search is cancelled, if root is concerned, and if we lack descriptors.
        """
        begun = time.monotonic()
        asked: list[int | None] = []

        def uid() -> int | None:
            if not asked:
                try:
                    asked.append(whose())
                except (FileNotFoundError, ProcessLookupError):
                    asked.append(None)
            return asked[0]

        def is_over() -> bool:
            spent = time.monotonic() - begun
            if self.cancelled() or self._unattributed + spent <= UNATTRIBUTED:
                return self.cancelled()
            return uid() not in self._unlimited and self._spent[uid()] + spent > SECONDS

        try:
            yield is_over
        except OSError as error:
            if self.cancelled() or error.errno in _OUR_LACK:
                raise
            self._note(error, uid(), others)
        finally:
            spent = time.monotonic() - begun
            if not asked and self._unattributed + spent <= UNATTRIBUTED:
                self._unattributed += spent
            else:
                self._spent[uid()] += spent

    def _note(self, error: OSError, uid: int | None, others: Callable[[], Collection[int]]) -> None:
        """Note what was not read, or raise the error if it may concern anyone."""
        if uid is None:
            return
        concerned = {uid, *others()}
        if ROOT in concerned:
            raise error
        if error.errno == errno.ECANCELED:
            text = f"UID {uid} has more mounts or descriptors than can be searched in {SECONDS:.0f} s"
            error = OSError(errno.ETIMEDOUT, text)
        for each in concerned:
            self.unread.setdefault(each, error)


def owner(namespace: int) -> int:
    """The UID of the user whose namespace this is; 0 if it belongs to our own user namespace.

    Raises OSError.
    """
    with get_userns(namespace) as userns:
        return _outermost(userns)


def user_of(process: str) -> int:
    """The UID of the user whose process this is. process: its directory in /proc. Raises OSError."""
    with Descriptor.open(f"/proc/{process}/ns/user", os.O_RDONLY) as userns:
        if not _is_ours(userns):
            return _outermost(userns)
    with open(f"/proc/{process}/status", errors="replace") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Uid:"))


def _outermost(userns: int) -> int:
    with contextlib.ExitStack() as levels:
        found = ROOT
        while not _is_ours(userns):
            found = get_owner_uid(userns)
            try:
                userns = levels.enter_context(get_parent(userns))
            except PermissionError:  # not below ours
                return ROOT
        return found


def _is_ours(userns: int) -> bool:
    return os.path.samestat(os.fstat(userns), os.stat("/proc/self/ns/user"))
