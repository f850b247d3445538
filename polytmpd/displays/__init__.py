# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows the lock of each X display, /tmp/.X<n>-lock, in the /tmp of the host and of every instance that
shares the host's X11 sockets. So no second X server takes a display number that is in use.

    module         runs in              knows
    displaylocks   the event loop       which instances come and go, and when to update
    worker         both                 how to hand work to the one thread that owns the registry
    registry       the worker's thread  which displays are shown, and where
    socketdir      the worker's thread  which displays may have changed
    places         any thread           the /tmp of the host or of an instance
    lockfiles      any thread           the locks, copies and sockets in one directory
    complaints     any thread           what has been logged already

Only displaylocks and worker import asyncio; a test keeps it so. Failures are logged: a login never fails
because of a display.
Not here: the bind mounts of the socket directory (kernel/mountns, executor).
"""
