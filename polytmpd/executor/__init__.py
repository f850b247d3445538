# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes and removes instances, holds their namespaces, and notices their end. Decides nothing."""
