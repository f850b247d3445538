# SPDX-License-Identifier: LGPL-2.1-or-later
"""The soak: people who log in, work, leave things behind and are killed, on a system that is restarted under
them; and somebody who looks on all the time.

people, trouble      what happens (only the machine's own tools: ssh, sudo, systemctl, kill)
proc, checker        what is seen, and what must be; nothing of polytmpd is imported
record               what was done when, how often, and what was wrong
sabotage             faults to put into the daemon, to see that the checker notices
"""
