# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl, the administrator's tool. It talks to the daemon over D-Bus and reads the configuration: it
imports only bus/, config and core/.
"""
