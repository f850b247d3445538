# SPDX-License-Identifier: LGPL-2.1-or-later
"""X displays' locks, shown to all whom they concern."""
