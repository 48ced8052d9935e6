"""A node of the store, and what its permission list allows. Pure.

The tree itself is one dict, absolute path (bytes) -> Node: a read is one look-up. Knows neither
connections nor transactions.
"""

from __future__ import annotations

from collections.abc import Container

from xenbus.xenstore.wire import Access

READ = int(Access.READ)
WRITE = int(Access.WRITE)
OWNER = 4
# An entry for a domain that did not exist when it was set (xenstored's XS_PERM_IGNORE): shown, never used.
IGNORED = 0x80
# How an entry begins.
LETTERS = {b"n": 0, b"r": READ, b"w": WRITE, b"b": READ | WRITE}

# (access bits, domid), owner first. Tuples are shared: a child has its parent's object.
Perms = tuple[tuple[int, int], ...]

# What xenstored 4.17 counts for a node (struct xs_tdb_record_hdr, struct xs_permissions).
HEADER_COST = 24
PERM_COST = 8

NO_GENERATION = -1


class Node:
    """One node. `snaps` counts the transactions that look at this very object: while there are any, it
    is replaced and not changed (see Engine.modify)."""

    __slots__ = ("childlen", "children", "generation", "perms", "snaps", "value")

    def __init__(self, value: bytes, perms: Perms, generation: int) -> None:
        self.value = value
        self.perms = perms
        self.generation = generation
        self.children: dict[bytes, None] | None = None
        self.childlen = 0
        self.snaps = 0

    def clone(self) -> Node:
        twin = Node(self.value, self.perms, self.generation)
        if self.children:
            twin.children = self.children.copy()
            twin.childlen = self.childlen
        return twin

    def add_child(self, name: bytes) -> None:
        if self.children is None:
            self.children = {}
        self.children[name] = None
        self.childlen += len(name) + 1

    def drop_child(self, name: bytes) -> None:
        children = self.children
        if children is not None and name in children:
            del children[name]
            self.childlen -= len(name) + 1
            if not children:
                self.children = None

    @property
    def size(self) -> int:
        """Bytes that count against the node-size quota: header, permissions, value and child names."""
        return HEADER_COST + PERM_COST * len(self.perms) + len(self.value) + self.childlen

    @property
    def owner(self) -> int:
        return self.perms[0][1]


def access_of(perms: Perms, ids: Container[int]) -> int:
    """What somebody who is any of `ids` may do: READ, WRITE, OWNER bits (perm_for_conn in xenstored)."""
    first = perms[0]
    if first[1] in ids:
        return READ | WRITE | OWNER
    if len(perms) > 1:
        for access, domid in perms:
            if domid in ids and not access & IGNORED:
                return access
    return first[0]


def parent_of(path: bytes) -> bytes:
    """`/` above `/a` and above a special path without a slash; `@releaseDomain` above `@releaseDomain/5`."""
    at = path.rfind(b"/", 1)
    return path[:at] if at > 0 else b"/"


def child_path(path: bytes, name: bytes) -> bytes:
    return b"/" + name if path == b"/" else path + b"/" + name
