"""The request side of a disk: I/O in, requests onto the ring, responses off it. Synchronous but for growing.

Knows the rings of one connection to a back end, one a queue, each with an event channel and a pool of granted
pages; knows no store and no states. I/O outlives connections: what was in flight when they ended goes out
again on the next ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from xenbus.drivers.block.blkif import (
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_RSP_EOPNOTSUPP,
    PAGE_SIZE,
    SECTOR_SHIFT,
    SECTOR_SIZE,
    SEGMENT_SIZE,
    Abi,
)
from xenbus.drivers.block.diskio import (
    DIRECT_MAX,
    DISCARD,
    FLUSH,
    INDIRECT,
    OP_NAMES,
    READ,
    WRITE_BARRIER,
    DiskError,
    Io,
    Part,
    Parts,
    Span,
)
from xenbus.drivers.block.xbd_pool import Bin, Buffer, Pool
from xenbus.errors import PeerError, UsageError
from xenbus.hypervisor.interface import Channel
from xenbus.ring.lookout import Lookout
from xenbus.ring.shared import RSP_PROD, FrontRing

DEFAULT_TIMEOUT: Final = 60.0
TICKS: Final = 8
# Responses that are taken at a time, and how often in one wake-up before the loop gets its turn. Long
# ones one by one: their callers' next requests keep the back end busy while the next is copied.
BATCH: Final = 16
ROUNDS: Final = 8
BULKY: Final = 128 << 10


class Connection:
    """Everything that belongs to one ring, and dies with it.

    max_segments: in one request; above BLKIF_MAX_SEGMENTS_PER_REQUEST they are indirect
    shadow:       what is in flight by id, oldest first (blkfronts call it so)
    next:         the ring that requests go to after this one: with one queue, itself
    growing:      its pool is; barren: it could not, and has not a page
    """

    __slots__ = (
        "abi",
        "barren",
        "channel",
        "free_ids",
        "growing",
        "handle",
        "lookout",
        "max_segments",
        "next",
        "pack_one",
        "pool",
        "ring",
        "shadow",
    )

    def __init__(
        self, ring: FrontRing, channel: Channel, abi: Abi, pool: Pool, max_segments: int, handle: int
    ) -> None:
        self.ring = ring
        self.lookout = Lookout(ring.words, RSP_PROD)
        self.channel = channel
        self.abi = abi
        self.pack_one = abi.one.pack_into
        self.pool = pool
        self.max_segments = max_segments
        self.handle = handle & 0xFFFF
        self.shadow: dict[int, Io | Part] = {}
        self.free_ids = list(range(ring.size - 1, -1, -1))
        self.next = self
        self.growing = False
        self.barren = False


class Queue:
    """I/O of one disk, over all its rings. Its owner connects and disconnects it, and feeds it kicks.

    With several rings each batch of requests, up to its notification, goes to the next one. The rings know no
    order among them, nor does Linux's blkback keep a barrier's beyond its own ring: so a barrier goes alone.

    on_broken: called once with what the back end did wrong; no more is read off those rings
    grow:      starts `pool.grow(bin)` as a task of the device, and calls `grown` when that is over
    overdue:   the error for an I/O that took longer than `timeout` seconds
    """

    def __init__(
        self,
        on_broken: Callable[[PeerError], None],
        grow: Callable[[Connection, Bin], None],
        overdue: Callable[[Io, float], Exception],
    ) -> None:
        self._on_broken = on_broken
        self._grow = grow
        self._overdue = overdue
        self.loop = asyncio.get_running_loop()
        self._ticks = 0
        self._timer: asyncio.TimerHandle | None = None
        self._gone: Exception | None = None
        self.timeout = DEFAULT_TIMEOUT
        self._bulky = False
        self._push_scheduled = False
        self._waiting: deque[Span] = deque()
        # The one that requests go to now. Only this one may have some that were not pushed.
        self._connection: Connection | None = None
        self._connections: tuple[Connection, ...] = ()
        self._several = False
        self._fence: Io | None = None  # a barrier over several rings; it is over once nothing is in flight
        self._held = False
        self._shut = False  # held or fenced: nothing goes out but by `pump`
        self.flush_op = FLUSH
        self.requests = dict.fromkeys(OP_NAMES, 0)
        self.errors = 0
        self.on_idle: Callable[[], None] | None = None

    @property
    def connections(self) -> tuple[Connection, ...]:
        """One a ring; none while there is no back end."""
        return self._connections

    @property
    def held(self) -> bool:
        """Nothing new goes out, and time does not count: the domain is being suspended, or the disk ends."""
        return self._held

    @held.setter
    def held(self, held: bool) -> None:
        self._held = held
        self._shut = held or self._fence is not None

    @property
    def inflight(self) -> int:
        """Requests on the rings."""
        return sum([len(connection.shadow) for connection in self._connections])

    @property
    def waiting(self) -> int:
        """I/Os that have more to send than there was room for."""
        return len(self._waiting)

    # -- connections

    def connect(self, connections: Sequence[Connection]) -> None:
        """Requests go to these rings from now on, those of the last connection first."""
        self._connections = tuple(connections)
        for n, connection in enumerate(connections):
            connection.next = connections[n - 1]
        self._connection = connections[0]
        self._several = len(connections) > 1
        self.pump()

    def disconnect(self) -> tuple[Connection, ...]:
        """No more of these rings. What was in flight goes to the head of the queue, a ring's oldest first."""
        connections, self._connections = self._connections, ()
        self._connection = self._fence = None
        self._shut = self._held
        for connection in reversed(connections):
            self._take_back(connection)
            connection.ring.release()
            connection.pool.release()
        return connections

    def _take_back(self, connection: Connection) -> None:
        lost = list(connection.shadow.values())
        connection.shadow.clear()
        for request in reversed(lost):
            if isinstance(request, Io):
                io, start, length = request, 0, request.length
                io.buffer = None
            else:
                io, start, length = request.io, request.start, request.length
                io.split().inflight -= 1
            if io.over:
                continue
            if io.parts is not None and io.parts.error is not None:
                if not io.parts.inflight:
                    io.fail(io.parts.error)
                continue
            self._waiting.appendleft(Span(io, start, start + length))

    def _pending(self) -> list[Io]:
        """Every I/O that was not answered in full; some more than once."""
        pending = [span.io for span in self._waiting]
        for connection in self._connections:
            requests = connection.shadow.values()
            pending += [found if isinstance(found, Io) else found.io for found in requests]
        return pending

    def fail(self, error: Exception) -> None:
        """Every I/O that waits ends with this."""
        pending = self._pending()
        self._waiting.clear()
        for io in pending:
            if not io.over:
                io.fail(error)

    def end(self, error: Exception) -> None:
        """`fail`, and so does every later I/O. The first error stays."""
        if self._gone is None:
            self._gone = error
        self.fail(self._gone)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def gone(self) -> Exception | None:
        """Why there will be no more I/O, once that is so."""
        return self._gone

    def _tick(self) -> None:
        """One timer a disk, not one an I/O: fail what is over its time, a TICKSth of it late at most."""
        self._timer = None
        pending = self._pending()
        if not self._held:
            self._ticks += 1
            for io in pending:
                if self._ticks - io.begun > TICKS and not io.over:
                    io.fail(self._overdue(io, self.timeout))
        if pending:
            self._timer = self.loop.call_later(self.timeout / TICKS, self._tick)

    # -- requests

    def submit(self, io: Io) -> None:
        """Send it now if there is room, otherwise when there is. Await `io` for its end."""
        if self._gone is not None:
            raise self._gone
        io.begun = self._ticks
        if self._timer is None:
            self._timer = self.loop.call_later(self.timeout / TICKS, self._tick)
        connection = self._connection
        issued = 0
        if connection is not None and connection.free_ids and not self._waiting and not self._shut:
            idle = not connection.shadow
            if io.length == PAGE_SIZE and io.op < WRITE_BARRIER and connection.pool.single.free:
                # What `_issue_data` comes to for one page, which most I/O is.
                buffer = io.buffer = connection.pool.single.free.pop()
                if io.op != READ:
                    assert io.view is not None
                    buffer.view[:] = io.view
                ident = connection.free_ids.pop()
                connection.shadow[ident] = io
                ring = connection.ring
                at, sector, handle = ring.claim_request(), io.offset >> SECTOR_SHIFT, connection.handle
                connection.pack_one(ring.slots, at, io.op, 1, handle, ident, sector, buffer.words[0])
                if self._push_scheduled:
                    return
                issued = PAGE_SIZE
            elif io.op >= FLUSH:
                self._issue_plain(connection, io)
                issued = io.length
            elif io.op != WRITE_BARRIER or not self._several:
                issued = self._issue_data(connection, io, 0, io.length)
            if self._push_scheduled:
                pass
            elif idle:
                self._push()  # nothing is under way that would wake anybody up
            else:
                # Whoever else gets its turn in this round of the loop shares the notification.
                self._push_scheduled = True
                self.loop.call_soon(self._push)
            if issued == io.length:
                return
        self._waiting.append(Span(io, issued, io.length))
        if self._several:
            self.pump()  # another ring may have room

    def _push(self) -> None:
        """What was put on this ring is the back end's; what comes next is for the next ring."""
        self._push_scheduled = False
        connection = self._connection
        if connection is not None:
            if self._several and connection.ring.unpublished:
                self._connection = connection.next
            if connection.ring.push_requests():
                connection.channel.notify()

    def pump(self) -> None:
        """Send what waits, as far as slots and pages go, with one notification a ring."""
        if self._held:
            return
        for _ in self._connections:
            connection = self._connection
            if connection is None:
                break
            self._fill(connection)
            self._push()
            if not self._waiting:
                break
            if self._connection is connection:
                self._connection = connection.next  # this one is full, or has no pages now

    def _fill(self, connection: Connection) -> None:
        """Put what waits on one ring, as far as it goes."""
        waiting = self._waiting
        while waiting and connection.free_ids:
            span = waiting[0]
            io = span.io
            if io.over or (io.parts is not None and io.parts.error is not None):
                waiting.popleft()
            elif self._several and self._fenced(io):
                break
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

    def _fenced(self, io: Io) -> bool:
        """Whether this one has to wait for a barrier, or is one and has to wait for all before it."""
        if self._fence is io or (self._fence is None and io.op != WRITE_BARRIER):
            return False
        if self.inflight:
            return True
        self._fence = io if io.op == WRITE_BARRIER else None
        self._shut = self._fence is not None
        return False

    def _issue_plain(self, connection: Connection, io: Io) -> None:
        """A flush or a discard: no data."""
        ring, abi = connection.ring, connection.abi
        op = self.flush_op if io.op == FLUSH else io.op
        ident = connection.free_ids.pop()
        connection.shadow[ident] = io
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
        if not found.free:
            if found.count < found.limit and not connection.growing:
                connection.growing = True
                self._grow(connection, found)
            return 0
        if segments > found.pages:
            segments = found.pages
        if length > segments * PAGE_SIZE:
            length = segments * PAGE_SIZE
        buffer = found.free.pop()
        if op != READ:
            assert io.view is not None
            buffer.view[:length] = io.view[start : start + length]
        ident = connection.free_ids.pop()
        sector = (io.offset + start) >> SECTOR_SHIFT
        request: Io | Part = io
        if length == io.length:
            io.buffer = buffer
        else:
            request = Part(io, start, length, buffer)
            io.split().inflight += 1
        connection.shadow[ident] = request
        self._put_data(connection, buffer, op, length, ident, sector, segments)
        return length

    @staticmethod
    def _put_data(
        connection: Connection, buffer: Buffer, op: int, length: int, ident: int, sector: int, segments: int
    ) -> None:
        """One read or write request into the ring's next slot."""
        ring, abi = connection.ring, connection.abi
        at = ring.request_offset()
        # Whole pages but for the end of the last: its last_sect comes down by what is missing.
        missing = (segments * PAGE_SIZE - length) // SECTOR_SIZE << 40
        if segments <= BLKIF_MAX_SEGMENTS_PER_REQUEST:
            abi.rw.pack_into(ring.slots, at, op, segments, connection.handle, ident, sector)
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
            abi.indirect.pack_into(
                ring.slots,
                at,
                INDIRECT,
                op,
                segments,
                ident,
                sector,
                connection.handle,
                buffer.descriptor_gref,
                *(0,) * 7,
            )
        ring.commit_request()

    def grown(self, connection: Connection, error: Exception | None) -> None:
        """A growth of a pool is over. With an error it has not a page; if none has one, what waits fails."""
        connection.growing = False
        if connection not in self._connections:
            return
        if error is not None:
            connection.barren = True
            if all(found.barren for found in self._connections):
                self.fail(error)
        # Not now: an eager task may grow it before `submit` has said who waits.
        self.loop.call_soon(self.pump)

    # -- responses

    def kick(self, connection: Connection) -> None:
        """What the event channel of a ring calls for: every response there is, then what waits."""
        if connection not in self._connections:
            return
        rounds = 0
        try:
            while True:
                done = self._take(connection)
                worked = bool(done)
                rounds += 1  # also without any: a peer that moves its index to and fro must not hold us
                if worked:
                    self._wake(done)
                if self._waiting:
                    self.pump()
                elif not self._push_scheduled:
                    self._push()
                if connection not in self._connections:
                    break
                ring = connection.ring
                # Nobody notifies us until the final check, so what comes while we look costs no wake-up.
                more = worked and connection.shadow and connection.lookout.moved(ring.rsp_cons)
                if not more and not ring.final_check_for_responses():
                    break
                if rounds >= ROUNDS:
                    self.loop.call_soon(self.kick, connection)
                    break
        except PeerError as error:
            self._on_broken(error)
            return
        if self.on_idle is not None and not self.inflight:
            self.on_idle()

    def _take(self, connection: Connection) -> list[Io]:
        """Some responses. Returns the I/Os that are over. PeerError."""
        done: list[Io] = []
        slots = connection.ring.take_response_slots(1 if self._bulky else BATCH)
        self._bulky = False
        shadow, free_ids = connection.shadow, connection.free_ids
        try:
            for ident, op, status in connection.abi.response_slots.iter_unpack(slots):
                request = shadow.pop(ident, None)
                if request is None:
                    raise PeerError(f"a response for request {ident}, which is not in flight")
                free_ids.append(ident)
                if request.length >= BULKY:
                    self._bulky = True
                if type(request) is Io:
                    io = request
                    self._answered(io, op, status)
                else:
                    assert isinstance(request, Part)
                    io = request.io
                    self._part_answered(request, op, status)
                if io.over:
                    done.append(io)
        except PeerError:
            self._wake(done)  # what was answered before the nonsense is answered
            raise
        return done

    def _wake(self, done: list[Io]) -> None:
        """Their callers go on. What they submit meanwhile shares one notification."""
        if asyncio.current_task(self.loop) is not None:
            for io in done:
                self.loop.call_soon(io.wake)  # a task cannot be run from within another
            return
        scheduled, self._push_scheduled = self._push_scheduled, True
        done.reverse()
        try:
            while done:
                done.pop().wake()
        finally:
            self._push_scheduled = scheduled
            for io in reversed(done):
                self.loop.call_soon(io.wake)

    def _answered(self, io: Io, op: int, status: int) -> None:
        """The answer to an I/O of one request."""
        if op != io.op:
            self._check_op(io, io.length, op)
        self.requests[io.op] += 1
        buffer = io.buffer
        if buffer is not None:
            io.buffer = None
            buffer.bin.free.append(buffer)  # nobody takes it before this is over
        if io.over:
            return  # its caller went away: nobody touches that buffer any more
        io.over = True
        io.error = io.value = None
        if status:
            io.error = self._error(io, status)
        elif op == READ and buffer is not None:
            data = buffer.view
            if io.length != len(data):
                data = data[: io.length]
            if io.view is None:
                io.value = bytes(data)
            else:
                try:
                    io.view[:] = data
                except ValueError as error:
                    io.error = UsageError(f"{io.what()}: {error}")  # its caller released it meanwhile

    def _part_answered(self, part: Part, op: int, status: int) -> None:
        io, buffer = part.io, part.buffer
        parts = io.split()
        if op != io.op:
            self._check_op(io, part.length, op)
        self.requests[io.op] += 1
        parts.inflight -= 1
        buffer.bin.free.append(buffer)
        if io.over:
            return
        if status:
            parts.error = parts.error or self._error(io, status)
        else:
            if io.op == READ:
                if io.view is None:
                    io.view = memoryview(bytearray(io.length))
                io.view[part.start : part.start + part.length] = buffer.view[: part.length]
            parts.left -= part.length
        self._settle(io, parts)

    def _check_op(self, io: Io, length: int, op: int) -> None:
        """PeerError. Of an indirect request Linux's blkback copies indirect_op, others the operation."""
        wanted = self.flush_op if io.op == FLUSH else io.op
        if op != wanted and not (length > DIRECT_MAX and op == INDIRECT):
            error = PeerError(f"the response to {io.what()} names operation {op}, it was {wanted}")
            if not io.over:
                io.fail(error)
            raise error

    def _error(self, io: Io, status: int) -> DiskError:
        self.errors += 1
        name = "EOPNOTSUPP" if status == BLKIF_RSP_EOPNOTSUPP else "EIO"
        return DiskError(name, f"{io.what()}: the back end answered {status}")

    @staticmethod
    def _settle(io: Io, parts: Parts) -> None:
        """Over, once nothing of this I/O is on the ring any more."""
        if parts.inflight or io.over:
            return
        if parts.error is not None:
            io.settle(parts.error)
        elif not parts.left:
            io.settle()
