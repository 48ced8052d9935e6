"""Versions of the tree: what it was when a transaction started, kept as what has changed since. Pure.

Knows paths and nodes. An epoch holds the nodes that were replaced while it was the newest one; a view of
an older epoch looks through the newer ones. Without an open transaction there is none, and nothing is kept.
"""

from __future__ import annotations

from xenbus.xenstore.engine.tree import Node, parent_of


class Epoch:
    """before:  path -> the node that was there at its start, None if there was none
    touched: nodes that are not the very same any more, with all their ancestors
    everything: the whole tree was made anew
    users:   views that start here"""

    __slots__ = ("before", "everything", "next", "prev", "touched", "users")

    def __init__(self, prev: Epoch | None) -> None:
        self.before: dict[bytes, Node | None] = {}
        self.touched: set[bytes] = set()
        self.everything = False
        self.users = 0
        self.prev = prev
        self.next: Epoch | None = None

    @property
    def unchanged(self) -> bool:
        return not (self.touched or self.everything)


class History:
    """The epochs that somebody looks at; `newest` is None if nobody does."""

    __slots__ = ("newest",)

    def __init__(self) -> None:
        self.newest: Epoch | None = None

    def begin(self) -> Epoch:
        """A view of the tree as it is now; give it back with `release`."""
        newest = self.newest
        if newest is None or not newest.unchanged:
            self.newest = Epoch(newest)
            if newest is not None:
                newest.next = self.newest
            newest = self.newest
        newest.users += 1
        return newest

    def hold(self, epoch: Epoch) -> Epoch:
        """Another view of the same tree."""
        epoch.users += 1
        return epoch

    def release(self, epoch: Epoch) -> None:
        epoch.users -= 1
        if epoch.users:
            return
        before, after = epoch.prev, epoch.next
        if before is not None:
            # Who looks at the one before sees through to what this one kept.
            kept = before.before
            for path, node in epoch.before.items():
                kept.setdefault(path, node)
            before.touched |= epoch.touched
            before.everything = before.everything or epoch.everything
            before.next = after
        if after is not None:
            after.prev = before
        else:
            self.newest = before

    # ---- looking ----

    def node_at(self, epoch: Epoch | None, path: bytes, nodes: dict[bytes, Node]) -> Node | None:
        """The node as it was when `epoch` began."""
        while epoch is not None:
            if path in epoch.before:
                return epoch.before[path]
            epoch = epoch.next
        return nodes.get(path)

    def changed_since(self, epoch: Epoch | None, path: bytes) -> bool:
        """Whether the node, or anything below it, was replaced."""
        while epoch is not None:
            if epoch.everything or path in epoch.touched:
                return True
            epoch = epoch.next
        return False

    def anything_since(self, epoch: Epoch | None) -> bool:
        while epoch is not None:
            if not epoch.unchanged:
                return True
            epoch = epoch.next
        return False

    # ---- changing ----

    def keep(self, path: bytes, node: Node | None) -> bool:
        """`node` is about to be changed or replaced. True if somebody goes on looking at it."""
        newest = self.newest
        if newest is None or path in newest.before:
            return False
        newest.before[path] = node
        return True

    def touch(self, path: bytes) -> None:
        if self.newest is not None:
            touch(self.newest.touched, path)


def touch(touched: set[bytes], path: bytes) -> None:
    """The node and its ancestors. (One that is in there has its ancestors in there.)"""
    while path not in touched:
        touched.add(path)
        if path == b"/":
            return
        path = parent_of(path)
