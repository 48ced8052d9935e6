"""The message on the wire: header, operations, an incremental parser. No I/O.

Knows xs_wire.h and nothing else: not what an operation means (codecs.py) nor who speaks.
Source: xen/include/public/io/xs_wire.h, struct xsd_sockmsg and enum xsd_sockmsg_type.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from xenbus.errors import PeerError, UsageError

HEADER = Struct("<IIII")
HEADER_SIZE = HEADER.size
PAYLOAD_MAX = 4096
# A reply may be larger (oxenstored has sent a DIRECTORY of 6600 bytes): up to here a client takes it.
REPLY_CAP = 1 << 20

_pack_header = HEADER.pack
_unpack_header = HEADER.unpack_from


class Op(IntEnum):
    """enum xsd_sockmsg_type; 20 (RESTRICT) was removed and is answered with ENOSYS."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESTRICT = 20
    RESET_WATCHES = 21
    DIRECTORY_PART = 22
    GET_FEATURE = 23
    SET_FEATURE = 24
    GET_QUOTA = 25
    SET_QUOTA = 26


_OP_NAMES = {int(op): op.name for op in Op}


def op_name(op: int) -> str:
    """The operation's name, or its number if it has none."""
    return _OP_NAMES.get(op, str(op))


class ProtocolError(PeerError):
    """The byte stream cannot be followed any further. `messages` were complete before the bad one."""

    def __init__(self, text: str, messages: list[Message] | None = None) -> None:
        super().__init__(text)
        self.messages = messages or []


@dataclass(slots=True)
class Message:
    """One message. `op` is a plain int: a peer may send a number that `Op` does not have."""

    op: int
    req_id: int
    tx_id: int
    payload: bytes

    def encode(self) -> bytes:
        return encode(self.op, self.req_id, self.tx_id, self.payload)

    def __str__(self) -> str:
        return f"{op_name(self.op)} req {self.req_id} tx {self.tx_id} {self.payload!r}"


def encode(op: int, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """Header and payload as bytes. UsageError for a payload over PAYLOAD_MAX: it would close the socket."""
    length = len(payload)
    if length > PAYLOAD_MAX:
        raise UsageError(f"{op_name(op)}: payload of {length} bytes, the limit is {PAYLOAD_MAX}")
    return _pack_header(op, req_id, tx_id, length) + payload


def next_begin(data: bytes, begin: int, at: int) -> int:
    """Where the first message at `at` or behind it begins, or would; one begins at `begin`."""
    while begin < at:
        begin += HEADER_SIZE + _unpack_header(data, begin)[3]
    return begin


class Parser:
    """Bytes in, messages out. What is incomplete waits inside, never more than header + `limit` bytes
    plus the last piece fed; a message in pieces is copied a constant number of times.

    limit: largest payload accepted, bytes. A client allows REPLY_CAP.
    """

    __slots__ = ("_need", "_pending", "limit")

    def __init__(self, limit: int = PAYLOAD_MAX) -> None:
        self.limit = limit
        self._pending = bytearray()
        self._need = HEADER_SIZE

    @property
    def buffered(self) -> int:
        """Bytes of an incomplete message that are held."""
        return len(self._pending)

    @property
    def rest(self) -> bytes:
        """The beginning of a message that is held."""
        return bytes(self._pending)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """Every message completed by `data`, in order. ProtocolError (each time, from then on) for a
        payload length over the limit; its `messages` are those completed before."""
        pending = self._pending
        if pending:
            pending += data
            if len(pending) < self._need:
                return []
            data = bytes(pending)
            pending.clear()
        elif type(data) is not bytes:
            data = bytes(data)
        messages: list[Message] = []
        append = messages.append
        position, size, limit = 0, len(data), self.limit
        need = HEADER_SIZE
        while size - position >= HEADER_SIZE:
            op, req_id, tx_id, length = _unpack_header(data, position)
            if length > limit:
                pending += data[position : position + HEADER_SIZE]
                raise ProtocolError(f"{op_name(op)}: payload of {length} bytes, over {limit}", messages)
            start = position + HEADER_SIZE
            end = start + length
            if end > size:
                need = HEADER_SIZE + length
                break
            append(Message(op, req_id, tx_id, data[start:end]))
            position = end
        self._need = need
        if position < size:
            pending += data[position:]
        return messages
