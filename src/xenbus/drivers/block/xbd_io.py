"""The request side of a disk: I/O in, requests onto the ring, responses off it. Synchronous but for growing.

Knows one ring, one event channel and one pool of granted pages at a time; knows no store and no states.
I/O outlives a connection: what was in flight when one ended goes out again on the next one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from xenbus.drivers.block.blkif import (
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_OKAY,
    PAGE_SIZE,
    SECTOR_SHIFT,
    SECTOR_SIZE,
    SEGMENT_SIZE,
    Abi,
    Op,
)
from xenbus.drivers.block.xbd_pool import Bin, Buffer, Pool
from xenbus.errors import PeerError, XenbusError
from xenbus.hypervisor.interface import Channel
from xenbus.ring.shared import FrontRing

READ: Final = int(Op.READ)
WRITE: Final = int(Op.WRITE)
WRITE_BARRIER: Final = int(Op.WRITE_BARRIER)
FLUSH: Final = int(Op.FLUSH_DISKCACHE)
DISCARD: Final = int(Op.DISCARD)
INDIRECT: Final = int(Op.INDIRECT)
OP_NAMES: Final = {
    READ: "read",
    WRITE: "write",
    WRITE_BARRIER: "write with barrier",
    FLUSH: "flush",
    DISCARD: "discard",
}


class DiskError(XenbusError):
    """The back end could not do an I/O. `name` is EIO, or EOPNOTSUPP where it does not know how."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{what}: {name}")
        self.name = name
        self.what = what


class Io:
    """One call of a user: as many requests as it takes.

    offset, length: bytes. view: where the data is or goes; None for flush, discard, and a read that makes its
    own bytes (`result`, or `view` after all where it took several requests).
    left: bytes not answered yet. inflight: requests on the ring.
    """

    __slots__ = (
        "deadline",
        "error",
        "future",
        "inflight",
        "left",
        "length",
        "offset",
        "op",
        "result",
        "view",
    )

    def __init__(self, op: int, offset: int, length: int, view: memoryview | None) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.view = view
        # A flush has no bytes and still one answer to wait for.
        self.left = length or 1
        self.inflight = 0
        self.error: Exception | None = None
        self.result: bytes | None = None
        self.deadline = 0.0
        self.future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    def what(self) -> str:
        if self.op == FLUSH:
            return "flush"
        return f"{OP_NAMES[self.op]} of {self.length} bytes at {self.offset}"


class Span:
    """Bytes of an I/O that must go out (again): [cursor, end)."""

    __slots__ = ("cursor", "end", "io")

    def __init__(self, io: Io, cursor: int, end: int) -> None:
        self.io = io
        self.cursor = cursor
        self.end = end


class Request:
    """One request in flight: bytes [start, start + length) of its I/O (what blkfronts call the shadow)."""

    __slots__ = ("buffer", "indirect", "io", "length", "op", "serial", "start")

    def __init__(self, io: Io, op: int, start: int, length: int, buffer: Buffer | None, serial: int) -> None:
        self.io = io
        self.op = op
        self.start = start
        self.length = length
        self.buffer = buffer
        self.serial = serial
        self.indirect = False


class Connection:
    """Everything that belongs to one ring, and dies with it.

    max_segments: in one request; above BLKIF_MAX_SEGMENTS_PER_REQUEST they are indirect
    """

    __slots__ = ("abi", "channel", "free_ids", "handle", "inflight", "max_segments", "pool", "ring", "shadow")

    def __init__(
        self, ring: FrontRing, channel: Channel, abi: Abi, pool: Pool, max_segments: int, handle: int
    ) -> None:
        self.ring = ring
        self.channel = channel
        self.abi = abi
        self.pool = pool
        self.max_segments = max_segments
        self.handle = handle & 0xFFFF
        self.shadow: list[Request | None] = [None] * ring.size
        self.free_ids = list(range(ring.size - 1, -1, -1))
        self.inflight = 0

    def enter(self, request: Request) -> int:
        """The id under which it goes onto the ring. There are as many as slots."""
        ident = self.free_ids.pop()
        self.shadow[ident] = request
        self.inflight += 1
        request.io.inflight += 1
        return ident


