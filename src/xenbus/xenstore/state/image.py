"""What a stream, and the changes that were appended to it, amount to: records sorted by what they are. Pure.

Knows records and what they may refer to; not the engine. Everything that is wrong is blamed on its record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from xenbus.xenstore.engine.tree import parent_of
from xenbus.xenstore.state.records import (
    ConnectionData,
    DomainData,
    GlobalData,
    GlobalQuotaData,
    NodeData,
    Placed,
    Ring,
    RingPosition,
    TransactionData,
    WatchData,
)
from xenbus.xenstore.wire import DOMID_FIRST_RESERVED, PAYLOAD_MAX
from xenbus.xenstore.wire.paths import match_absolute, match_relative, match_special


class Image:
    """Fill it with `add` (a stream) and `change` (what came after it), then look at the attributes.

    nodes: of the store, by path; `in_order` gives them parents first
    views: of transactions, by (connection, transaction), in order
    positions: of journals alone: where a domain's ring stood when its connection was written down
    """

    __slots__ = (
        "_children",
        "_rings",
        "connections",
        "domains",
        "globals",
        "nodes",
        "positions",
        "quotas",
        "transactions",
        "views",
        "watches",
    )  # fmt: skip

    def __init__(self) -> None:
        self.globals: GlobalData | None = None
        self.quotas: Placed | None = None
        self.domains: dict[int, Placed] = {}
        self.connections: dict[int, Placed] = {}
        self.watches: dict[int, list[Placed]] = {}
        self.transactions: dict[tuple[int, int], Placed] = {}
        self.views: dict[tuple[int, int], list[Placed]] = {}
        self.nodes: dict[bytes, Placed] = {}
        self.positions: dict[int, RingPosition] = {}
        self._rings: dict[int, int] = {}  # whose connection it is, by domid
        self._children: dict[bytes, dict[bytes, None]] = {}

    # ---- a stream ----

    def add(self, records: Iterable[Placed]) -> None:
        """Of a stream, in order. StateError for what refers to nothing, or says something twice."""
        for placed in records:
            record = placed.record
            if type(record) is NodeData and not record.conn_id:
                if record.path in self.nodes:
                    raise placed.error(f"node {record.path!r} is there already")
                self._put(placed, record)
            else:
                _ADDERS[type(record)](self, placed, record)

    def _add_globals(self, placed: Placed, record: GlobalData) -> None:
        if self.globals is not None:
            raise placed.error("there was one already")
        self.globals = record

    def _add_quotas(self, placed: Placed, record: GlobalQuotaData) -> None:
        if self.quotas is not None:
            raise placed.error("there was one already")
        self.quotas = placed

    def _add_domain(self, placed: Placed, record: DomainData) -> None:
        if record.domid in self.domains:
            raise placed.error(f"domain {record.domid} was there already")
        _check_domid(placed, record.domid)
        self.domains[record.domid] = placed

    def _add_connection(self, placed: Placed, record: ConnectionData) -> None:
        if record.conn_id in self.connections:
            raise placed.error(f"connection {record.conn_id} was there already")
        spec = record.spec
        if isinstance(spec, Ring):
            if spec.domid:  # xenstored has a ring of domain 0's kernel
                _check_domid(placed, spec.domid)
            if spec.target is not None and spec.target >= DOMID_FIRST_RESERVED:
                raise placed.error(f"domain {spec.target} as a target")
            if self._rings.get(spec.domid, record.conn_id) != record.conn_id:
                raise placed.error(f"domain {spec.domid} has a ring already")
        _check_outbound(placed, record)
        if isinstance(spec, Ring):
            self._rings[spec.domid] = record.conn_id
        self.connections[record.conn_id] = placed
        self.watches[record.conn_id] = []

    def _drop_connection(self, conn_id: int) -> None:
        old = self.connections.pop(conn_id, None)
        if old is not None and isinstance(old.record, ConnectionData) and isinstance(old.record.spec, Ring):
            self._rings.pop(old.record.spec.domid, None)

    def _add_watch(self, placed: Placed, record: WatchData) -> None:
        held = self.watches.get(record.conn_id)
        if held is None:
            raise placed.error(f"no connection {record.conn_id}")
        path = record.path
        if (
            not (match_absolute(path) or match_relative(path) or match_special(path))
            or len(path) >= PAYLOAD_MAX
        ):
            raise placed.error(f"watch at {path[:100]!r}")
        held.append(placed)

    def _add_transaction(self, placed: Placed, record: TransactionData) -> None:
        key = record.conn_id, record.tx_id
        if record.conn_id not in self.connections:
            raise placed.error(f"no connection {record.conn_id}")
        if key in self.transactions:
            raise placed.error(f"transaction {record.tx_id} was there already")
        self.transactions[key] = placed
        self.views[key] = []

    def _add_view(self, placed: Placed, record: NodeData) -> None:
        view = self.views.get((record.conn_id, record.tx_id))
        if view is None:
            raise placed.error(f"no transaction {record.tx_id} of connection {record.conn_id}")
        _check_path(placed, record.path)
        view.append(placed)

    # ---- nodes ----

    def _put(self, placed: Placed, record: NodeData) -> None:
        path = record.path
        _check_path(placed, path)
        if not record.perms:
            raise placed.error(f"node {path!r} without an owner")
        if path not in self.nodes and path[:1] == b"/" and path != b"/":
            above = parent_of(path)
            if above not in self.nodes and above != b"/":
                raise placed.error(f"node {path!r} without a parent")
            self._children.setdefault(above, {})[path] = None
        self.nodes[path] = placed

    def _remove(self, placed: Placed, path: bytes) -> None:
        if path == b"/":
            raise placed.error("the root is removed")
        if path not in self.nodes:
            return  # it came and went between two batches
        siblings = self._children.get(parent_of(path))
        if siblings is not None:
            siblings.pop(path, None)
        stack = [path]
        while stack:
            here = stack.pop()
            del self.nodes[here]
            stack += self._children.pop(here, ())

    def in_order(self) -> Iterator[Placed]:
        """Parents before children, siblings in the order in which they came to be."""
        if b"/" in self.nodes:
            yield self.nodes[b"/"]
        for path, placed in self.nodes.items():
            if path[:1] == b"@":
                yield placed
        stack = list(reversed(self._children.get(b"/", {})))
        while stack:
            path = stack.pop()
            yield self.nodes[path]
            children = self._children.get(path)
            if children:
                stack += reversed(children)

    # ---- what came after it ----

    def change(self, records: Iterable[Placed]) -> None:
        """One batch of journal.py: nodes as they are now (without permissions: gone, with all below);
        GLOBAL_QUOTA_DATA begins a new list of domains, connections and watches; a domain or connection
        takes the place of the one before, its watches included."""
        for placed in records:
            record = placed.record
            if isinstance(record, NodeData):
                if record.conn_id:
                    raise placed.error("a transaction's node, in a journal")
                if record.perms:
                    self._put(placed, record)
                else:
                    self._remove(placed, record.path)
                continue
            if isinstance(record, GlobalQuotaData):
                self.quotas = None
                self.domains.clear()
                self.connections.clear()
                self._rings.clear()
                self.watches.clear()
                self.positions.clear()
            elif isinstance(record, ConnectionData):
                self._drop_connection(record.conn_id)
                self.positions.pop(record.conn_id, None)
            elif isinstance(record, RingPosition):
                self.positions[record.domid] = record
                continue
            elif isinstance(record, DomainData):
                self.domains.pop(record.domid, None)
            elif not isinstance(record, WatchData):
                raise placed.error("does not belong into a journal")
            _ADDERS[type(record)](self, placed, record)


def _check_domid(placed: Placed, domid: int) -> None:
    if not 0 < domid < DOMID_FIRST_RESERVED:
        raise placed.error(f"domain {domid}")


def _check_path(placed: Placed, path: bytes) -> None:
    if not (match_absolute(path) or match_special(path)) or len(path) >= PAYLOAD_MAX:
        raise placed.error(f"node at {path[:100]!r}")


def messages(data: bytes, start: int) -> Iterator[bytes]:
    """The messages that `data` is from `start` on. ValueError if it is not made of whole ones."""
    while start < len(data):
        if len(data) - start < 16:
            raise ValueError(f"{len(data) - start} bytes where a message belongs")
        length = int.from_bytes(data[start + 12 : start + 16], "little")
        if length > PAYLOAD_MAX or length > len(data) - start - 16:
            raise ValueError(f"a message of {length} bytes")
        yield data[start : start + 16 + length]
        start += 16 + length


def _check_outbound(placed: Placed, record: ConnectionData) -> None:
    try:
        for _ in messages(record.outbound, record.partial):
            pass
    except ValueError as error:
        raise placed.error(f"outbound data: {error}") from None


_ADDERS: dict[type, Callable[..., None]] = {
    GlobalData: Image._add_globals,
    GlobalQuotaData: Image._add_quotas,
    DomainData: Image._add_domain,
    ConnectionData: Image._add_connection,
    WatchData: Image._add_watch,
    TransactionData: Image._add_transaction,
    NodeData: Image._add_view,
}
