"""A store's file: a stream, and behind its END the changes since, in batches. Pure: bytes in, bytes out.

Knows the engine and records; who writes the bytes, and when, is daemon/keeper.py's business. A batch counts
whole or not at all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

from xenbus.xenstore.engine import XENSTORED, Connection, Engine, Hooks, Profile, Quotas
from xenbus.xenstore.engine.transactions import Transaction
from xenbus.xenstore.engine.tree import Node, child_path, parent_of
from xenbus.xenstore.state.dump import Held, connection, domain_data, dump, unserved, watches
from xenbus.xenstore.state.image import Image
from xenbus.xenstore.state.records import (
    ConnectionData,
    GlobalQuotaData,
    Reader,
    Record,
    Ring,
    RingPosition,
    StateError,
    Writer,
)
from xenbus.xenstore.wire import Message, Op

# magic, number of the batch, bytes of records, CRC of number, length and records. Number 0, without records,
# stands behind the stream: its CRC is the stream's.
FRAME = struct.Struct("<4sIII")
MAGIC = b"XSJB"
_NUMBERS = struct.Struct("<II")
# Batch 1 is part of a snapshot: what a stream has no record for.
FIRST_BATCH = 2
_REWATCHING = frozenset({Op.WATCH, Op.UNWATCH, Op.RESET_WATCHES})
_RELISTING = frozenset({Op.RELEASE, Op.SET_TARGET, Op.SET_FEATURE, Op.SET_QUOTA, Op.CONTROL})
# The beginnings of CONTROL words that do not.
_HARMLESS = (b"chec", b"log\0", b"memr", b"prin", b"help", b"live")


# ---- what changed ----


class JournaledEngine(Engine):
    """An engine that notes what changes, until `Journal.batch` takes it.

    changed: nodes; removed: those that went, though they may be back; guests: domids whose ring or watches
             changed; relisted: domains, quotas or features did
    """

    def __init__(
        self, quotas: Quotas | None = None, hooks: Hooks | None = None, profile: Profile = XENSTORED
    ) -> None:
        self.changed: dict[bytes, None] = {}
        self.removed: dict[bytes, None] = {}
        self.guests: dict[int, None] = {}
        self.relisted = False
        super().__init__(quotas, hooks, profile)

    def handle(self, conn: Connection, message: Message) -> None:
        super().handle(conn, message)
        op = message.op
        if op in _REWATCHING:
            if conn.guest:
                self.guests[conn.domid] = None
        elif op in _RELISTING and 0 in conn.ids and message.payload[:4] not in _HARMLESS:
            self.relisted = True

    def reset(self, conn: Connection) -> None:
        if conn.guest:
            self.guests[conn.domid] = None
        super().reset(conn)

    # Nodes

    def modify(self, tx: Transaction | None, path: bytes, node: Node) -> Node:
        if tx is None:
            self.changed[path] = None
        return super().modify(tx, path, node)

    def put(self, tx: Transaction | None, path: bytes, node: Node) -> None:
        if tx is None:
            self.changed.pop(path, None)
            self.changed[path] = None
        super().put(tx, path, node)

    def remove(self, tx: Transaction | None, path: bytes, node: Node) -> None:
        if tx is None:
            self.removed[path] = None
        super().remove(tx, path, node)

    def noted(self, path: bytes, *, made: bool = False, gone: bool = False) -> None:
        if gone:
            self.removed[path] = None
            return
        if made:
            self.changed.pop(path, None)
        self.changed[path] = None

    def commit(self, source: Connection, tx: Transaction) -> None:
        made: dict[bytes, None] = {}
        for path, entry in tx.accessed.items():
            if not entry.modified:
                continue
            if entry.node is None:
                self.removed[path] = None
            elif entry.base is None:
                made[path] = None
            else:
                self.changed[path] = None
        super().commit(source, tx)
        for path in self._as_listed(made):
            self.changed.pop(path, None)
            self.changed[path] = None

    def _as_listed(self, made: dict[bytes, None]) -> Iterator[bytes]:
        """Siblings as their parent lists them."""
        families: dict[bytes, list[bytes]] = {}
        for path in made:
            families.setdefault(parent_of(path), []).append(path)
        for above, paths in families.items():
            if len(paths) > 1:
                listed = (child_path(above, name) for name in self.nodes[above].children or ())
                yield from (path for path in listed if path in made)
            else:
                yield from paths

    # Domains

    def introduced(self, domid: int) -> None:
        self.relisted = True
        super().introduced(domid)

    def domain_died(self, domid: int) -> None:
        self.relisted = True
        super().domain_died(domid)


def _depth(path: bytes) -> int:
    return path.count(b"/")


# ---- writing ----


class Rings(Protocol):
    """What a journal needs to know of those who serve rings."""

    def held(self, domid: int) -> Held | None:
        """None: the domain has no ring that works."""
        ...

    def all_held(self) -> Iterable[Held]: ...
    def position(self, domid: int) -> RingPosition | None: ...


class Journal:
    """Bytes for the file of one engine: `snapshot()` begins one, and behind it come `frame(n, batch())`, n
    from FIRST_BATCH on."""

    def __init__(self, engine: JournaledEngine, rings: Rings) -> None:
        self._engine = engine
        self._rings = rings
        self._writer = Writer()
        self._end = self._writer.end()

    def snapshot(self) -> bytes:
        """A whole new file. Nothing has changed since."""
        held = list(self._rings.all_held())
        write = self._writer.record
        stream = b"".join(self._writer.stream(dump(self._engine, held, transactions=False)))
        positions = (self._rings.position(one.conn.domid) for one in held)
        records = b"".join(write(position) for position in positions if position is not None)
        self._forget()
        return stream + FRAME.pack(MAGIC, 0, 0, crc32(stream)) + frame(1, records + self._end)

    def _forget(self) -> None:
        engine = self._engine
        engine.changed.clear()
        engine.removed.clear()
        engine.guests.clear()
        engine.relisted = False

    @property
    def dirty(self) -> bool:
        engine = self._engine
        return bool(engine.changed or engine.removed or engine.guests or engine.relisted)

    def batch(self) -> bytes:
        """Records of what changed since the last call, END included; without a frame. Call it if `dirty`."""
        engine, changed = self._engine, self._engine.changed
        if len(changed) == 1 and not (engine.removed or engine.guests or engine.relisted):
            (path,) = changed
            node = engine.nodes[path]
            changed.clear()
            return self._writer.node(path, node.value, node.perms) + self._end
        write = self._writer.record
        data = b"".join([*self._nodes(), *map(write, self._domains()), self._end])
        self._forget()
        return data

    def _nodes(self) -> Iterator[bytes]:
        engine, node = self._engine, self._writer.node
        tree, removed = engine.nodes, engine.removed
        for path in removed:
            if parent_of(path) not in removed:
                yield node(path, b"", ())
        # What is new needs its parent.
        for path in sorted(engine.changed, key=_depth):
            found = tree.get(path)
            if found is not None:
                yield node(path, found.value, found.perms)

    def _domains(self) -> Iterator[Record]:
        engine, rings = self._engine, self._rings
        if engine.relisted:
            yield GlobalQuotaData(engine.quotas.as_dict())
            yield from (domain_data(engine, domain) for domain in engine.domains.values() if domain.guest)
            held = list(rings.all_held())
            yield from unserved(engine, {one.conn.domain for one in held})
        else:
            held = []
            for domid in engine.guests:
                one = rings.held(domid)
                if one is not None:
                    held.append(one)
                elif (domain := engine.domains.get(domid)) is not None and domain.introduced:
                    yield ConnectionData(domid, Ring(domid, domain.target, 0))
        numbers = {one.conn: one.conn.domid for one in held}
        for one in held:
            yield connection(one, one.conn.domid)
            position = rings.position(one.conn.domid)
            if position is not None:
                yield position
        yield from watches(numbers)


def frame(number: int, records: bytes) -> bytes:
    """A batch as it goes behind the last one."""
    crc = crc32(records, crc32(_NUMBERS.pack(number, len(records))))
    return FRAME.pack(MAGIC, number, len(records), crc) + records


# ---- reading ----


@dataclass(slots=True)
class Replayed:
    """image: what it amounts to; good: bytes that are whole; torn: what is wrong with the rest, or ""."""

    image: Image
    good: int
    torn: str


def replay(data: bytes) -> Replayed:
    """A file as `Journal` writes it, or a stream alone. A batch at the end that is not whole is torn off.
    StateError for anything else."""
    image = Image()
    reader = Reader(data)
    image.add(reader.records())
    end = reader.offset
    if end == len(data):
        return Replayed(image, end, "")
    if FRAME.unpack_from(data.ljust(end + FRAME.size, b"\0"), end) != (MAGIC, 0, 0, crc32(data[:end])):
        raise StateError("the stream is damaged: its checksum is another", reader.number, "END", end)
    at, number = end + FRAME.size, 1
    reader.journal = True
    while at < len(data):
        size = _whole(data, at, number)
        if size is None:
            later = _later(data, at, number)
            if later is not None:
                raise StateError(
                    f"damaged, but batch {later[0]} at byte {later[1]} is not", number, "batch", at
                )
            return Replayed(image, at, f"batch {number} at byte {at} is not whole: {len(data) - at} bytes")
        reader.offset = at + FRAME.size
        at, number = at + FRAME.size + size, number + 1
        image.change(reader.records(at))
        if reader.offset != at:
            raise StateError(f"{at - reader.offset} bytes after END", reader.number, "none", reader.offset)
    return Replayed(image, at, "")


def _whole(data: bytes, at: int, number: int) -> int | None:
    """How many bytes of records batch `number` has, if it is at `at` and whole."""
    if len(data) - at < FRAME.size:
        return None
    magic, found, size, crc = FRAME.unpack_from(data, at)
    start = at + FRAME.size
    if magic != MAGIC or found != number or size > len(data) - start:
        return None
    payload = memoryview(data)[start : start + size]
    return size if crc32(payload, crc32(_NUMBERS.pack(number, size))) == crc else None


def _later(data: bytes, at: int, number: int) -> tuple[int, int] | None:
    """(number, offset) of a whole batch after a damaged one."""
    found = data.find(MAGIC, at + 1)
    while found >= 0:
        if len(data) - found >= FRAME.size:
            (other,) = struct.unpack_from("<I", data, found + 4)
            if other > number and _whole(data, found, other) is not None:
                return other, found
        found = data.find(MAGIC, found + 1)
    return None
