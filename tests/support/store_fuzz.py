"""Bad input for the store, a case at a time: bytes in; AssertionError unless they were answered as they must.

What hypothesis, the seeds and atheris share. A target is `target(data: bytes) -> None`: `wire` is a stream
of requests to the engine, `codecs` a payload and `client` a stream for our own parsers, `state` a saved
store, `recording` a line of what passed.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from math import inf
from pathlib import Path

from tests.support.engine_talk import Talk, guest
from xenbus.errors import WIRE_ERRORS, PeerError, StoreError, UsageError
from xenbus.xenstore.calls import Call
from xenbus.xenstore.engine import OXENSTORED, XENSTORED, Connection, Engine, Profile
from xenbus.xenstore.session import Session as ClientSession
from xenbus.xenstore.session import WatchRecord
from xenbus.xenstore.state.journal import replay
from xenbus.xenstore.state.load import load, read
from xenbus.xenstore.state.records import StateError
from xenbus.xenstore.transport.recording import Record
from xenbus.xenstore.wire import CODECS, HEADER, Message, Op, Parser, ProtocolError, parse_error

# oxenstored has one of its own.
NAMES = {*WIRE_ERRORS, "EQUOTA"}
SEEDS = Path(__file__).parents[1] / "xenstore" / "fuzz" / "seeds"
EVIL, GOOD = 5, 6
# Who sends the stream, by the lowest bit of its first byte.
SENDERS = (0, EVIL)
# Bytes a piece, by the rest of that byte; 0: all at once.
PIECES = (0, 1, 7, 16, 17, 100, 1024, 4096)


def seeds(target: str) -> list[Path]:
    """The kept cases of a target: recordings, and every input that once found something."""
    return sorted((SEEDS / target).iterdir())


class Bystander:
    """Somebody else, who does work whose answers are known, and who must never notice anything."""

    def __init__(self, engine: Engine, talk: Talk, home: str, *, private: bool) -> None:
        self.engine, self.talk, self.home, self.private = engine, talk, home, private
        self.rounds = 0
        talk.write(f"{home}/n", "0")
        talk.watch(f"{home}/n", "mine")

    def work(self) -> None:
        """A write, its event, a read, a list, and a transaction."""
        talk, path = self.talk, f"{self.home}/n"
        self.rounds += 1
        value = b"%d" % self.rounds
        talk.seen()
        talk.write(path, value)
        if self.private:
            assert talk.seen() == [path]
        assert talk.read(path) == value
        assert "n" in talk.ls(self.home)
        tx = talk.start()
        assert talk.read(path, tx) == value
        talk.write(path, value + b"!", tx)
        assert talk.end(tx) == ""
        assert talk.read(path) == value + b"!"
        talk.seen()


def _outside(engine: Engine) -> dict[bytes, tuple[bytes, object]]:
    """Every node but the sender's own and the bystanders'."""
    mine = (b"/local/domain/%d" % EVIL, b"/local/domain/%d/n" % GOOD, b"/bystander")
    return {
        path: (node.value, node.perms)
        for path, node in engine.nodes.items()
        if not any(path == top or path.startswith(top + b"/") for top in mine)
    }


def check_replies(message: Message, got: list[Message]) -> None:
    """One answer by name, under the request's own numbers; events beside it carry none."""
    replies = [one for one in got if one.op != Op.WATCH_EVENT]
    assert len(replies) == 1, (message, got)
    (reply,) = replies
    assert (reply.req_id, reply.tx_id) == (message.req_id, message.tx_id), (message, reply)
    if reply.op == Op.ERROR:
        assert reply.payload.endswith(b"\0") and parse_error(reply.payload) in NAMES, (message, reply)
    else:
        assert reply.op == message.op, (message, reply)
    assert all((one.req_id, one.tx_id) == (0, 0) for one in got if one.op == Op.WATCH_EVENT)


def feed(parser: Parser, data: bytes, size: int) -> tuple[list[Message], bool]:
    """The messages of `data` in pieces of `size` bytes, and whether the stream broke."""
    messages: list[Message] = []
    for start in range(0, len(data), size or len(data) or 1):
        try:
            messages += parser.feed(data[start : start + size] if size else data)
        except ProtocolError as error:
            return messages + error.messages, True
    return messages, False


