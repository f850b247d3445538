# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel layer: nothing but OSError leaves it, and nothing in it knows what an instance is."""
