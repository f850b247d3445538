# SPDX-License-Identifier: LGPL-2.1-or-later
"""Figures of polytmp beside those of no polytmp and of pam_namespace: one run, one machine, ratios."""
