"""The tree as a request sees it: as it is, or as a transaction found it and has changed it since. Pure.

Both have the same primitives, so that an operation is written once and can be done again at a commit. Knows
the tree, its history and the counts of nodes; not watches, nor what may be done by whom.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING

from xenbus.xenstore.engine.connection import Connection, Domain
from xenbus.xenstore.engine.dispatch import Fail
from xenbus.xenstore.engine.oxenstored.conflicts import Conflicts
from xenbus.xenstore.engine.oxenstored.history import Epoch, History, touch
from xenbus.xenstore.engine.tree import Node, Perms, child_path, parent_of
from xenbus.xenstore.wire import Message, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine


class Change(Enum):
    """What is told to watches: all but RM look at the new tree, SET_PERMS at both."""

    WRITE = auto()
    RM = auto()
    SET_PERMS = auto()


class View(ABC):
    """changes: what watches are told, in order. Parents that were made on the way are not in there."""

    __slots__ = ("changes", "engine")

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.changes: list[tuple[Change, bytes]] = []

    @abstractmethod
    def get(self, path: bytes) -> Node | None:
        """The node; None if it is not there."""

    @abstractmethod
    def old_perms(self, path: bytes) -> Perms | None:
        """The entries before the changes; None if it was not there."""

    @abstractmethod
    def owned(self, domid: int) -> int:
        """How many nodes are counted for a domain."""

    @abstractmethod
    def count(self, domid: int, delta: int) -> None:
        """So many more are."""

    @abstractmethod
    def _own(self, path: bytes, node: Node) -> Node:
        """`node`, or what takes its place, to be changed."""

    @abstractmethod
    def _put(self, path: bytes, node: Node | None) -> None:
        """`node` is what is there; None: nothing is."""

    @abstractmethod
    def _touch(self, path: bytes) -> None:
        """The node, and with it those above, is not the same any more."""

    @abstractmethod
    def saw(self, path: bytes) -> None:
        """A node was read."""

    @abstractmethod
    def wrote(self, path: bytes) -> None:
        """A node, or something right below it, was written."""

    def set_value(self, path: bytes, node: Node, value: bytes) -> None:
        if value == node.value:
            # The node stays the very same; those above do not.
            if path != b"/":
                self._touch(parent_of(path))
            return
        self._own(path, node).value = value
        self._touch(path)

    def set_perms(self, path: bytes, node: Node, perms: Perms) -> None:
        self.count(node.perms[0][1], -1)
        self.count(perms[0][1], 1)
        self._own(path, node).perms = perms
        self._touch(path)

    def add(self, path: bytes, parent: Node, value: bytes) -> None:
        """A child of `parent`, with its entries; they name the owner, too."""
        above = parent_of(path)
        self._own(above, parent).add_child(path[path.rindex(b"/") + 1 :])
        self._put(path, Node(value, parent.perms, 0))
        self.count(parent.perms[0][1], 1)
        self._touch(path)

    def remove(self, path: bytes) -> None:
        """The node with all below it; of the root, all below."""
        for here, node in list(self.subtree(path)):
            if here == b"/":
                continue
            self._put(here, None)
            self.count(node.perms[0][1], -1)
        if path == b"/":
            root = self.get(path)
            assert root is not None
            root = self._own(path, root)
            root.children = None
            root.childlen = 0
            self._touch(path)
            return
        above = parent_of(path)
        parent = self.get(above)
        if parent is not None:
            self._own(above, parent).drop_child(path[path.rindex(b"/") + 1 :])
        self._touch(path)

    def subtree(self, path: bytes) -> Iterator[tuple[bytes, Node]]:
        """The node and all below."""
        stack = [path]
        while stack:
            here = stack.pop()
            node = self.get(here)
            if node is None:
                continue
            yield here, node
            if node.children:
                stack += [child_path(here, name) for name in node.children]


class Store(View):
    """The tree as it is.

    history: what transactions still look at
    conflicts: who made transactions fail
    rings:   domid -> gfn as introduced
    """

    __slots__ = ("_nodes", "_old", "conflicts", "history", "rings")

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.history = History(engine.nodes)
        self.conflicts = Conflicts(engine, self.history)
        self.rings: dict[int, int] = {0: 0}
        self._nodes = engine.nodes
        self._old: dict[bytes, Perms | None] = {}

    def begin(self) -> None:
        """A request begins: old_perms is about the tree as it is now."""
        self.changes.clear()
        self._old.clear()

    def get(self, path: bytes) -> Node | None:
        return self._nodes.get(path)

    def old_perms(self, path: bytes) -> Perms | None:
        if path in self._old:
            return self._old[path]
        node = self._nodes.get(path)
        return None if node is None else node.perms

    def owned(self, domid: int) -> int:
        return self.engine.domain(domid).nodes

    def count(self, domid: int, delta: int) -> None:
        self.engine.domain(domid).nodes += delta

    def _own(self, path: bytes, node: Node) -> Node:
        self._old.setdefault(path, node.perms)
        if self.history.keep(path, node):
            node = self._nodes[path] = node.clone()
        self.engine.noted(path)
        self.engine.generation += 1
        node.generation = self.engine.generation
        return node

    def _put(self, path: bytes, node: Node | None) -> None:
        before = self._nodes.get(path)
        self._old.setdefault(path, None if before is None else before.perms)
        self.history.keep(path, before)
        if node is None:
            del self._nodes[path]
            self.history.gone(path)
            self.engine.noted(path, gone=True)
            return
        self.engine.noted(path, made=before is None)
        self.engine.generation += 1
        node.generation = self.engine.generation
        self._nodes[path] = node

    def _touch(self, path: bytes) -> None:
        self.history.touch(path)

    def saw(self, path: bytes) -> None:
        pass

    def wrote(self, path: bytes) -> None:
        pass

    def merge(self, tx: Transaction) -> None:
        """What the transaction wrote takes its place in the tree."""
        for path, node in tx.nodes.items():
            if node is not None or path in self._nodes:
                self._put(path, node)
        for path in tx.touched:
            self.history.touch(path)
        for domid, delta in tx.counts.items():
            self.count(domid, delta)


# What an operation came to: the payload of its reply, or the name of its error.
Answer = bytes | str


class Transaction(View):
    """The tree as it was at the start, with what was done since on top.

    domain:     whose it is
    nodes:      what was written, None where something was removed
    touched:    these nodes are not the same any more, nor are their ancestors
    counts:     by how much each domain's count of nodes changes
    operations: all that was asked in it, with the answers, to be done again
    read_at, write_at: the lowest node above all that was read, and written
    kept:       bytes of these
    over:       too many requests: it can neither go on nor end
    """

    __slots__ = (
        "_owned",
        "counts",
        "domain",
        "epoch",
        "kept",
        "memory",
        "nodes",
        "operations",
        "over",
        "read_at",
        "store",
        "touched",
        "tx_id",
        "write_at",
    )

    def __init__(self, tx_id: int, domain: Domain, store: Store, epoch: Epoch | None = None) -> None:
        """epoch: the tree to begin with, if it is not the one of now."""
        super().__init__(store.engine)
        self.tx_id = tx_id
        self.domain = domain
        self.store = store
        self.epoch = store.history.begin() if epoch is None else store.history.hold(epoch)
        self.nodes: dict[bytes, Node | None] = {}
        self.touched: set[bytes] = set()
        self.counts: dict[int, int] = {}
        self.operations: list[tuple[int, bytes, Answer]] = []
        self.read_at: bytes | None = None
        self.write_at: bytes | None = None
        self.over = False
        self.kept = 0
        self.memory = 0
        self._owned = {domid: domain.nodes for domid, domain in store.engine.domains.items()}

    def release(self) -> None:
        """Nobody looks at its tree any more. Once."""
        self.store.conflicts.ended(self)
        self.store.history.release(self.epoch)

    def get(self, path: bytes) -> Node | None:
        if path in self.nodes:
            return self.nodes[path]
        return self.node_before(path)

    def node_before(self, path: bytes) -> Node | None:
        """The node at the start."""
        return self.store.history.node_at(self.epoch, path)

    def old_perms(self, path: bytes) -> Perms | None:
        node = self.node_before(path)
        return None if node is None else node.perms

    def owned(self, domid: int) -> int:
        return self._owned.get(domid, 0) + self.counts.get(domid, 0)

    def count(self, domid: int, delta: int) -> None:
        self.counts[domid] = self.counts.get(domid, 0) + delta

    def _own(self, path: bytes, node: Node) -> Node:
        if path not in self.nodes:
            node = self.nodes[path] = node.clone()
        return node

    def _put(self, path: bytes, node: Node | None) -> None:
        if node is None and self.node_before(path) is None:
            # It came and went: nothing has changed.
            del self.nodes[path]
            self.touched.discard(path)
        else:
            self.nodes[path] = node

    def _touch(self, path: bytes) -> None:
        while path not in self.nodes and self.node_before(path) is None:
            path = parent_of(path)
        touch(self.touched, path)

    def saw(self, path: bytes) -> None:
        self.read_at = path if self.read_at is None else _common(self.read_at, path)

    def wrote(self, path: bytes) -> None:
        self.write_at = path if self.write_at is None else _common(self.write_at, path)

    # ---- its end ----

    def check_room(self, conn: Connection, message: Message) -> None:
        """EQUOTA if a guest asks too much in one transaction, or in all that it has open."""
        if 0 in conn.ids:
            return
        quotas = conn.domain.quotas
        limit = quotas.transaction_nodes
        if limit and (self.over or len(self.operations) >= limit):
            self.over = True
            raise Fail("EQUOTA")
        # Not of `Domain.memory`: who has none left is not read from any more, and could not even end them.
        size = len(message.payload) + sum(tx.kept for tx in conn.transactions.values())
        if message.op != Op.TRANSACTION_END and size > quotas.memory > 0:
            raise Fail("EQUOTA")

    def keep(self, message: Message, answer: Answer) -> None:
        """What was asked and answered, until the end."""
        self.operations.append((message.op, message.payload, answer))
        self.kept += len(message.payload) + len(answer)

    @property
    def merges(self) -> bool:
        """Whether what it wrote can simply take its place: nothing else was changed meanwhile, or not
        where it read and wrote."""
        if not self.store.history.anything_since(self.epoch):
            return True
        return self._still_there(self.read_at) and self._still_there(self.write_at)

    def _still_there(self, path: bytes | None) -> bool:
        if path is None:
            return True
        nodes = self.engine.nodes
        above = parent_of(path)
        if self.node_before(above) is None or above not in nodes:
            return False
        before = self.node_before(path)
        if before is None:
            return path not in nodes
        if path not in nodes or self.store.history.changed_since(self.epoch, path):
            return False
        while True:
            now, before = nodes.get(path), self.node_before(path)
            if now is None or before is None or now.perms != before.perms:
                return False
            if path == b"/":
                return True
            path = parent_of(path)


def _common(one: bytes, other: bytes) -> bytes:
    """The lowest node above both, or one of them."""
    if one == other:
        return one
    shared = []
    for left, right in zip(one.split(b"/"), other.split(b"/"), strict=False):
        if left != right:
            break
        shared.append(left)
    return b"/".join(shared) or b"/"
