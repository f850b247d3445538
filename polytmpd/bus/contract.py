# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names that the daemon serves and polytmpctl calls. Others script against them: they never change."""

from enum import StrEnum
from typing import Final

SERVICE: Final = "org.polytmp1"
PATH: Final = "/org/polytmp1"
MANAGER: Final = "org.polytmp1.Manager"
INSTANCE: Final = "org.polytmp1.Instance"
REMOVE_PERSISTENT: Final = 1
"""Flag of RemoveInstanceWithFlags: also delete what is kept between logins (/var/tmp)."""


class ManagerMethod(StrEnum):
    """Methods of org.polytmp1.Manager."""

    ACQUIRE_NAMESPACE = "AcquireNamespace"
    GET_INSTANCE = "GetInstance"
    GET_INSTANCE_BY_PID = "GetInstanceByPID"
    LIST_INSTANCES = "ListInstances"
    LIST_INSTANCES_EX = "ListInstancesEx"
    RESOLVE_PATH = "ResolvePath"
    REMOVE_INSTANCE = "RemoveInstance"
    REMOVE_INSTANCE_WITH_FLAGS = "RemoveInstanceWithFlags"
    GET_USER_USAGE = "GetUserUsage"
    GET_REMOVAL_PROGRESS = "GetRemovalProgress"
    RELOAD = "Reload"


class ManagerProperty(StrEnum):
    """Properties of org.polytmp1.Manager."""

    VERSION = "Version"
    DIRECTORIES = "Directories"


class ManagerSignal(StrEnum):
    """Signals of org.polytmp1.Manager."""

    INSTANCE_NEW = "InstanceNew"
    INSTANCE_REMOVED = "InstanceRemoved"


class InstanceMethod(StrEnum):
    """Methods of org.polytmp1.Instance."""

    LIST_PROCESSES = "ListProcesses"
    LIST_HOLDERS = "ListHolders"
    GET_USAGE = "GetUsage"


class InstanceProperty(StrEnum):
    """Properties of org.polytmp1.Instance."""

    UID = "UID"
    USER = "User"
    STATE = "State"
    CREATED_USEC = "CreatedUSec"
    CREATED_USEC_MONOTONIC = "CreatedUSecMonotonic"
    CONTROL_GROUP = "ControlGroup"
    NAMESPACE_ID = "NamespaceID"
    DIRECTORIES = "Directories"
    SHARED_PATHS = "SharedPaths"
