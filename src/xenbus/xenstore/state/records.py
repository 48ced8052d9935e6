"""The record stream of docs/designs/xenstore-migration.md, versions 1 and 2: records to bytes and back. Pure.

Knows layouts; not what a store makes of them (dump.py, load.py). What does not fit its layout is a StateError
that says which record, and at which byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

from xenbus.errors import UsageError, XenbusError
from xenbus.xenstore.engine.tree import IGNORED, Perms

IDENT = b"xenstore"
VERSIONS = (1, 2)
DOMID_INVALID = 0x7FF4
# A u16: what was read from a connection and not looked at yet must fit.
INBOUND_MAX = 0xFFFF
# WATCH_DATA_EXTENDED: no limit.
DEPTH_ANY = 0xFFFF

_PREAMBLE = struct.Struct(">8sII")
_LETTER = b"nrwb"
_ACCESS = {letter: access for access, letter in enumerate(_LETTER)}


class StateError(XenbusError):
    """A stream, or what it describes, makes no sense.

    record: which one, from 0 for the first after the header; -1: the header
    offset: where it begins, bytes from the start of the stream
    """

    def __init__(self, text: str, record: int = -1, kind: str = "header", offset: int = 0) -> None:
        where = kind if record < 0 else f"record {record} ({kind})"
        super().__init__(f"{where} at byte {offset}: {text}")
        self.text = text
        self.record = record
        self.kind = kind
        self.offset = offset


class RecordType(IntEnum):
    END = 0
    GLOBAL_DATA = 1
    CONNECTION_DATA = 2
    WATCH_DATA = 3
    TRANSACTION_DATA = 4
    NODE_DATA = 5
    GLOBAL_QUOTA_DATA = 6
    DOMAIN_DATA = 7
    WATCH_DATA_EXTENDED = 8


# Ours, and not of a stream: see RingPosition.
RING_POSITION = 0x58530001


class NodeAccess(IntFlag):
    """What a transaction did with a node. 0: it deleted it."""

    DELETED = 0
    READ = 1
    WRITTEN = 2


@dataclass(slots=True)
class GlobalData:
    """Descriptors, -1 for none: the listening socket's, and the event channels'."""

    socket_fd: int = -1
    evtchn_fd: int = -1


@dataclass(slots=True)
class Ring:
    """target: the domain that `domid` acts for (SET_TARGET), or None; evtchn: the guest's own port."""

    domid: int
    target: int | None
    evtchn: int


@dataclass(slots=True)
class Socket:
    fd: int


@dataclass(slots=True)
class ConnectionData:
    """inbound: read and not looked at yet, at most INBOUND_MAX bytes. outbound: not sent yet; its first
    `partial` bytes are the rest of a message. unique_id: of a ring's domain, or None."""

    conn_id: int
    spec: Ring | Socket
    inbound: bytes = b""
    outbound: bytes = b""
    partial: int = 0
    unique_id: int | None = None


@dataclass(slots=True)
class WatchData:
    """path and token as the client gave them; depth: levels below the path that count, None for all."""

    conn_id: int
    path: bytes
    token: bytes
    depth: int | None = None


@dataclass(slots=True)
class TransactionData:
    conn_id: int
    tx_id: int


@dataclass(slots=True)
class NodeData:
    """A node of the store (conn_id 0), or as a transaction sees it.

    perms: (access bits, domid) as the engine has them, IGNORED for a stale one; the owner's first. None at
           all: the transaction found no such node, or (access 0) deleted it.
    """

    path: bytes
    value: bytes = b""
    perms: Perms = ()
    conn_id: int = 0
    tx_id: int = 0
    access: int = 0


@dataclass(slots=True)
class GlobalQuotaData:
    """Quotas by name; 0 is "no limit". of_domains: what a domain has that has none of its own."""

    of_domains: dict[str, int] = field(default_factory=dict)
    globally: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class DomainData:
    """features: bits as at offset 2064 of the ring page; None in a stream of version 1."""

    domid: int
    features: int | None
    quotas: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class RingPosition:
    """Of journals alone, after a ring's CONNECTION_DATA: where the page's indices stood. What the store read
    from the ring, and wrote to it, since then is known by them."""

    domid: int
    req_cons: int
    rsp_prod: int


