"""Records -> engine: a store as a stream says it was. Pure.

Fills an engine that is made for that; who gets the connections' bytes is the caller's business. A stream that
makes no sense is a StateError, and no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from xenbus.errors import UsageError
from xenbus.xenstore.engine import QUOTAS, Connection, Engine
from xenbus.xenstore.engine.sessions import add_watch
from xenbus.xenstore.engine.transactions import FIRE_EXACT, FIRE_NOT, FIRE_SUBTREE, Entry, Transaction
from xenbus.xenstore.engine.tree import IGNORED, Node, Perms, parent_of
from xenbus.xenstore.state.dump import removed_with_parent
from xenbus.xenstore.state.image import Image, messages
from xenbus.xenstore.state.records import (
    ConnectionData,
    DomainData,
    GlobalQuotaData,
    NodeAccess,
    NodeData,
    Placed,
    Reader,
    Ring,
    WatchData,
)
from xenbus.xenstore.wire import Op

_EVENT = int(Op.WATCH_EVENT)
_NOBODY: Perms = ((0, 0),)


@dataclass(slots=True)
class Restored:
    """A connection of the engine that was filled. `data`: what it was; of its outbound bytes the engine has
    all but the first `data.partial`, which belong to the transport."""

    conn: Connection
    data: ConnectionData


@dataclass(slots=True)
class Store:
    """What came of it."""

    engine: Engine
    connections: list[Restored]


def read(stream: bytes | memoryview) -> Image:
    """A whole stream and nothing else. StateError."""
    image = Image()
    reader = Reader(stream)
    image.add(reader.records())
    reader.finish()
    return image


def load(image: Image, make_engine: Callable[[], Engine]) -> Store:
    """A filled engine. StateError for what only shows here: a quota out of range, a watch that is there
    twice."""
    engine = make_engine()
    special = _clear(engine)
    _quotas(engine, image)
    for placed in image.in_order():
        _node(engine, cast(NodeData, placed.record), special)
    for path, node in special.items():
        _put(engine, path, node)
    connections = {number: _connection(engine, placed) for number, placed in image.connections.items()}
    for placed in sorted((one for held in image.watches.values() for one in held), key=_number):
        _watch(engine, connections[cast(WatchData, placed.record).conn_id].conn, placed)
    for (number, tx_id), view in image.views.items():
        if not engine.profile.portable:
            raise image.connections[number].error(
                f"transaction {tx_id} is open, which {engine.profile.name} cannot go on with"
            )
        _transaction(engine, connections[number].conn, tx_id, view)
    for restored in connections.values():
        queue(restored.conn, restored.data.outbound, restored.data.partial)
    return Store(engine, list(connections.values()))


def _number(placed: Placed) -> int:
    return placed.number


def _clear(engine: Engine) -> dict[bytes, Node]:
    """What a new store is planted with goes, but for the root. Its special nodes."""
    special = {path: node for path, node in engine.nodes.items() if path.lstrip(b"/")[:1] == b"@"}
    engine.nodes.clear()
    domain = engine.domain(0)
    domain.nodes = domain.memory = 0
    _put(engine, b"/", Node(b"", _NOBODY, 0))
    return special


def _put(engine: Engine, path: bytes, node: Node) -> None:
    """A node that is not there, below one that is. Whatever the profile: nobody looks at the tree yet."""
    accounting = engine.profile.accounting
    engine.generation += 1
    node.generation = engine.generation
    engine.nodes[path] = node
    owner = engine.domain(node.owner)
    if accounting or path != b"/":
        owner.nodes += 1
    if accounting:
        owner.memory += len(path) + node.size
    if path[:1] == b"/" and path != b"/":
        parent = engine.nodes[parent_of(path)]
        name = path[path.rindex(b"/") + 1 :]
        parent.add_child(name)
        if accounting:
            engine.domain(parent.owner).memory += len(name) + 1


def _quotas(engine: Engine, image: Image) -> None:
    if image.quotas is not None:
        record = cast(GlobalQuotaData, image.quotas.record)
        _set_quotas(engine, image.quotas, None, record.of_domains)
    for placed in image.domains.values():
        domain_data = cast(DomainData, placed.record)
        domain = engine.domain(domain_data.domid)
        if domain_data.features is not None:
            domain.features = domain_data.features & engine.profile.features
        _set_quotas(engine, placed, domain.domid, domain_data.quotas)


def _set_quotas(engine: Engine, placed: Placed, domid: int | None, values: dict[str, int]) -> None:
    quotas = engine.quotas if domid is None else engine.domain(domid).quotas
    for name, value in values.items():
        if name in QUOTAS:  # one that we do not know has no effect
            try:
                quotas.set(name, value)
            except UsageError as error:
                raise placed.error(str(error)) from None


def _node(engine: Engine, record: NodeData, special: dict[bytes, Node]) -> None:
    path = record.path
    if path == b"/":
        # Before any other: it has no children yet.
        root = engine.nodes.pop(path)
        domain = engine.domain(root.owner)
        domain.nodes -= engine.profile.accounting
        domain.memory -= len(path) + root.size if engine.profile.accounting else 0
    # oxenstored has them below the root.
    for other in (b"/" + path, path[1:]):
        if other in special:
            path = other
    special.pop(path, None)
    perms = record.perms
    if not engine.profile.accounting:
        # It has no such entries, and would use them.
        perms = (perms[0], *(entry for entry in perms[1:] if not entry[0] & IGNORED))
    _put(engine, path, Node(record.value, perms, 0))


def _connection(engine: Engine, placed: Placed) -> Restored:
    data = cast(ConnectionData, placed.record)
    spec = data.spec
    if not isinstance(spec, Ring):
        return Restored(engine.connect(0), data)
    domain = engine.domain(spec.domid)
    domain.introduced = True
    conn = engine.connect(spec.domid)
    if spec.target is not None:
        engine.set_target(domain, engine.domain(spec.target).domid)
    return Restored(conn, data)


def _watch(engine: Engine, conn: Connection, placed: Placed) -> None:
    record = cast(WatchData, placed.record)
    raw = record.path
    path = raw if raw[:1] in (b"/", b"@") else conn.home + raw
    if (path, record.token) in conn.watches:
        raise placed.error(f"watch at {raw!r} is there already")
    depth = -1 if record.depth is None else record.depth
    add_watch(engine, conn, path, record.token, depth, len(path) - len(raw))


def queue(conn: Connection, outbound: bytes, start: int) -> None:
    """The messages that `outbound` is from `start` on wait for the client again."""
    for message in messages(outbound, start):
        if int.from_bytes(message[:4], "little") == _EVENT:
            # What waits is not lost to a quota that is smaller now.
            once = message[16:17] != b"@" and message not in conn.events
            conn.out.append(message)
            conn.queued += len(message)
            if once:
                conn.events[message] = None
            if conn.guest:
                conn.domain.memory += len(message)
        else:
            conn.put_reply(message)


# ---- transactions ----


def _transaction(engine: Engine, conn: Connection, tx_id: int, view: list[Placed]) -> None:
    """As it was. What it saw and is not so now makes it stale: END is EAGAIN then, as it would have been."""
    tx = Transaction(tx_id, conn.domain)
    engine.begin_transaction(conn, tx)
    conn.next_tx = max(conn.next_tx, tx_id + 1) & 0xFFFF_FFFF
    for placed in view:
        record = cast(NodeData, placed.record)
        if record.path == b"/" and not record.perms:
            tx.stale = True  # see dump.py
            continue
        if record.path in tx.accessed:
            if record.access != NodeAccess.DELETED or tx.accessed[record.path].node is not None:
                raise placed.error(f"node {record.path!r} is there already")
            tx.accessed[record.path].fire = FIRE_SUBTREE  # see dump.py
            continue
        entry = tx.accessed[record.path] = Entry(engine.nodes.get(record.path))
        _see(tx, entry, record)
    for path, entry in tx.accessed.items():
        _fit_parent(tx, path, entry)
    for path, entry in tx.accessed.items():
        if not entry.modified:
            continue
        if entry.node is None:
            # The root of what was removed is told to those above it, what was below it to its own watches.
            if entry.fire == FIRE_NOT:
                entry.fire = FIRE_EXACT if removed_with_parent(tx, path) else FIRE_SUBTREE
        else:
            engine.generation += 1
            entry.node.generation = engine.generation
            size = len(path) + entry.node.size
            tx.memory += size
            tx.domain.memory += size
        _count(tx, entry)


def _see(tx: Transaction, entry: Entry, record: NodeData) -> None:
    base = entry.base
    if record.access == NodeAccess.DELETED:
        entry.node = None
        entry.modified = True
        return
    if not record.perms:
        tx.stale = tx.stale or base is not None
        entry.node = None
        return
    written = bool(record.access & NodeAccess.WRITTEN)
    if base is not None and not written:
        if (base.value, base.perms) != (record.value, record.perms):
            tx.stale = True
            entry.node = base.clone()
            entry.node.value, entry.node.perms = record.value, record.perms
        return
    entry.node = base.clone() if base is not None else Node(b"", record.perms, 0)
    entry.node.value, entry.node.perms = record.value, record.perms
    entry.modified = True
    entry.fire = FIRE_SUBTREE if written else FIRE_NOT
    tx.created = tx.created or base is None


def _fit_parent(tx: Transaction, path: bytes, entry: Entry) -> None:
    """The parent's list of names, as the transaction sees it."""
    if not entry.modified or path[:1] != b"/" or path == b"/":
        return
    above = tx.accessed.get(parent_of(path))
    if above is None or above.node is None:
        return
    name = path[path.rindex(b"/") + 1 :]
    known = name in (above.node.children or ())
    if known == (entry.node is not None):
        return
    if above.node is above.base:
        above.node = above.node.clone()
        above.modified = True
    if known:
        above.node.drop_child(name)
    else:
        above.node.add_child(name)


def _count(tx: Transaction, entry: Entry) -> None:
    base, node = entry.base, entry.node
    if base is not None and node is not None and base.owner == node.owner:
        return
    if base is not None:
        tx.count(base.owner, -1)
    if node is not None:
        tx.count(node.owner, 1)
