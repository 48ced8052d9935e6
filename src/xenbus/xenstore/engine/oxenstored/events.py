"""Who hears of a change, and in which order, as oxenstored has it. Pure.

From the root down, the newest watch of a path first, and one event for each change, equal ones too. Knows
views and watches; the engine queues what is found here.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import Connection
from xenbus.xenstore.engine.oxenstored.views import Change, View
from xenbus.xenstore.engine.tree import READ, Perms, parent_of
from xenbus.xenstore.engine.watches import Watch, WatchIndex
from xenbus.xenstore.wire import HEADER, PAYLOAD_MAX, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine

Look = Callable[[bytes], Perms | None]


class WatchTrie(WatchIndex):
    """Finds those on the way to a path, and those below it."""

    __slots__ = ("_below",)

    def __init__(self) -> None:
        super().__init__()
        # A path with watches on it or below -> those right below it of the same kind.
        self._below: dict[bytes, set[bytes]] = {}

    def add(self, conn: Connection, path: bytes, token: bytes, depth: int, prefix: int) -> Watch:
        child = path
        while child[:1] == b"/" and child != b"/":
            above = parent_of(child)
            names = self._below.setdefault(above, set())
            if child in names:
                break
            names.add(child)
            child = above
        return super().add(conn, path, token, depth, prefix)

    def remove(self, watch: Watch) -> None:
        super().remove(watch)
        path = watch.path
        while path[:1] == b"/" and path != b"/" and path not in self.by_path and path not in self._below:
            above = parent_of(path)
            names = self._below[above]
            names.discard(path)
            if not names:
                del self._below[above]
            path = above

    def on_the_way(self, path: bytes) -> list[Watch]:
        found: list[Watch] = []
        end = 1 if path == b"/" else len(path)
        paths = []
        while end > 0:
            paths.append(path[:end])
            end = path.rfind(b"/", 0, end)
        if path != b"/":
            paths.append(b"/")
        for here in reversed(paths):
            found += reversed(self.by_path.get(here, {}))
        return found

    def below(self, path: bytes) -> list[Watch]:
        found: list[Watch] = []
        stack = sorted(self._below.get(path, ()), reverse=True)
        while stack:
            here = stack.pop()
            found += reversed(self.by_path.get(here, {}))
            stack += sorted(self._below.get(here, ()), reverse=True)
        return found


def allows(ids: Container[int], perms: Perms, want: int) -> bool:
    """Whether somebody who is any of `ids` may READ or WRITE; domain 0 may, whatever the entries are."""
    first = perms[0]
    if 0 in ids or first[1] in ids:
        return True
    return any(_entry(perms, domid) & want for domid in ids)  # type: ignore[attr-defined]


def _entry(perms: Perms, domid: int) -> int:
    for access, one in perms[1:]:
        if one == domid:
            return access
    return perms[0][0]


def _may_hear(conn: Connection, path: bytes, looks: tuple[Look, ...]) -> bool:
    """Who may read the node, or the one above it. The root has none above: nobody hears of it."""
    if path == b"/":
        return False
    above = parent_of(path)
    for look in looks:
        parent = look(above)
        if parent is None:
            continue
        if allows(conn.ids, parent, READ):
            return True
        perms = look(path)
        if perms is not None and allows(conn.ids, perms, READ):
            return True
    return False


def tell(engine: Engine, conn: Connection, path: bytes, token: bytes) -> None:
    """Queue an event. One too long goes out on a socket all the same; on a ring an error takes its place."""
    payload = path + b"\0" + token + b"\0"
    op = Op.WATCH_EVENT
    if len(payload) > PAYLOAD_MAX and conn.guest:
        op, payload = Op.ERROR, b"E2BIG\0"
    engine.queue_event(conn, HEADER.pack(op, 0, 0, len(payload)) + payload)


def _tell(engine: Engine, watch: Watch, path: bytes) -> None:
    tell(engine, watch.conn, path[watch.prefix :], watch.token)


def fire(engine: Engine, view: View) -> None:
    """Tell of what was changed in `view`, in that order."""
    index: WatchTrie = engine.watches  # type: ignore[assignment]
    if not index.by_path:
        return

    def new(path: bytes) -> Perms | None:
        node = view.get(path)
        return None if node is None else node.perms

    for change, path in view.changes:
        looks: tuple[Look, ...] = (new,)
        if change is Change.RM:
            looks = (view.old_perms,)
        elif change is Change.SET_PERMS:
            looks = (view.old_perms, new)
        for watch in index.on_the_way(path):
            if _may_hear(watch.conn, path, looks):
                _tell(engine, watch, path)
        if change is Change.RM:
            for watch in index.below(path):
                if _may_hear(watch.conn, watch.path, looks):
                    _tell(engine, watch, watch.path)


def fire_special(engine: Engine, name: bytes) -> None:
    """@introduceDomain or @releaseDomain: nodes below the root, whose entries say who hears."""
    node = engine.nodes.get(b"/" + name)
    looks = {b"/": engine.nodes[b"/"].perms, b"/" + name: None if node is None else node.perms}
    for watch in reversed(engine.watches.by_path.get(name, {})):
        if _may_hear(watch.conn, b"/" + name, (looks.get,)):
            _tell(engine, watch, name)
