# SPDX-License-Identifier: LGPL-2.1-or-later
from tests.unit.settled import no_descriptor_leaks, no_task_leaks

__all__ = ["no_descriptor_leaks", "no_task_leaks"]
