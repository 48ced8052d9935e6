"""A connected socket on the event loop, under an Intake: one receive and one send a wake-up.

Knows bytes. Knows nothing of NBD. Nothing that was handed to `send` is looked at after it returned.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence

from xenbus.drivers.block.nbd.intake import Intake
from xenbus.errors import LinkDown, XenbusError

IOV_MAX = 1024  # limits.h
SEND_HIGH = 4 << 20  # bytes waiting to be sent from which `room` waits


class Link:
    """Owns a non-blocking stream socket. `on_lost(error)` is called once, when the link ends by itself."""

    def __init__(self, sock: socket.socket, intake: Intake, on_lost: Callable[[XenbusError], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._fd = sock.fileno()
        self._intake = intake
        self._on_lost = on_lost
        self._queue: deque[memoryview] = deque()
        self.queued = 0
        self._room: list[asyncio.Future[None]] = []
        self.closed = False
        self._reading = False

    def start(self) -> None:
        """Begin, once the owner is ready to be called."""
        self._step(self._intake.start)

    def pause(self) -> None:
        """Receive nothing more; `resume` goes on."""
        self._intake.paused = True
        self._set_reading()

    def _set_reading(self) -> None:
        wanted = not (self.closed or self._intake.paused or self._intake.finished)
        if wanted and not self._reading:
            self._loop.add_reader(self._fd, self._readable)
        elif self._reading and not wanted:
            self._loop.remove_reader(self._fd)
        self._reading = wanted

    def _readable(self) -> None:
        try:
            count = self._sock.recv_into(self._intake.buffer())
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.fail(LinkDown(f"the connection broke: {error.strerror}"))
            return
        if not count:
            self.fail(LinkDown("the other end closed the connection"))
            return
        self._step(lambda: self._intake.received(count))

    def resume(self) -> None:
        """Go on with a paused intake."""
        if not self.closed and self._intake.paused:
            self._step(self._intake.resume)

    def divert(self) -> None:
        """See Intake.divert."""
        self._intake.divert()

    def _step(self, step: Callable[[], None]) -> None:
        try:
            step()
        except XenbusError as error:
            self.fail(error)
            return
        self._set_reading()

    def send(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send, or queue a copy of what the socket does not take at once."""
        if self.closed:
            return
        if len(pieces) > IOV_MAX:
            pieces = [b"".join(pieces)]
        sent = 0
        if not self._queue:
            try:
                sent = self._sock.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                # Not from within the caller: it has not yet noted what it sent.
                self._loop.call_soon(self.fail, LinkDown(f"the connection broke: {error.strerror}"))
                return
        for piece in pieces:
            size = piece.nbytes if isinstance(piece, memoryview) else len(piece)
            if sent >= size:
                sent -= size
                continue
            self._enqueue(memoryview(bytes(memoryview(piece)[sent:])))
            sent = 0

    def _enqueue(self, data: memoryview) -> None:
        if not self._queue:
            self._loop.add_writer(self._fd, self._writable)
        self._queue.append(data)
        self.queued += len(data)

    def _writable(self) -> None:
        try:
            sent = self._sock.sendmsg([*self._queue][:IOV_MAX])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.fail(LinkDown(f"the connection broke: {error.strerror}"))
            return
        self.queued -= sent
        while self._queue and sent >= len(self._queue[0]):
            sent -= len(self._queue.popleft())
        if sent:
            self._queue[0] = self._queue[0][sent:]
        if not self._queue:
            self._loop.remove_writer(self._fd)
        if self.queued < SEND_HIGH:
            self._wake()

    def _wake(self) -> None:
        waiters, self._room = self._room, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def room(self, limit: int = SEND_HIGH) -> None:
        """Wait until less than `limit` bytes are queued, or the link is closed. Deadlines are the owner's."""
        while self.queued >= limit and not self.closed:
            waiter = self._loop.create_future()
            self._room.append(waiter)
            await waiter

    def fail(self, error: XenbusError) -> None:
        """End the link and say why, once."""
        if not self.closed:
            self.close()
            self._on_lost(error)

    def close(self) -> None:
        """End the link quietly."""
        if self.closed:
            return
        self.closed = True
        self._set_reading()
        if self._queue:
            self._loop.remove_writer(self._fd)
            self._queue.clear()
            self.queued = 0
        self._intake.close()
        self._sock.close()
        self._wake()