class Queue:
    """I/O of one disk. Its owner connects and disconnects it, and feeds it kicks.

    on_broken: called once with what the back end did wrong; no more is read off that ring
    grow:      starts `pool.grow(bin)` as a task of the device, and calls `grown` when that is over
    """

    def __init__(
        self, on_broken: Callable[[PeerError], None], grow: Callable[[Connection, Bin], None]
    ) -> None:
        self._on_broken = on_broken
        self._grow = grow
        self._growing = False
        self._push_scheduled = False
        self._waiting: deque[Span] = deque()
        self._connection: Connection | None = None
        self._serial = 0
        self.flush_op = FLUSH
        self.held = False  # True: nothing new goes out (suspending)
        self.requests = dict.fromkeys(OP_NAMES, 0)
        self.errors = 0
        self.on_idle: Callable[[], None] | None = None

    @property
    def connection(self) -> Connection | None:
        return self._connection

    @property
    def inflight(self) -> int:
        """Requests on the ring."""
        return self._connection.inflight if self._connection is not None else 0

    @property
    def waiting(self) -> int:
        """I/Os that have more to send than there was room for."""
        return len(self._waiting)

    # -- connections

    def connect(self, connection: Connection) -> None:
        """Requests go to this ring from now on, those of the last connection first."""
        self._connection = connection
        self.pump()

    def disconnect(self) -> Connection | None:
        """No more of this ring. What was in flight goes to the head of the queue, oldest first."""
        connection, self._connection = self._connection, None
        if connection is None:
            return None
        lost = sorted((found for found in connection.shadow if found), key=lambda request: request.serial)
        for request in reversed(lost):
            io = request.io
            io.inflight -= 1
            if io.future.done() or io.error is not None:
                self._settle(io)
                continue
            self._waiting.appendleft(Span(io, request.start, request.start + request.length))
        connection.shadow = [None] * len(connection.shadow)
        connection.inflight = 0
        connection.ring.release()
        connection.pool.release()
        return connection

    def fail(self, error: Exception) -> None:
        """Every I/O that still waits ends with this."""
        connection = self._connection
        pending = [span.io for span in self._waiting]
        self._waiting.clear()
        if connection is not None:
            pending += [request.io for request in connection.shadow if request]
        for io in pending:
            if not io.future.done():
                io.future.set_exception(error)

    # -- requests

    def submit(self, io: Io) -> None:
        """Send it now if there is room, otherwise when there is. The future of `io` tells its end."""
        connection = self._connection
        if not self._waiting and connection is not None and not self.held and connection.free_ids:
            if io.op >= FLUSH:
                self._issue_plain(connection, io)
                issued = io.length
            else:
                issued = self._issue_data(connection, io, 0, io.length)
            if connection.inflight == 1:
                self._push()  # nothing is under way that would wake anybody up
            elif not self._push_scheduled:
                # Whoever else gets its turn in this round of the loop shares the notification.
                self._push_scheduled = True
                asyncio.get_running_loop().call_soon(self._push)
            if issued == io.length:
                return
            self._waiting.append(Span(io, issued, io.length))
            return
        self._waiting.append(Span(io, 0, io.length))

    def _push(self) -> None:
        self._push_scheduled = False
        connection = self._connection
        if connection is not None and connection.ring.push_requests():
            connection.channel.notify()

    def pump(self) -> None:
        """Send what waits, as far as slots and pages go, with one notification."""
        connection = self._connection
        if connection is None or self.held:
            return
        waiting = self._waiting
        while waiting and connection.free_ids:
            span = waiting[0]
            io = span.io
            if io.future.done() or io.error is not None:
                waiting.popleft()
            elif io.op >= FLUSH:
                self._issue_plain(connection, io)
                waiting.popleft()
            else:
                issued = self._issue_data(connection, io, span.cursor, span.end)
                if not issued:
                    break
                span.cursor += issued
                if span.cursor >= span.end:
                    waiting.popleft()
        self._push()

    def _issue_plain(self, connection: Connection, io: Io) -> None:
        """A flush or a discard: no data."""
        ring, abi = connection.ring, connection.abi
        op = self.flush_op if io.op == FLUSH else io.op
        self._serial += 1
        ident = connection.enter(Request(io, op, 0, io.length, None, self._serial))
        sector, at = io.offset >> SECTOR_SHIFT, ring.request_offset()
        if op == DISCARD:
            count = io.length >> SECTOR_SHIFT
            abi.discard.pack_into(ring.slots, at, DISCARD, 0, connection.handle, ident, sector, count)
        else:
            abi.rw.pack_into(ring.slots, at, op, 0, connection.handle, ident, sector)
        ring.commit_request()

    def _issue_data(self, connection: Connection, io: Io, start: int, end: int) -> int:
        """One request for as many of these bytes as it can carry. 0: no pages for it now."""
        op, length = io.op, end - start
        segments = -(-length // PAGE_SIZE)
        if segments > connection.max_segments:
            segments = connection.max_segments
        if op == WRITE_BARRIER and segments > BLKIF_MAX_SEGMENTS_PER_REQUEST:
            segments = BLKIF_MAX_SEGMENTS_PER_REQUEST  # blkif.h: indirect_op is read or write
        found = connection.pool.bin_for(segments)
        free = found.free
        if not free:
            if found.count < found.limit and not self._growing:
                self._growing = True
                self._grow(connection, found)
            return 0
        if segments > found.pages:
            segments = found.pages
        if length > segments * PAGE_SIZE:
            length = segments * PAGE_SIZE
        buffer = free.pop()
        if op != READ:
            assert io.view is not None
            buffer.view[:length] = io.view[start : start + length]
        self._serial += 1
        request = Request(io, op, start, length, buffer, self._serial)
        ident = connection.enter(request)
        sector = (io.offset + start) >> SECTOR_SHIFT
        if length == PAGE_SIZE:
            ring = connection.ring
            at, word = ring.request_offset(), buffer.words[0]
            connection.abi.one.pack_into(ring.slots, at, op, 1, connection.handle, ident, sector, word)
            ring.commit_request()
        else:
            self._put_data(connection, request, ident, sector, segments)
        return length

    @staticmethod
    def _put_data(connection: Connection, request: Request, ident: int, sector: int, segments: int) -> None:
        """One read or write request into the ring's next slot."""
        ring, abi, buffer = connection.ring, connection.abi, request.buffer
        assert buffer is not None
        at = ring.request_offset()
        # Whole pages but for the end of the last: its last_sect comes down by what is missing.
        missing = (segments * PAGE_SIZE - request.length) // SECTOR_SIZE << 40
        if segments <= BLKIF_MAX_SEGMENTS_PER_REQUEST:
            abi.rw.pack_into(ring.slots, at, request.op, segments, connection.handle, ident, sector)
            words = buffer.words[:segments]
            if missing:
                words = (*words[:-1], words[-1] - missing)
            abi.words[segments].pack_into(ring.slots, at + abi.segments_at, *words)
        else:
            page = buffer.descriptors
            assert page is not None
            end = segments * SEGMENT_SIZE
            page[:end] = buffer.packed[:end]
            if missing:
                last = buffer.words[segments - 1] - missing
                page[end - SEGMENT_SIZE : end] = last.to_bytes(SEGMENT_SIZE, "little")
            request.indirect = True
            abi.indirect.pack_into(
                ring.slots,
                at,
                INDIRECT,
                request.op,
                segments,
                ident,
                sector,
                connection.handle,
                buffer.descriptor_gref,
                *(0,) * 7,
            )
        ring.commit_request()

    def grown(self, error: Exception | None) -> None:
        """A growth of the pool is over. With an error there is not a single page: what waits fails."""
        self._growing = False
        if error is not None:
            self.fail(error)
        self.pump()

    # -- responses

    def kick(self) -> None:
        """The event channel's handler: every response there is, then what waits."""
        connection = self._connection
        if connection is None:
            return
        ring, unpack = connection.ring, connection.abi.response.unpack
        try:
            while True:
                for raw in ring.take_responses():
                    ident, op, status = unpack(raw)
                    self._answered(connection, ident, op, status)
                if self._waiting:
                    self.pump()
                if not ring.final_check_for_responses():
                    break
        except PeerError as error:
            self._on_broken(error)
            return
        if not connection.inflight and self.on_idle is not None:
            self.on_idle()

    def _answered(self, connection: Connection, ident: int, op: int, status: int) -> None:
        shadow = connection.shadow
        request = shadow[ident] if ident < len(shadow) else None
        if request is None:
            raise PeerError(f"a response for request {ident}, which is not in flight")
        # "copied from request": Linux's blkback copies indirect_op, others the operation itself.
        if op != request.op and not (request.indirect and op == INDIRECT):
            raise PeerError(f"the response for request {ident} names operation {op}, it was {request.op}")
        shadow[ident] = None
        connection.free_ids.append(ident)
        connection.inflight -= 1
        io, buffer, length = request.io, request.buffer, request.length
        io.inflight -= 1
        self.requests[io.op] += 1
        if io.future.done():
            pass  # its caller went away: nobody touches that buffer any more
        elif status == BLKIF_RSP_OKAY:
            if io.op == READ:
                assert buffer is not None
                _deliver(request, io, buffer.view)
            io.left -= length or 1
        elif io.error is None:
            self.errors += 1
            name = "EOPNOTSUPP" if status == BLKIF_RSP_EOPNOTSUPP else "EIO"
            io.error = DiskError(name, f"{io.what()}: the back end answered {status}")
        if buffer is not None:
            buffer.bin.free.append(buffer)
        if not io.left or io.error is not None:
            self._settle(io)

    @staticmethod
    def _settle(io: Io) -> None:
        """Tell the caller, once nothing of this I/O is on the ring any more."""
        if io.inflight or io.future.done():
            return
        if io.error is not None:
            io.future.set_exception(io.error)
        elif not io.left:
            io.future.set_result(io.result)


def _deliver(request: Request, io: Io, data: memoryview) -> None:
    """What was read, into the caller's buffer or bytes of its own."""
    start, length, view = request.start, request.length, io.view
    if length != len(data):
        data = data[:length]
    if length == io.length:
        if view is None:
            io.result = bytes(data)
        else:
            view[:] = data
        return
    if view is None:
        view = io.view = memoryview(bytearray(io.length))
    view[start : start + length] = data
