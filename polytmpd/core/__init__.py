# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pure core: what is to be done, never how. No os, no asyncio, no clock."""
