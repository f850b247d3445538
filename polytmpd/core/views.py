# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is shown of the instances: one View for each, and listeners that hear of changes.

Not here: how a view is put together (daemon), and how it is published (bus/service).
"""

from collections.abc import Iterator
from typing import Protocol

from polytmpd.core.model import View


class Listener(Protocol):
    """Hears of every change after it is made."""

    def instance_new(self, view: View) -> None: ...
    def instance_changed(self, before: View, view: View) -> None: ...
    def instance_removed(self, uid: int) -> None: ...
    def directories_changed(self) -> None: ...


class Views:
    """The views of all instances, by UID, and the directories that new instances make private."""

    def __init__(self, directories: tuple[str, ...] = ()) -> None:
        self._directories = directories
        self._views: dict[int, View] = {}
        self._listeners: list[Listener] = []

    def __iter__(self) -> Iterator[View]:
        """In the order of the UIDs."""
        return iter([self._views[uid] for uid in sorted(self._views)])

    def __contains__(self, uid: int) -> bool:
        return uid in self._views

    def get(self, uid: int) -> View | None:
        return self._views.get(uid)

    @property
    def directories(self) -> tuple[str, ...]:
        return self._directories

    def follow(self, listener: Listener) -> None:
        """Tell the listener of every change from now on."""
        self._listeners.append(listener)

    def show(self, view: View) -> None:
        """Show an instance as it is now."""
        before = self._views.get(view.uid)
        if view == before:
            return
        self._views[view.uid] = view
        for listener in self._listeners:
            if before is None:
                listener.instance_new(view)
            else:
                listener.instance_changed(before, view)

    def hide(self, uid: int) -> None:
        """Stop showing the user's instance, if it was shown."""
        if self._views.pop(uid, None) is not None:
            for listener in self._listeners:
                listener.instance_removed(uid)

    def show_directories(self, directories: tuple[str, ...]) -> None:
        if directories != self._directories:
            self._directories = directories
            for listener in self._listeners:
                listener.directories_changed()
