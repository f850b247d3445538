# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares polytmp with pam_namespace and with plain logins: one run, one machine, ratios."""
