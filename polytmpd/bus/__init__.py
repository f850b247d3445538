# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything that speaks D-Bus: the clients of logind and systemd, and the service org.polytmp1."""
