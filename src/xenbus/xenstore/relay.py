"""A socket in a store's place that passes everything on and records it: other people's programs, recorded.

Knows transports, tapes and the frame of messages; what they mean is nothing to it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable

from xenbus.errors import LinkDown
from xenbus.xenstore.listener import Listener, listening
from xenbus.xenstore.transport import Transport
from xenbus.xenstore.transport.recording import Tape, Track
from xenbus.xenstore.transport.unix import UnixTransport
from xenbus.xenstore.wire.message import PAYLOAD_MAX, Op

MAX_CONNECTIONS = 200
# Bytes, or messages, that one end has not taken yet; the other is not read meanwhile.
BACKLOG = 1 << 18
QUEUED = 64


class _End:
    """One side of a connection that is passed on."""

    def __init__(self, wire: _Wire, transport: Transport, outgoing: bool) -> None:
        self._wire = wire
        self._outgoing = outgoing
        self.transport = transport

    def data_received(self, data: bytes | memoryview) -> None:
        self._wire.passed(self._outgoing, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wire.close()

    def drained(self) -> None:
        self._wire.balance()


class _Wire:
    """A client of ours and the store, with a track of the tape between them."""

    def __init__(self, near: Transport, far: Transport, track: Track, done: Callable[[_Wire], None]) -> None:
        self._track = track
        self._done = done
        self._near = _End(self, near, outgoing=True)
        self._far = _End(self, far, outgoing=False)
        # Some stores take one message at a time (/dev/xen/xenbus).
        self._queue: deque[bytes] = deque()
        self._unanswered = 0
        self.closed = False

    def start(self) -> None:
        self._near.transport.start(self._near)
        self._far.transport.start(self._far)

    def passed(self, outgoing: bool, data: bytes | memoryview) -> None:
        messages = self._track.put(outgoing, data)
        if outgoing:
            self._queue += [message.encode() for message in messages if len(message.payload) <= PAYLOAD_MAX]
            if any(len(message.payload) > PAYLOAD_MAX for message in messages):
                self.close()  # as the store would
        else:
            self._unanswered -= sum(message.op != Op.WATCH_EVENT for message in messages)
            self._near.transport.send([bytes(data)])
        self.balance()

    def balance(self) -> None:
        """Sends what may be sent; who sends more than is taken is not read."""
        if self.closed:
            return
        far = self._far.transport
        batch = []
        while self._queue and self._unanswered < far.max_outstanding:
            batch.append(self._queue.popleft())
            self._unanswered += 1
        if batch:
            far.send(batch)
        self._near.transport.pause(len(self._queue) > QUEUED or far.backlog > BACKLOG)
        far.pause(self._near.transport.backlog > BACKLOG)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._near.transport.close()
            self._far.transport.close()
            self._done(self)


class Relay:
    """Listens until `close`. Whoever connects is connected to the store by `dial`."""

    def __init__(self, tape: Tape, dial: Callable[[], Transport]) -> None:
        self._tape = tape
        self._dial = dial
        self._wires: set[_Wire] = set()
        self._listener: Listener | None = None
        self.refused: Exception | None = None

    def listen(self, path: str | os.PathLike[str]) -> None:
        """At a socket of mode 0600. UsageError if the path is taken."""
        self._listener = Listener(listening(path), self._taken, self._not_taken)

    def _not_taken(self, exc: OSError) -> None:
        self.refused = exc

    def _taken(self, sock: socket.socket) -> None:
        if len(self._wires) >= MAX_CONNECTIONS:
            sock.close()
            return
        try:
            far = self._dial()
        except (LinkDown, OSError) as exc:
            self.refused = exc
            sock.close()
            return
        wire = _Wire(UnixTransport(sock, "a client"), far, self._tape.track(), self._wires.discard)
        self._wires.add(wire)
        wire.start()

    async def close(self) -> None:
        """What is under way ends. The tape is not closed."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        for wire in list(self._wires):
            wire.close()
        await asyncio.sleep(0)