Record = (
    GlobalData
    | ConnectionData
    | WatchData
    | TransactionData
    | NodeData
    | GlobalQuotaData
    | DomainData
    | RingPosition
)


class _Layouts:
    """The structs of one byte order."""

    __slots__ = ("conn", "domain", "global_", "head", "node", "pair", "perm", "quotas", "ring", "socket",
                 "three", "transaction", "unique", "watch")  # fmt: skip

    def __init__(self, order: str) -> None:
        self.head = struct.Struct(order + "II")
        self.global_ = struct.Struct(order + "ii")
        self.conn = struct.Struct(order + "IHH8sHHI")
        self.ring = struct.Struct(order + "HHI")
        self.socket = struct.Struct(order + "iI")
        self.unique = struct.Struct(order + "Q")
        self.watch = struct.Struct(order + "IHH")
        self.pair = struct.Struct(order + "HH")
        self.transaction = struct.Struct(order + "II")
        self.node = struct.Struct(order + "IIHHHH")
        self.perm = struct.Struct(order + "BBH")
        self.quotas = struct.Struct(order + "HH")
        self.domain = struct.Struct(order + "HHI")
        self.three = struct.Struct(order + "III")


_LAYOUTS = (_Layouts("<"), _Layouts(">"))
HEAD_SIZE = 8


# ---- writing ----


class Writer:
    """Records of one stream as bytes.

    version: 1 or 2; of version 1 are no depths of watches and no features
    big: big-endian
    """

    __slots__ = ("_perms", "_s", "big", "version")

    def __init__(self, version: int = 2, *, big: bool = False) -> None:
        if version not in VERSIONS:
            raise UsageError(f"version {version} of the record stream; there are 1 and 2")
        self.version = version
        self.big = big
        self._s = _LAYOUTS[big]
        self._perms: dict[Perms, bytes] = {}

    def header(self) -> bytes:
        return _PREAMBLE.pack(IDENT, self.version, int(self.big))

    def end(self) -> bytes:
        return self._s.head.pack(RecordType.END, 0)

    def stream(self, records: Iterable[Record]) -> Iterator[bytes]:
        """The whole stream, in pieces."""
        yield self.header()
        for record in records:
            yield self.record(record)
        yield self.end()

    def record(self, record: Record) -> bytes:
        """UsageError for what the layout has no room for."""
        if type(record) is NodeData:
            return self.node(record.path, record.value, record.perms, record)
        try:
            return _ENCODERS[type(record)](self, record)
        except struct.error as error:
            raise UsageError(f"no room in a record for {record}: {error}") from None

    def node(self, path: bytes, value: bytes, perms: Perms, pending: NodeData | None = None) -> bytes:
        """NODE_DATA; of the store itself unless `pending` says whose."""
        conn_id = tx_id = access = 0
        if pending is not None:
            conn_id, tx_id, access = pending.conn_id, pending.tx_id, pending.access
        entries = self._perms.get(perms)
        if entries is None:
            if len(self._perms) > 4096:
                self._perms.clear()
            pack = self._s.perm.pack
            entries = self._perms[perms] = b"".join(
                pack(_LETTER[access_bits & 3], 1 if access_bits & IGNORED else 0, domid)
                for access_bits, domid in perms
            )
        try:
            body = self._s.node.pack(conn_id, tx_id, len(path) + 1, len(value), access, len(perms))
        except struct.error as error:
            raise UsageError(f"no room in a record for node {path!r}: {error}") from None
        return self._framed(RecordType.NODE_DATA, b"".join((body, entries, path, b"\0", value)))

    def _framed(self, kind: int, body: bytes) -> bytes:
        # xenstored counts the padding into the length: "all records have a length of a multiple of 8".
        pad = -len(body) & 7
        return self._s.head.pack(kind, len(body) + pad) + body + bytes(pad)

    def _global(self, record: GlobalData) -> bytes:
        return self._framed(RecordType.GLOBAL_DATA, self._s.global_.pack(record.socket_fd, record.evtchn_fd))

    def _connection(self, record: ConnectionData) -> bytes:
        s, spec = self._s, record.spec
        if isinstance(spec, Ring):
            target = DOMID_INVALID if spec.target is None else spec.target
            kind, packed = 0, s.ring.pack(spec.domid, target, spec.evtchn)
        else:
            kind, packed = 1, s.socket.pack(spec.fd, 0)
        fields = record.unique_id is not None
        body = s.conn.pack(
            record.conn_id,
            kind,
            fields,
            packed,
            len(record.inbound),
            record.partial,
            len(record.outbound),
        )
        body += record.inbound + record.outbound
        if record.unique_id is not None:
            body += bytes(-len(body) & 7) + s.unique.pack(record.unique_id)
        return self._framed(RecordType.CONNECTION_DATA, body)

    def _watch(self, record: WatchData) -> bytes:
        head = self._s.watch.pack(record.conn_id, len(record.path) + 1, len(record.token) + 1)
        names = record.path + b"\0" + record.token + b"\0"
        if record.depth is None or self.version < 2:
            return self._framed(RecordType.WATCH_DATA, head + names)
        return self._framed(RecordType.WATCH_DATA_EXTENDED, head + self._s.pair.pack(record.depth, 0) + names)

    def _transaction(self, record: TransactionData) -> bytes:
        return self._framed(
            RecordType.TRANSACTION_DATA, self._s.transaction.pack(record.conn_id, record.tx_id)
        )

    def _quotas(self, record: GlobalQuotaData) -> bytes:
        head = self._s.quotas.pack(len(record.of_domains), len(record.globally))
        return self._framed(
            RecordType.GLOBAL_QUOTA_DATA,
            head
            + self._values(record.of_domains, record.globally)
            + _names(record.of_domains, record.globally),
        )

    def _domain(self, record: DomainData) -> bytes:
        features = record.features if self.version > 1 and record.features is not None else 0
        head = self._s.domain.pack(record.domid, len(record.quotas), features)
        return self._framed(
            RecordType.DOMAIN_DATA, head + self._values(record.quotas) + _names(record.quotas)
        )

    def _position(self, record: RingPosition) -> bytes:
        body = self._s.three.pack(record.domid, record.req_cons, record.rsp_prod)
        return self._framed(RING_POSITION, body)

    def _values(self, *quotas: dict[str, int]) -> bytes:
        values = [value for one in quotas for value in one.values()]
        return struct.pack(f"{'>' if self.big else '<'}{len(values)}I", *values)