def wire(data: bytes, profile: Profile = XENSTORED) -> None:
    """A stream of requests from a guest or from domain 0, and what else there is in the store meanwhile."""
    if not data:
        return
    domid, size = SENDERS[data[0] & 1], PIECES[data[0] >> 1 & 7]
    engine = Engine(profile=profile)
    dom0 = Talk(engine)
    good = guest(engine, dom0, GOOD)
    guest(engine, dom0, EVIL)
    bystanders = [Bystander(engine, Talk(engine), "/bystander", private=True)]
    if domid:
        # What domain 0 sends may well be meant for this guest.
        bystanders.append(Bystander(engine, good, f"/local/domain/{GOOD}", private=True))
    before = _outside(engine)
    conn = engine.connect(domid)
    messages, broken = feed(Parser(), data[1:], size)
    whole, broken_whole = feed(Parser(), data[1:], 0)
    assert (messages, broken) == (whole, broken_whole), "it matters where the stream was cut"
    for message in messages:
        engine.handle(conn, message)
        check_replies(message, Parser().feed(conn.take()))
        for one in bystanders:
            one.work()
    engine.disconnect(conn)
    settled(engine, conn)
    if domid:
        assert _outside(engine) == before


def oxenstored(data: bytes) -> None:
    """The same to the other profile."""
    wire(data, OXENSTORED)


def settled(engine: Engine, conn: Connection) -> None:
    """Nothing of a connection that has ended is left."""
    assert engine.check() == []
    assert conn not in engine.take_dirty()
    assert not any(node.snaps for node in engine.nodes.values()), (
        "a node is held for a transaction that ended"
    )
    assert not any(watch.conn.closed for bucket in engine.watches.by_path.values() for watch in bucket), (
        "a watch of somebody who went"
    )
    assert (conn.queued, conn.replies, conn.causing, len(conn.transactions)) == (0, 0, 0, 0)


def codecs(data: bytes) -> None:
    """A payload for each operation, as a request and as a reply; what can be read is written the same."""
    for codec in CODECS.values():
        try:
            arguments = codec.parse_request(data)
        except UsageError:
            pass
        else:
            try:
                again = codec.request(*arguments)
            except UsageError:
                continue
            assert codec.parse_request(again) == arguments
        try:
            codec.parse_reply(data)
        except PeerError:
            pass


def state(data: bytes) -> None:
    """A saved store: StateError, or an engine that is consistent, works and lets go of its connections."""
    for read_it in (lambda: read(data), lambda: replay(data).image):
        try:
            store = load(read_it(), Engine)
        except StateError:
            continue
        engine = store.engine
        assert engine.check() == []
        Bystander(engine, Talk(engine), "/bystander", private=False).work()
        for restored in store.connections:
            Parser(limit=1 << 30).feed(restored.conn.take())
            engine.disconnect(restored.conn)
        for restored in store.connections:
            settled(engine, restored.conn)


def recording(data: bytes) -> None:
    """A line of a recording: UsageError, or a message that is written as it was read."""
    try:
        record = Record.decode(data.decode("ascii", "replace"))
    except UsageError:
        return
    assert Record.decode(record.encode()).message == record.message
    with suppress(UsageError):  # what was too long passed all the same
        record.message.encode()


class _Slot:
    def __init__(self) -> None:
        self.result: object = None

    def done(self) -> bool:
        return self.result is not None

    def set_result(self, result: bytes) -> None:
        self.result = result

    def set_exception(self, exception: Exception) -> None:
        self.result = exception


def client(data: bytes) -> None:
    """A stream from a store that lies, to our client: every waiter is told, PeerError is all it raises."""
    session = ClientSession("a liar", 64)
    slots = [_Slot() for _ in CODECS]
    session.watches[1] = WatchRecord("/w", 1, lambda path: None)
    for slot, (op, codec) in zip(slots, CODECS.items(), strict=True):
        session.submit(Call(op, "/a", b"/a\0", codec.parse_reply), slot, inf, inf)
    try:
        for start in range(0, len(data), 64):
            session.receive(data[start : start + 64])
    except PeerError as error:
        session.drop_all(error)
    for slot, (op, codec) in zip(slots, CODECS.items(), strict=True):
        if isinstance(slot.result, bytes):
            try:
                codec.parse_reply(slot.result)
            except PeerError:
                pass
        else:
            assert slot.result is None or isinstance(slot.result, (PeerError, StoreError, ConnectionError)), (
                op
            )
    session.drop_all(PeerError("the end"))
    assert all(slot.done() for slot in slots)
    assert set(session.counts().values()) == {0}


def framed(op: int, payload: bytes, *, req_id: int = 1, tx_id: int = 0, length: int | None = None) -> bytes:
    """A message whose length may lie."""
    return HEADER.pack(op, req_id, tx_id, len(payload) if length is None else length) + payload


def flip(data: bytes, bit: int) -> bytes:
    """One bit the other way."""
    if not data:
        return data
    at = bit // 8 % len(data)
    return data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1 :]


def lengthen(data: bytes, at: int, length: int) -> bytes:
    """A lie in the length of the message that starts at or before `at`."""
    start = 0
    while start + 16 <= len(data):
        (size,) = struct.unpack_from("<I", data, start + 12)
        if start <= at < start + 16 + size:
            return data[: start + 12] + struct.pack("<I", length & 0xFFFFFFFF) + data[start + 16 :]
        start += 16 + size
    return data
