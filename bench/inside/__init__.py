# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that run in the machines, with their Python and its standard library alone."""
