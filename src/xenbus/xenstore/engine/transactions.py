"""A transaction as an overlay: the nodes it touched, each with the generation it was seen at. Pure.

Knows nodes; reads nothing by itself (Engine.lookup fills it). Rules: the comment at the head of
xenstored's transaction.c; writing implies reading, so every entry is checked at the end.
"""

from __future__ import annotations

from xenbus.xenstore.engine.connection import Domain
from xenbus.xenstore.engine.tree import NO_GENERATION, Node, Perms

FIRE_NOT = 0
FIRE_EXACT = 1
FIRE_SUBTREE = 2


class Entry:
    """One node as the transaction sees it. `node` is `base` until it is changed, None when missing."""

    __slots__ = ("base", "fire", "generation", "modified", "node", "perms")

    def __init__(self, base: Node | None) -> None:
        self.base = base
        self.node = base
        self.generation = NO_GENERATION if base is None else base.generation
        # Those of the first access: who lost the right to read is told once more (queue_watches).
        self.perms: Perms | None = None if base is None else base.perms
        self.modified = False
        self.fire = FIRE_NOT
        if base is not None:
            base.snaps += 1


class Transaction:
    """`accessed` is in order of first access: events come out in that order.

    domain: its owner
    nodes: by how much each domain's node count will change
    memory: bytes held for the owner until the end
    created: some node was, or should have been; failed: END can only fail (ENOMEM)
    stale: something it saw is not so any more since it was loaded: END can only fail (EAGAIN)
    """

    __slots__ = ("accessed", "created", "domain", "failed", "memory", "nodes", "stale", "tx_id")

    def __init__(self, tx_id: int, domain: Domain) -> None:
        self.tx_id = tx_id
        self.domain = domain
        self.accessed: dict[bytes, Entry] = {}
        self.nodes: dict[int, int] = {}
        self.memory = 0
        self.created = False
        self.failed = False
        self.stale = False

    def queue_event(self, path: bytes, fire: int) -> None:
        entry = self.accessed[path]
        entry.fire = max(entry.fire, fire)

    def count(self, domid: int, delta: int) -> None:
        self.nodes[domid] = self.nodes.get(domid, 0) + delta

    def written(self) -> list[Node]:
        """Nodes that its end would put into the tree."""
        return [entry.node for entry in self.accessed.values() if entry.modified and entry.node is not None]

    def outdated(self, nodes: dict[bytes, Node]) -> bool:
        """Whether something it saw is not so any more in that tree: its END is EAGAIN."""
        if self.stale:
            return True
        for path, entry in self.accessed.items():
            node = nodes.get(path)
            if (NO_GENERATION if node is None else node.generation) != entry.generation:
                return True
        return False

    def release(self) -> None:
        """Looks at no node any more. Once."""
        for entry in self.accessed.values():
            if entry.base is not None:
                entry.base.snaps -= 1
