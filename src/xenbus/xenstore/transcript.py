"""A recording as people and programs read it: what was asked, and what each answer was to. No I/O.

Knows records and the payload grammar; not where the records come from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from xenbus.errors import PeerError, UsageError
from xenbus.xenstore.transport.recording import Record
from xenbus.xenstore.wire.codecs import CODECS, parse_error, parse_event
from xenbus.xenstore.wire.message import Message, Op, op_name

# What the arguments are called, for programs.
_NAMES: dict[int, tuple[str, ...]] = {
    Op.WRITE: ("path", "value"),
    Op.SET_PERMS: ("path", "perms"),
    Op.WATCH: ("path", "token", "depth"),
    Op.UNWATCH: ("path", "token"),
    Op.TRANSACTION_END: ("commit",),
    Op.DIRECTORY_PART: ("path", "offset"),
    Op.INTRODUCE: ("domid", "gfn", "port"),
    Op.SET_TARGET: ("domid", "target"),
    Op.SET_FEATURE: ("domid", "bits"),
    Op.GET_QUOTA: ("name", "domid"),
    Op.SET_QUOTA: ("name", "value", "domid"),
    **dict.fromkeys((Op.DIRECTORY, Op.READ, Op.GET_PERMS, Op.MKDIR, Op.RM), ("path",)),
    **dict.fromkeys((Op.RELEASE, Op.GET_DOMAIN_PATH, Op.IS_DOMAIN_INTRODUCED, Op.RESUME), ("domid",)),
    Op.GET_FEATURE: ("domid",),
}


@dataclass(slots=True, frozen=True)
class Line:
    """One message, understood as far as it can be.

    kind:      "request", "reply", "error", "event"
    arguments: a request's, by name; an event's path and token
    result:    a reply's, as the client would have it
    error:     the name on the wire
    raw:       the payload, where it is not what its operation has
    asked:     the request that a reply or an error is to; None if the recording does not have it
    took:      seconds since then
    """

    record: Record
    kind: str
    op: str
    arguments: dict[str, Any]
    result: Any = None
    error: str = ""
    raw: bytes | None = None
    asked: Line | None = None
    took: float = 0.0


def explain(records: Iterable[Record]) -> Iterator[Line]:
    # libxenstore gives every request the same id: the first one that waits is the one that is answered.
    waiting: dict[tuple[int, int], deque[Line]] = {}
    for record in records:
        message = record.message
        key = record.connection, message.req_id
        if record.outgoing:
            line = _request(record, message)
            waiting.setdefault(key, deque()).append(line)
            yield line
        elif message.op == Op.WATCH_EVENT:
            yield _event(record, message)
        else:
            asked = waiting.get(key)
            yield _reply(record, message, asked.popleft() if asked else None)


def _request(record: Record, message: Message) -> Line:
    op = op_name(message.op)
    codec = CODECS.get(message.op)
    try:
        if codec is None:
            raise UsageError("no operation")
        values = codec.parse_request(message.payload)
    except UsageError:
        return Line(record, "request", op, {}, raw=message.payload)
    if message.op == Op.CONTROL:
        return Line(record, "request", op, {"words": list(values)})
    names = _NAMES.get(message.op, ())
    found = {name: value for name, value in zip(names, values, strict=False) if value is not None}
    return Line(record, "request", op, found)


def _event(record: Record, message: Message) -> Line:
    try:
        path, token = parse_event(message.payload)
    except PeerError:
        return Line(record, "event", "WATCH_EVENT", {}, raw=message.payload)
    return Line(record, "event", "WATCH_EVENT", {"path": path, "token": token})


def _reply(record: Record, message: Message, asked: Line | None) -> Line:
    took = record.seconds - asked.record.seconds if asked is not None else 0.0
    op = asked.op if asked is not None else op_name(message.op)
    if message.op == Op.ERROR:
        return Line(record, "error", op, {}, error=parse_error(message.payload), asked=asked, took=took)
    try:
        codec = CODECS.get(message.op)
        if codec is None or (asked is not None and asked.record.message.op != message.op):
            raise PeerError("another operation's")
        result = codec.parse_reply(message.payload)
    except PeerError:
        return Line(record, "reply", op_name(message.op), {}, raw=message.payload, asked=asked, took=took)
    return Line(record, "reply", op, {}, result=result, asked=asked, took=took)
