# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pure core: what to do, never how. No os, no asyncio, no clock."""
