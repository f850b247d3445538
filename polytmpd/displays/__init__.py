# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows each X display's lock, /tmp/.X<n>-lock, in the /tmp of the host and of every instance, so that no
second X server takes a display number that is in use.

    displaylocks   the event loop       the daemon's side: when to update, which instances there are
    worker         both                 hands work to the one thread that owns the registry
    registry       the worker's thread  which displays are shown, and where
    socketdir      the worker's thread  the host's /tmp/.X11-unix: which displays may have changed
    places         any thread           the /tmp of the host or of an instance
    lockfiles      any thread           locks, copies and sockets in one directory
    complaints     any thread           warnings that are logged once

Only displaylocks and worker import asyncio; a test keeps it so. A failure is logged: no login ever fails
because of a display.
Not here: the bind mounts of the socket directory (kernel/mountns, executor).
"""
