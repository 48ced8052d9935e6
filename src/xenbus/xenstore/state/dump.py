"""Engine -> records: the whole of a store, for a live update or for a file. Pure.

Knows the engine; what a connection has read and not sent yet is told by whoever holds its transport (`Held`).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from xenbus.xenstore.engine import Connection, Domain, Engine
from xenbus.xenstore.engine.transactions import FIRE_NOT, FIRE_SUBTREE, Entry, Transaction
from xenbus.xenstore.engine.tree import child_path, parent_of
from xenbus.xenstore.state.records import (
    DEPTH_ANY,
    ConnectionData,
    DomainData,
    GlobalQuotaData,
    NodeAccess,
    NodeData,
    Record,
    Ring,
    Socket,
    TransactionData,
    WatchData,
)

# Past every domid.
SOCKETS_FROM = 0x10000


@dataclass(slots=True)
class Held:
    """A connection that goes along.

    inbound: read, and not given to the engine yet
    unsent:  taken from the engine, and not sent yet; its first `partial` bytes are the rest of a message
    after:   what is sent after all that waits
    """

    conn: Connection
    spec: Ring | Socket
    inbound: bytes = b""
    unsent: bytes = b""
    partial: int = 0
    after: bytes = b""


def dump(engine: Engine, held: Sequence[Held] = (), *, transactions: bool = True) -> Iterator[Record]:
    """Everything but GLOBAL_DATA, in an order that xenstored reads as well. An introduced domain that is not
    in `held` gets a connection without a port, so that it is known that it was introduced.

    transactions: False for a reader that knows none (xenstored takes their nodes for the store's)
    """
    yield GlobalQuotaData(engine.quotas.as_dict())
    numbers = {one.conn: conn_id(one, at) for at, one in enumerate(held)}
    for one, number in zip(held, numbers.values(), strict=True):
        yield connection(one, number)
    yield from unserved(engine, {one.conn.domain for one in held})
    yield from watches(numbers)
    pending = [(conn, tx) for conn in numbers for tx in conn.transactions.values()] if transactions else []
    for conn, tx in pending:
        yield TransactionData(numbers[conn], tx.tx_id)
    yield from nodes(engine)
    for conn, tx in pending:
        yield from _transaction(engine, numbers[conn], tx)
    for domain in engine.domains.values():
        if domain.guest:
            yield domain_data(engine, domain)


def conn_id(held: Held, at: int) -> int:
    """A ring's is its domid, so that what is said of it later finds it."""
    return held.spec.domid if isinstance(held.spec, Ring) and held.spec.domid else SOCKETS_FROM + at


def connection(held: Held, number: int) -> ConnectionData:
    outbound = held.unsent + b"".join(held.conn.out) + held.after
    return ConnectionData(number, held.spec, held.inbound, outbound, held.partial)


def unserved(engine: Engine, served: Container[Domain]) -> Iterator[ConnectionData]:
    """Domains that are introduced and have no ring that works."""
    for domain in engine.domains.values():
        if domain.guest and domain.introduced and domain not in served:
            yield ConnectionData(domain.domid, Ring(domain.domid, domain.target, 0))


def watches(numbers: dict[Connection, int]) -> Iterator[WatchData]:
    """Of all these connections, in order of registration: that of events."""
    found = [watch for conn in numbers for watch in conn.watches.values()]
    found.sort(key=lambda watch: watch.serial)
    for watch in found:
        # A depth past what fits reaches every node that a path has room for.
        depth = watch.depth if 0 <= watch.depth < DEPTH_ANY else None
        yield WatchData(numbers[watch.conn], watch.path[watch.prefix :], watch.token, depth)


def nodes(engine: Engine) -> Iterator[NodeData]:
    """Parents before children, siblings in the order that DIRECTORY has; special nodes first."""
    tree = engine.nodes
    for path, node in tree.items():
        if path[:1] == b"@":
            yield NodeData(path, node.value, node.perms)
    stack = [b"/"]
    while stack:
        path = stack.pop()
        node = tree[path]
        yield NodeData(path, node.value, node.perms)
        if node.children:
            stack += [child_path(path, name) for name in reversed(node.children)]


def domain_data(engine: Engine, domain: Domain) -> DomainData:
    """Its features, and the quotas that are not what others have."""
    usual = engine.quotas.as_dict()
    own = {name: value for name, value in domain.quotas.as_dict().items() if value != usual[name]}
    return DomainData(domain.domid, domain.features, own)


def doomed(engine: Engine, tx: Transaction) -> bool:
    """Whether its END can only fail."""
    return tx.failed or tx.outdated(engine.nodes)


def _transaction(engine: Engine, number: int, tx: Transaction) -> Iterable[NodeData]:
    if doomed(engine, tx):
        # The stream has no word for that; but whoever saw the store without a root can't be right.
        yield NodeData(b"/", conn_id=number, tx_id=tx.tx_id, access=NodeAccess.READ)
    for path, entry in tx.accessed.items():
        node = entry.node
        if node is None:
            gone = NodeData(path, conn_id=number, tx_id=tx.tx_id, access=_access(entry))
            yield gone
            if entry.fire == FIRE_SUBTREE and removed_with_parent(tx, path):
                yield gone  # a second time: it was removed by itself before its parent was
        else:
            yield NodeData(path, node.value, node.perms, number, tx.tx_id, _access(entry))


def removed_with_parent(tx: Transaction, path: bytes) -> bool:
    """Whether its parent is removed too: watches above hear of that alone, as a rule."""
    above = tx.accessed.get(parent_of(path))
    return above is not None and above.node is None


def _access(entry: Entry) -> int:
    """WRITTEN: an event goes out for it. A parent that only got or lost a child was READ."""
    if not entry.modified:
        return NodeAccess.READ
    if entry.node is None:
        return NodeAccess.DELETED
    return NodeAccess.READ if entry.fire == FIRE_NOT else NodeAccess.READ | NodeAccess.WRITTEN
