"""The messages between a domain process and the broker: layouts, sizes, strict decoding, no state.

One SOCK_SEQPACKET packet a message: a header, a fixed part, repeated parts. Descriptors ride along by
SCM_RIGHTS. Anything of another length than its layout says is a ProtocolError, and its sender is dropped.
"""

from __future__ import annotations

import array
import enum
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from xenbus.errors import HypervisorError, PeerError

MAGIC: Final = 0x58425553
VERSION: Final = 1
MESSAGE_MAX: Final = 128 * 1024
# net/unix: SCM_MAX_FD is 253.
FDS_MAX: Final = 200
# Kept free for a packet: a link has 3, a mapping one for each arena that is new to us, which is few.
RESERVE: Final = 8
MAP_ENTRIES_MAX: Final = 4096
ARENA_PAGES_MAX: Final = 65536
# Channels of one pair of handles, each way; the pending map of the pair has a byte for each.
LINK_PORTS: Final = 16384


class ProtocolError(PeerError):
    """The other side of a broker socket sent what no layout allows."""


class Op(enum.IntEnum):
    """Requests, then (from PORT on) what the broker says unasked, with serial 0."""

    HELLO = 1
    ALLOC = 2
    ARENA = 3
    REVOKE = 4
    MAP = 5
    UNMAP = 6
    PORT_ALLOC = 7
    PORT_BIND = 8
    PORT_CLOSE = 9
    START_INFO = 10
    SUSPEND = 11
    PORT = 32
    LINK_GONE = 33
    ARENA_GONE = 34
    DEAD = 35


class Layout:
    """A struct whose unpack refuses any other length."""

    __slots__ = ("_struct", "size")

    def __init__(self, fields: str) -> None:
        self._struct = struct.Struct("=" + fields)
        self.size = self._struct.size

    def pack(self, *values: int) -> bytes:
        return self._struct.pack(*values)

    def unpack(self, data: bytes) -> tuple[int, ...]:
        if len(data) != self.size:
            raise ProtocolError(f"{len(data)} bytes where {self.size} belong")
        return self._struct.unpack(data)

    def unpack_from(self, data: bytes, offset: int = 0) -> tuple[int, ...]:
        if len(data) < offset + self.size:
            raise ProtocolError(f"{len(data)} bytes where at least {offset + self.size} belong")
        return self._struct.unpack_from(data, offset)

    def each(self, data: bytes, offset: int, count: int) -> Iterator[tuple[int, ...]]:
        if len(data) < offset + count * self.size:
            raise ProtocolError(f"{count} entries do not fit {len(data)} bytes")
        return self._struct.iter_unpack(memoryview(data)[offset : offset + count * self.size])


HEADER: Final = Layout("HHI")  # op, errno (0 in requests and successes), serial
HELLO: Final = Layout("II")  # magic, version
WELCOME: Final = Layout("HH")  # domid, privileged
ALLOC: Final = Layout("HHI")  # grantee, writable, pages
ALLOCATED: Final = Layout("II")  # the arena's first ref, the first ref of the run
ARENA: Final = Layout("HHI")  # grantee, writable, pages; one descriptor
REF: Final = Layout("I")
REVOKE: Final = Layout("II")  # first ref, pages
MAP: Final = Layout("HH")  # strict (all or nothing), entries
MAP_ENTRY: Final = Layout("HHII")  # domid, writable, first ref, pages
MAPPED: Final = Layout("III")  # id of the mapping, slots, new arenas; a descriptor for each of these
SLOT: Final = Layout("IIII")  # errno, arena, first page, pages
NEW_ARENA: Final = Layout("III")  # arena, pages, writable
MAP_ID: Final = Layout("I")
DOMID: Final = Layout("I")
PORT: Final = Layout("I")
BIND: Final = Layout("II")  # remote domid, remote port
# port, link (0: unbound), index, side, whether the three descriptors of the link ride along
PORT_STATE: Final = Layout("IIIHH")
STARTED: Final = Layout("II")  # ref, port; the page's descriptor
SUSPENDED: Final = Layout("HH")  # cancelled, domid
LINK: Final = Layout("I")


@dataclass(slots=True, frozen=True)
class Message:
    """One packet. The receiver owns `fds`."""

    op: int
    status: int
    serial: int
    payload: bytes
    fds: tuple[int, ...] = ()


def encode(op: int, serial: int, payload: bytes = b"", status: int = 0) -> bytes:
    return HEADER.pack(op, status, serial) + payload


def refused(status: int, what: str) -> HypervisorError:
    """The exception for an errno that the broker answered."""
    return HypervisorError(errno.errorcode.get(status, str(status)), what)


def check_ref(ref: int) -> int:
    """`ref` if a layout can hold it; HypervisorError ENOENT otherwise, for there is no such grant."""
    if not 0 <= ref < 1 << 32:
        raise HypervisorError("ENOENT", f"grant {ref}")
    return ref


def runs_of(refs: Sequence[int]) -> list[tuple[int, int]]:
    """Refs as (first, count) of consecutive ones, the shape of MAP_ENTRY."""
    runs: list[tuple[int, int]] = []
    for ref in refs:
        if runs and runs[-1][0] + runs[-1][1] == ref and runs[-1][1] < ARENA_PAGES_MAX:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((check_ref(ref), 1))
    return runs


class Reserve:
    """Descriptors set aside, so that those of a packet always find room.

    A process that has none free loses them without a word but MSG_CTRUNC (unix(7)): the packet is spoilt, and
    with it the connection. Lent for the receiving, filled again once the packet's were used.
    """

    __slots__ = ("_fds", "_wanted")

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._fds: list[int] = []
        self.fill()

    def fill(self) -> bool:
        """False: this process is out of descriptors."""
        try:
            while len(self._fds) < self._wanted:
                self._fds.append(os.eventfd(0, os.EFD_CLOEXEC))
        except OSError:
            return False
        return True

    def lend(self) -> None:
        close_all(self._fds)
        self._fds.clear()

    def close(self) -> None:
        self._wanted = 0
        self.lend()


class Receiver:
    """Takes packets off a non-blocking socket into one buffer of its own.

    reserve: lent for each packet; whoever uses the packet's descriptors fills it again
    """

    __slots__ = ("_ancillary", "_buffer", "_reserve", "_sock", "_view")

    def __init__(self, sock: socket.socket, max_fds: int, reserve: Reserve | None = None) -> None:
        self._sock = sock
        self._reserve = reserve
        self._buffer = bytearray(MESSAGE_MAX)
        self._view = memoryview(self._buffer)
        self._ancillary = socket.CMSG_SPACE(max_fds * 4)

    def receive(self) -> Message | None:
        """The next message, None at end of file. BlockingIOError when there is none yet, ProtocolError for a
        packet that is too long, has too many descriptors, or is too short for a header."""
        if self._reserve is not None:
            self._reserve.lend()
        try:
            count, ancillary, flags, _ = self._sock.recvmsg_into(
                [self._buffer], self._ancillary, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            if self._reserve is not None:
                self._reserve.fill()
            raise
        fds = _descriptors(ancillary)
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError("a packet too long, or with more descriptors than were free here")
            if count == 0:
                if fds:
                    raise ProtocolError("an empty packet")
                return None
            data = bytes(self._view[:count])
            op, status, serial = HEADER.unpack_from(data)
        except ProtocolError:
            close_all(fds)
            raise
        return Message(op, status, serial, data[HEADER.size :], fds)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> tuple[int, ...]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return tuple(fds)


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """One packet. BlockingIOError when the other side's buffer is full."""
    if fds:
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    else:
        sock.send(data)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