def _names(*quotas: dict[str, int]) -> bytes:
    return b"".join(name.encode("ascii") + b"\0" for one in quotas for name in one)


_ENCODERS: dict[type, Callable[..., bytes]] = {
    GlobalData: Writer._global,
    ConnectionData: Writer._connection,
    WatchData: Writer._watch,
    TransactionData: Writer._transaction,
    GlobalQuotaData: Writer._quotas,
    DomainData: Writer._domain,
    RingPosition: Writer._position,
}


# ---- reading ----


class _Bad(Exception):
    """What is wrong with a record's body; Reader adds where."""


@dataclass(slots=True)
class Placed:
    """A record and where it stands: what load.py blames."""

    record: Record
    number: int
    kind: str
    offset: int

    def error(self, text: str) -> StateError:
        return StateError(text, self.number, self.kind, self.offset)


class Reader:
    """Records of a stream that starts at the head of `data`. StateError for a header that is none.

    offset: where the next record begins; after END, where the stream is over
    journal: set it when what follows is one's: RING_POSITION is a record then
    """

    __slots__ = ("_data", "_s", "big", "journal", "number", "offset", "version")

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).toreadonly()
        if len(self._data) < _PREAMBLE.size:
            raise StateError(f"{len(self._data)} bytes where a header of {_PREAMBLE.size} belongs")
        ident, version, flags = _PREAMBLE.unpack_from(self._data)
        if ident != IDENT:
            raise StateError(f"begins with {ident!r} and not with {IDENT!r}")
        if version not in VERSIONS:
            raise StateError(f"version {version}, known are 1 and 2")
        if flags > 1:
            raise StateError(f"unknown flags {flags:#x}")
        self.version = version
        self.big = bool(flags)
        self._s = _LAYOUTS[self.big]
        self.offset = _PREAMBLE.size
        self.number = 0
        self.journal = False

    def records(self, end: int | None = None) -> Iterator[Placed]:
        """Up to and without END, which must come before `end` (that of the data). Any number of times: what
        follows an END may be records again."""
        data, head = self._data, self._s.head
        stop = len(data) if end is None else end
        while True:
            at = self.offset
            if stop - at < HEAD_SIZE:
                text = "ends without an END" if stop == at else f"{stop - at} bytes where a record belongs"
                raise StateError(text, self.number, "none", at)
            kind, length = head.unpack_from(data, at)
            start = at + HEAD_SIZE
            padded = length + (-length & 7)
            name = _KINDS.get(kind, f"type {kind:#x}")
            if padded > stop - start:
                raise StateError(f"{length} bytes, but {stop - start} are left", self.number, name, at)
            self.offset = start + padded
            number, self.number = self.number, self.number + 1
            if kind == RecordType.END:
                if length:
                    raise StateError(f"has {length} bytes and should have none", number, name, at)
                return
            decoder = _DECODERS.get(kind)
            if decoder is None or (kind == RING_POSITION and not self.journal):
                raise StateError("no such record", number, name, at)
            try:
                record = decoder(self, bytes(data[start : start + length]))
            except _Bad as bad:
                raise StateError(str(bad), number, name, at) from None
            except struct.error:
                raise StateError(f"{length} bytes are too few", number, name, at) from None
            yield Placed(record, number, name, at)

    def finish(self) -> None:
        """StateError if anything follows END."""
        if self.offset != len(self._data):
            left = len(self._data) - self.offset
            raise StateError(f"{left} bytes after END", self.number, "none", self.offset)

    # Each gets a body; what is longer than it has to be, padding to 8 aside, is refused too.

    def _global(self, body: bytes) -> Record:
        _exact(body, self._s.global_.size)
        return GlobalData(*self._s.global_.unpack_from(body))

    def _connection(self, body: bytes) -> Record:
        s = self._s
        conn_id, kind, fields, packed, inbound, partial, outbound = s.conn.unpack_from(body)
        if not conn_id:
            raise _Bad("connection 0")
        if fields > 1:
            raise _Bad(f"unknown fields {fields:#x}")
        spec: Ring | Socket
        if kind == 0:
            domid, target, evtchn = s.ring.unpack(packed)
            spec = Ring(domid, None if target == DOMID_INVALID else target, evtchn)
        elif kind == 1:
            spec = Socket(s.socket.unpack(packed)[0])
        else:
            raise _Bad(f"connection type {kind}")
        if partial > outbound:
            raise _Bad(f"a partial response of {partial} bytes in {outbound}")
        start = s.conn.size
        middle, end = start + inbound, start + inbound + outbound
        unique = None
        if fields:
            at = end + (-end & 7)
            _exact(body, at + s.unique.size)
            (unique,) = s.unique.unpack_from(body, at)
        else:
            _exact(body, end)
        return ConnectionData(conn_id, spec, body[start:middle], body[middle:end], partial, unique)

    def _watch(self, body: bytes) -> Record:
        return self._any_watch(body, self._s.watch.size, None)

    def _watch_extended(self, body: bytes) -> Record:
        if self.version < 2:
            raise _Bad("of version 2, in a stream of version 1")
        depth, _ = self._s.pair.unpack_from(body, self._s.watch.size)
        start = self._s.watch.size + self._s.pair.size
        return self._any_watch(body, start, None if depth == DEPTH_ANY else depth)

    def _any_watch(self, body: bytes, start: int, depth: int | None) -> Record:
        conn_id, path_len, token_len = self._s.watch.unpack_from(body)
        if not conn_id:
            raise _Bad("connection 0")
        middle, end = start + path_len, start + path_len + token_len
        _exact(body, end)
        return WatchData(conn_id, _string(body[start:middle]), _string(body[middle:end]), depth)

    def _transaction(self, body: bytes) -> Record:
        _exact(body, self._s.transaction.size)
        conn_id, tx_id = self._s.transaction.unpack_from(body)
        if not conn_id or not tx_id:
            raise _Bad(f"transaction {tx_id} of connection {conn_id}")
        return TransactionData(conn_id, tx_id)

    def _node(self, body: bytes) -> Record:
        s = self._s
        conn_id, tx_id, path_len, value_len, access, count = s.node.unpack_from(body)
        at = s.node.size
        start = at + count * s.perm.size
        middle, end = start + path_len, start + path_len + value_len
        _exact(body, end)
        perms = []
        for letter, flags, domid in s.perm.iter_unpack(body[at:start]):
            bits = _ACCESS.get(letter)
            if bits is None or flags > 1:
                raise _Bad(f"permission {letter:#x} with flags {flags:#x}")
            perms.append((bits | IGNORED if flags else bits, domid))
        node = NodeData(_string(body[start:middle]), body[middle:end], tuple(perms), conn_id, tx_id, access)
        if not conn_id:
            node.tx_id = node.access = 0
        elif access > NodeAccess.READ | NodeAccess.WRITTEN:
            raise _Bad(f"access {access:#x}")
        elif not tx_id:
            raise _Bad(f"transaction 0 of connection {conn_id}")
        elif (not access or not perms) and (perms or node.value):
            raise _Bad(f"{node.path!r} is deleted, but has a value or permissions")
        return node

    def _quotas(self, body: bytes) -> Record:
        of_domains, globally = self._s.quotas.unpack_from(body)
        pairs = self._pairs(body, self._s.quotas.size, of_domains + globally)
        first, second = dict(pairs[:of_domains]), dict(pairs[of_domains:])
        if len(first) + len(second) != len(pairs):
            raise _Bad("a quota is named twice")
        return GlobalQuotaData(first, second)

    def _domain(self, body: bytes) -> Record:
        domid, count, features = self._s.domain.unpack_from(body)
        pairs = self._pairs(body, self._s.domain.size, count)
        quotas = dict(pairs)
        if len(quotas) != count:
            raise _Bad("a quota is named twice")
        return DomainData(domid, features if self.version > 1 else None, quotas)

    def _position(self, body: bytes) -> Record:
        _exact(body, self._s.three.size)
        return RingPosition(*self._s.three.unpack_from(body))

    def _pairs(self, body: bytes, start: int, count: int) -> list[tuple[str, int]]:
        order = ">" if self.big else "<"
        values = struct.unpack_from(f"{order}{count}I", body, start)
        names = body[start + 4 * count :].split(b"\0", count)
        if len(names) != count + 1 or len(names[-1]) > 7:
            raise _Bad(f"{count} quotas, but the names of {len(names) - 1}")
        try:
            texts = [name.decode("ascii") for name in names[:-1]]
        except UnicodeDecodeError:
            raise _Bad("the name of a quota is not ASCII") from None
        if "" in texts:
            raise _Bad("a quota without a name")
        return list(zip(texts, values, strict=True))


