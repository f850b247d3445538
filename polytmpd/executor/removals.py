# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running deletions: how far each is, and what it could not delete, for the next one to try again.

Not here: deleting (blocking/), and when to delete (daemon).
"""

import logging
from collections.abc import Sequence
from typing import Final

from polytmpd.blocking import removal
from polytmpd.blocking.removal import Place
from polytmpd.executor.workers import Workers
from polytmpd.kernel.host import in_words

log = logging.getLogger(__name__)

_AT_ONCE: Final = 4


class Removals:
    """Owns the threads that delete."""

    def __init__(self) -> None:
        self._deleters = Workers(_AT_ONCE, "deletion")
        self._undeleted: dict[int, list[Place]] = {}
        self._progress: dict[int, int] = {}

    def close(self) -> None:
        """Stop the deletions where they are. The next start of the daemon continues them."""
        self._deleters.close()

    def entries(self, uid: int) -> int:
        """How many entries the user's running deletion has deleted so far."""
        return self._progress.get(uid, 0)

    async def delete(self, uid: int, aside: Sequence[Place]) -> bool:
        """Delete these, and what former attempts for the user left. Returns whether there was anything.

        Raises OSError that names what is in the way. The next call tries again.
        """
        left = [*self._undeleted.pop(uid, ()), *aside]

        def report(entries: int) -> None:
            self._progress[uid] = entries

        try:
            await self._deleters.run(removal.delete, left, report)
        except BaseException:
            self._undeleted[uid] = [*left, *self._undeleted.get(uid, ())]
            raise
        finally:
            self._progress.pop(uid, None)
        return bool(left)

    async def delete_leftovers(self, leftovers: Sequence[Place], searchers: Workers) -> None:
        """Delete the leftovers that no process has mounted. Logs what cannot be deleted."""
        if not leftovers:
            return
        try:
            unused = await searchers.run(removal.unused, leftovers)
        except OSError as error:
            log.error("Failed to examine what former instances left, keeping it: %s", in_words(error))
            return
        for place in unused:
            await self._deleters.run(removal.delete_leftover, place)
