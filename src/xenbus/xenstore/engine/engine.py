"""The store itself: `handle(connection, message)` changes the tree and queues what has to be said. Pure.

Holds tree, domains, watches; the operations are in nodes.py, sessions.py, domains.py, control.py, and
use the primitives below. No clock, no I/O: a daemon moves bytes and does what `Hooks` asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xenbus.xenstore.engine import control, sessions
from xenbus.xenstore.engine.connection import QUEUE_LIMIT, Cause, Connection, Domain
from xenbus.xenstore.engine.dispatch import Fail, Hooks, OpenTransaction
from xenbus.xenstore.engine.profiles import XENSTORED, Profile
from xenbus.xenstore.engine.quotas import Quotas
from xenbus.xenstore.engine.transactions import FIRE_EXACT, FIRE_NOT, Entry, Transaction
from xenbus.xenstore.engine.tree import READ, Node, Perms, access_of, child_path, parent_of
from xenbus.xenstore.engine.update import LiveUpdate
from xenbus.xenstore.engine.watches import Watch
from xenbus.xenstore.wire import DOMID_FIRST_RESERVED, HEADER, PAYLOAD_MAX, Message, Op, op_name

_pack = HEADER.pack
_ERROR = int(Op.ERROR)
_EVENT = int(Op.WATCH_EVENT)
# A transaction id in their header is not looked at (XS_FLAG_NOTID).
_IGNORES_TX = frozenset({int(Op.WATCH), int(Op.UNWATCH)})
_OPS = max(Op) + 1


class Engine:
    """The XenStore.

    quotas:  of a domain that has none of its own (SET_QUOTA without a domid changes them)
    hooks:   side effects; None: INTRODUCE and RELEASE are book-keeping alone
    profile: which daemon it is like
    nodes:   absolute path -> Node; read it, change nothing
    beside:  what the profile keeps beside the tree
    """

    def __init__(
        self, quotas: Quotas | None = None, hooks: Hooks | None = None, profile: Profile = XENSTORED
    ) -> None:
        self.profile = profile
        self.quotas = quotas or profile.quotas()
        self.hooks = hooks
        self.generation = 0
        self.nodes: dict[bytes, Node] = {}
        self.domains: dict[int, Domain] = {}
        self.watches = profile.watches()
        self.maxima: dict[str, int] = {}
        self.log_switches: dict[str, bool] = dict.fromkeys(control.LOG_SWITCHES, False)
        self.logging = False
        self.update: LiveUpdate | None = None
        self.dirty: set[Connection] = set()
        self._current: Connection | None = None
        self.domain(0).introduced = True
        self.beside: Any = profile.plant(self)

    # ---- connections ----

    def connect(self, domid: int, *, queue_limit: int = QUEUE_LIMIT) -> Connection:
        """A client that speaks for `domid`; the caller knows that it may."""
        domain, profile = self.domain(domid), self.profile
        conn = Connection(domain, profile.guest if domid else profile.dom0, queue_limit)
        domain.connections.add(conn)
        self._set_ids(domain)
        return conn

    def disconnect(self, conn: Connection) -> None:
        """Its watches and transactions go; whatever was queued is dropped. Idempotent."""
        if conn.closed:
            return
        self.reset(conn)
        conn.closed = True
        conn.domain.connections.discard(conn)
        self.dirty.discard(conn)

    def reset(self, conn: Connection) -> None:
        """As if it had just connected: no watch, no transaction, nothing queued."""
        self.drop_session(conn)
        conn.drop_queue()

    def drop_session(self, conn: Connection) -> None:
        """RESET_WATCHES: watches and transactions go, the queue stays."""
        for watch in list(conn.watches.values()):
            sessions.drop_watch(self, watch)
        for tx in list(conn.transactions.values()):
            self.end_transaction(conn, tx)

    def take_dirty(self) -> set[Connection]:
        """Connections that got something queued outside their own request, since the last call."""
        dirty, self.dirty = self.dirty, set()
        return dirty

    # ---- requests ----

    def handle(self, conn: Connection, message: Message) -> None:
        """One request. Its reply and events are on `conn.out`, events for others on theirs (take_dirty)."""
        op = message.op
        try:
            handler = conn.table[op] if op < _OPS else self.profile.unknown
            tx_id = message.tx_id
            if tx_id and op not in _IGNORES_TX:
                tx = conn.transactions.get(tx_id)
                if tx is None and handler not in self.profile.always_fail:
                    raise Fail(self.profile.no_transaction)
            else:
                tx = None
            self._current = conn
            payload = handler(self, conn, message, tx)
            if payload is None:
                return
            length = len(payload)
            if length > PAYLOAD_MAX and (conn.guest or not self.profile.long_replies):
                raise Fail("E2BIG")
            if self.logging:
                self._trace(conn, message, "OK")
        except Fail as fail:
            self.fail(conn, message, fail.name)
            return
        finally:
            conn.cause = self._current = None
        data = _pack(op, message.req_id, message.tx_id, length) + payload
        if conn.guest:
            conn.put_reply(data)
        else:
            conn.out.append(data)
            conn.queued += len(data)

    def reply(self, conn: Connection, message: Message, payload: bytes) -> None:
        """Queue the reply to `message` now."""
        if not conn.closed:
            conn.put_reply(_pack(message.op, message.req_id, message.tx_id, len(payload)) + payload)
            self.dirty.add(conn)

    def fail(self, conn: Connection, message: Message, name: str) -> None:
        """Queue an ERROR as the reply to `message`."""
        if self.logging:
            self._trace(conn, message, name)
        if not conn.closed:
            payload = name.encode() + b"\0"
            conn.put_reply(_pack(_ERROR, message.req_id, message.tx_id, len(payload)) + payload)
            self.dirty.add(conn)

    def _trace(self, conn: Connection, message: Message, result: str) -> None:
        if self.hooks is not None and self.log_switches["io"]:
            words = message.payload.replace(b"\0", b" ").decode("ascii", "backslashreplace")
            self.hooks.log(f"d{conn.domid} {op_name(message.op)} tx {message.tx_id} ({words}) -> {result}")

    # ---- the tree, seen through a transaction or not ----

    def lookup(self, tx: Transaction | None, path: bytes) -> Node | None:
        """The node, or None; a transaction remembers that it looked."""
        if tx is None:
            return self.nodes.get(path)
        entry = tx.accessed.get(path)
        if entry is None:
            domain = tx.domain
            if domain.domid:
                limit = domain.quotas.transaction_nodes
                if limit and len(tx.accessed) >= limit:
                    tx.failed = True
                    raise Fail("ENOSPC")
                # The name of a node that is not there is kept here alone.
                self._hold(tx, len(path))
            entry = tx.accessed[path] = Entry(self.nodes.get(path))
        return entry.node

    def modify(self, tx: Transaction | None, path: bytes, node: Node) -> Node:
        """The node to change: `node` itself, or a copy that took its place. It has a new generation."""
        self.generation += 1
        if tx is None:
            if node.snaps:
                node = self.nodes[path] = node.clone()
        else:
            entry = tx.accessed[path]
            if not entry.modified:
                self._hold(tx, len(path) + node.size)
                entry.modified = True
                node = entry.node = node.clone()
        node.generation = self.generation
        return node

    def put(self, tx: Transaction | None, path: bytes, node: Node) -> None:
        """A node that was not there before. The caller adds it to its parent."""
        self.generation += 1
        node.generation = self.generation
        if tx is None:
            self.nodes[path] = node
            domain = self.domain(node.perms[0][1])
            domain.nodes += 1
            domain.memory += len(path) + node.size
        else:
            self._hold(tx, len(path) + node.size)
            entry = tx.accessed[path]
            entry.node = node
            entry.modified = True
            tx.count(node.perms[0][1], 1)

    def remove(self, tx: Transaction | None, path: bytes, node: Node) -> None:
        """The node goes; the caller takes it out of its parent."""
        self.generation += 1
        if tx is None:
            del self.nodes[path]
            domain = self.domain(node.perms[0][1])
            domain.nodes -= 1
            domain.memory -= len(path) + node.size
        else:
            entry = tx.accessed[path]
            entry.node = None
            entry.modified = True
            tx.count(node.perms[0][1], -1)

    def noted(self, path: bytes, *, made: bool = False, gone: bool = False) -> None:
        """A profile changed a node of the tree by itself: for an engine that keeps a journal."""

    def _hold(self, tx: Transaction, size: int) -> None:
        """Memory of an open transaction is its owner's, until the end. One that cannot have it only fails."""
        domain = tx.domain
        if domain.domid and domain.memory + size > domain.quotas.memory > 0:
            tx.failed = True
            raise Fail("ENOMEM")
        tx.memory += size
        domain.memory += size

    def subtree(self, tx: Transaction | None, path: bytes) -> list[tuple[bytes, Node]]:
        """The node and all below, children before parents, siblings in order."""
        found: list[tuple[bytes, Node]] = []
        stack = [path]
        if tx is not None:
            # Looked at as walk_node_tree does, parents first: events come out in that order.
            while stack:
                node = self.lookup(tx, here := stack.pop())
                if node is not None and node.children:
                    stack += [child_path(here, name) for name in reversed(node.children)]
            stack = [path]
        while stack:
            here = stack.pop()
            node = self.lookup(tx, here)
            if node is None:
                continue
            found.append((here, node))
            if node.children:
                stack += [child_path(here, name) for name in node.children]
        found.reverse()
        return found

    # ---- transactions ----

    def begin_transaction(self, conn: Connection, tx: OpenTransaction) -> None:
        """It is this client's from now on, until `end_transaction`."""
        conn.transactions[tx.tx_id] = tx
        conn.domain.transactions += 1

    def end_transaction(self, conn: Connection, tx: OpenTransaction) -> None:
        """It is over, one way or the other; nothing is written."""
        del conn.transactions[tx.tx_id]
        conn.domain.transactions -= 1
        tx.domain.memory -= tx.memory
        tx.release()

    def commit(self, source: Connection, tx: Transaction) -> None:
        """What it wrote becomes the store's, and is told. The caller has checked that it may. One by one: who
        may hear of a node is judged by the tree as it is at that moment (finalize_transaction)."""
        for path, entry in tx.accessed.items():
            if entry.modified:
                self._commit(path, entry)
            if entry.fire != FIRE_NOT:
                perms = None if entry.node is None else entry.node.perms
                self.fire(source, path, perms, entry.perms, exact=entry.fire == FIRE_EXACT)
        for domid, delta in tx.nodes.items():
            self.domain(domid).nodes += delta

    def _commit(self, path: bytes, entry: Entry) -> None:
        base, node = entry.base, entry.node
        if base is not None:
            self.domain(base.perms[0][1]).memory -= len(path) + base.size
        if node is None:
            if base is not None:
                self.generation += 1
                del self.nodes[path]
            return
        self.generation += 1
        node.generation = self.generation
        self.nodes[path] = node
        self.domain(node.perms[0][1]).memory += len(path) + node.size

    # ---- events ----

    def fire(
        self,
        source: Connection | None,
        path: bytes,
        perms: Perms | None,
        old: Perms | None = None,
        *,
        exact: bool = False,
    ) -> None:
        """`path` changed. perms: of the node now (None: it is gone); old: before. exact: only watches on
        the very path. Whoever may read the node, its parent, or might before, is told."""
        index = self.watches
        if not index.by_path:
            return
        watches: Iterable[Watch] = index.by_path.get(path, ()) if exact else index.matching(path)
        for watch in watches:
            conn = watch.conn
            if conn.guest:
                if not self._may_hear(conn, path, perms, old):
                    continue
            elif perms is None and old is None:
                continue
            self._send_event(source, conn, path[watch.prefix :], watch.token, True)

    def _may_hear(self, conn: Connection, path: bytes, perms: Perms | None, old: Perms | None) -> bool:
        if old is not None and access_of(old, conn.ids) & READ:
            return True
        if perms is None:
            return False
        if access_of(perms, conn.ids) & READ:
            return True
        parent = self.nodes.get(parent_of(path))
        return parent is not None and access_of(parent.perms, conn.ids) & READ != 0

    def fire_special(self, name: bytes, domid: int, *, plain: bool = True, named: bool = True) -> None:
        """@introduceDomain or @releaseDomain for `domid`. plain: to watches without a depth; named: to those
        that asked for the domid."""
        perms = self.nodes[name].perms
        for watch, path in self.watches.special(name, domid):
            if not (plain if path == name else named):
                continue
            if watch.conn.guest and not access_of(perms, watch.conn.ids) & READ:
                continue
            self._send_event(None, watch.conn, path, watch.token, False)

    def first_event(self, conn: Connection, path: bytes, token: bytes) -> None:
        """A watch fires once when it is set, whatever may be read."""
        self._send_event(None, conn, path, token, path[:1] != b"@")

    def queue_event(self, conn: Connection, data: bytes) -> None:
        """An encoded event, queued whatever waits already."""
        if not conn.overflow:
            conn.put_event(data, None, once=False)
            self.dirty.add(conn)

    def _send_event(
        self, source: Connection | None, conn: Connection, path: bytes, token: bytes, once: bool
    ) -> None:
        length = len(path) + len(token) + 2
        if length > PAYLOAD_MAX or conn.overflow:
            return
        cause = None
        if source is not None and source.guest and source is not conn:
            cause = source.cause
            if cause is None:
                cause = source.cause = Cause(source)
        conn.put_event(_pack(_EVENT, 0, 0, length) + path + b"\0" + token + b"\0", cause, once=once)
        if conn is not self._current:
            self.dirty.add(conn)

    # ---- domains ----

    def domain(self, domid: int) -> Domain:
        """What is known of a domain; it is made if nothing was."""
        domain = self.domains.get(domid)
        if domain is None:
            domain = self.domains[domid] = Domain(domid, self.quotas.copy())
            domain.features = self.profile.features
        return domain

    def exists(self, domid: int) -> bool:
        """Whether it may own nodes: it was introduced, is connected, or the daemon knows of it."""
        if domid in self.domains:
            return True
        return self.hooks is not None and domid < DOMID_FIRST_RESERVED and self.hooks.domain_exists(domid)

    def _set_ids(self, domain: Domain) -> None:
        target = () if domain.target is None else (domain.target,)
        ids = (domain.domid, *self.profile.everybody, *target)
        for conn in domain.connections:
            conn.ids = ids

    def set_target(self, domain: Domain, target: int | None) -> None:
        """`domain` has the rights of `target` too."""
        domain.target = target
        self._set_ids(domain)

    def introduced(self, domid: int) -> None:
        """The domain is served from now on; @introduceDomain fires the first time."""
        self.profile.introduced(self, domid)

    def domain_shutdown(self, domid: int) -> None:
        """It stopped but is not gone: @releaseDomain."""
        self.profile.shutdown(self, domid)

    def domain_died(self, domid: int) -> None:
        """The domain is gone (or released): its connections, watches, transactions and nodes go, its entries
        in other lists mean nothing any more; @releaseDomain fires if it had been introduced. Idempotent."""
        self.profile.died(self, domid)

    def features_of(self, conn: Connection) -> int:
        return conn.domain.features if conn.guest else self.profile.features

    # ---- looking inside, for tests and CONTROL check ----

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if nothing is."""
        return control.inconsistencies(self)