def _exact(body: bytes, size: int) -> None:
    """Whether what belongs into it is all there is; a writer may count the padding."""
    if len(body) < size:
        raise _Bad(f"{len(body)} bytes where {size} belong")
    if len(body) > size + (-size & 7):
        raise _Bad(f"{len(body)} bytes, {size} belong there")


def _string(raw: bytes) -> bytes:
    if not raw or raw.find(0) != len(raw) - 1:
        raise _Bad(f"{raw[:64]!r} is no NUL-terminated string")
    return raw[:-1]


_DECODERS: dict[int, Callable[[Reader, bytes], Record]] = {
    RecordType.GLOBAL_DATA: Reader._global,
    RecordType.CONNECTION_DATA: Reader._connection,
    RecordType.WATCH_DATA: Reader._watch,
    RecordType.TRANSACTION_DATA: Reader._transaction,
    RecordType.NODE_DATA: Reader._node,
    RecordType.GLOBAL_QUOTA_DATA: Reader._quotas,
    RecordType.DOMAIN_DATA: Reader._domain,
    RecordType.WATCH_DATA_EXTENDED: Reader._watch_extended,
    RING_POSITION: Reader._position,
}
_KINDS = {int(kind): kind.name for kind in RecordType} | {RING_POSITION: "RING_POSITION"}


def encode(records: Iterable[Record], version: int = 2, *, big: bool = False) -> bytes:
    """A whole stream."""
    return b"".join(Writer(version, big=big).stream(records))


def decode(data: bytes | memoryview) -> list[Record]:
    """Every record of a whole stream. StateError for anything that is none, what follows END included."""
    reader = Reader(data)
    records = [placed.record for placed in reader.records()]
    reader.finish()
    return records
