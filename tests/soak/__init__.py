# SPDX-License-Identifier: LGPL-2.1-or-later
"""The soak: users log in, work, leave things behind and are killed while services are restarted, and a
checker watches all the time.

people, trouble             what happens, with the machine's own tools only (ssh, sudo, systemctl, kill)
proc, daemon                what is seen, from outside; nothing of polytmpd is imported
checker, leftovers          what must hold while an instance lives, and when it has ended
record                      what was done when, how often, and what was wrong
sabotage                    faults to put into the daemon, to see that the checker notices them
"""
