# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel layer: it raises nothing but OSError and does not know what an instance is."""
