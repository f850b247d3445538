# SPDX-License-Identifier: LGPL-2.1-or-later
"""The views of instances, and which listener hears of which change."""

from dataclasses import replace

import pytest

from polytmpd.core.model import State, View
from polytmpd.core.views import Views

pytestmark = pytest.mark.unit

ALICE = View(1000, "alice", State.PREPARING)
BOB = View(1001, "bob", State.ACTIVE)


class Listener:
    """Records each change, and what the views show by then."""

    def __init__(self, views: Views) -> None:
        self._views = views
        self.heard: list[tuple[object, ...]] = []
        views.follow(self)

    def instance_new(self, view: View) -> None:
        assert self._views.get(view.uid) == view
        self.heard.append(("new", view))

    def instance_changed(self, before: View, view: View) -> None:
        assert self._views.get(view.uid) == view
        self.heard.append(("changed", before, view))

    def instance_removed(self, uid: int) -> None:
        assert uid not in self._views
        self.heard.append(("removed", uid))

    def directories_changed(self) -> None:
        self.heard.append(("directories", self._views.directories))


def test_there_is_nothing_at_first() -> None:
    views = Views()
    assert list(views) == []
    assert 1000 not in views
    assert views.get(1000) is None
    assert views.directories == ()


def test_views_are_in_the_order_of_their_uids() -> None:
    views = Views()
    views.show(BOB)
    views.show(ALICE)
    assert list(views) == [ALICE, BOB]
    assert 1000 in views
    assert views.get(1001) == BOB


def test_a_view_can_be_hidden_during_iteration() -> None:
    views = Views()
    views.show(ALICE)
    views.show(BOB)
    for view in views:
        views.hide(view.uid)
    assert list(views) == []


def test_each_change_is_heard_once_after_it_was_made() -> None:
    views = Views()
    listener = Listener(views)
    active = replace(ALICE, state=State.ACTIVE)
    views.show(ALICE)
    views.show(ALICE)
    views.show(active)
    views.show(replace(active))
    views.hide(1000)
    views.hide(1000)
    views.show(ALICE)
    assert listener.heard == [
        ("new", ALICE),
        ("changed", ALICE, active),
        ("removed", 1000),
        ("new", ALICE),
    ]


def test_all_listeners_hear_what_changes_after_they_follow() -> None:
    views = Views()
    views.show(ALICE)
    early = Listener(views)
    views.show(BOB)
    late = Listener(views)
    views.hide(1000)
    assert early.heard == [("new", BOB), ("removed", 1000)]
    assert late.heard == [("removed", 1000)]


def test_directories() -> None:
    views = Views(("/tmp",))
    listener = Listener(views)
    assert views.directories == ("/tmp",)
    views.show_directories(("/tmp",))
    assert listener.heard == []
    views.show_directories(("/tmp", "/var/tmp"))
    assert listener.heard == [("directories", ("/tmp", "/var/tmp"))]
