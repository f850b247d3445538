# SPDX-License-Identifier: LGPL-2.1-or-later
"""The work that blocks: making, adopting, sharing, deleting, finding and recording instances.

Every function may wait for a disk, a user database or /proc, so the event loop calls it in a thread. Nothing
here knows the event loop; a test enforces that.
"""
