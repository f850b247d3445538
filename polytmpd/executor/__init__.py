# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has instances made and removed, holds their namespaces, and notices their end. Decides nothing."""
