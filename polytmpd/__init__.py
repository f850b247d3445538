# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private /tmp and /var/tmp for each user of a host with systemd-logind."""

__version__ = "0.1.0"
