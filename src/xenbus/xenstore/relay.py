"""A socket in a store's place that passes everything on and records it: other people's programs, recorded.

Knows transports, tapes and the frame of messages; what they mean is nothing to it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path

from xenbus.errors import LinkDown, UsageError
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
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self.refused: Exception | None = None

    def listen(self, path: str | os.PathLike[str]) -> None:
        """At a socket of mode 0600. UsageError if the path is taken."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            sock.bind(os.fspath(path))
        except OSError as exc:
            sock.close()
            raise UsageError(f"cannot listen at {os.fspath(path)}: {exc.strerror or exc}") from exc
        finally:
            os.umask(before)
        sock.listen(128)
        self._listener, self._path = sock, Path(path)
        asyncio.get_running_loop().add_reader(sock, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
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
        if self._listener is not None and self._path is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._path.unlink(missing_ok=True)
            self._listener = None
        for wire in list(self._wires):
            wire.close()
        await asyncio.sleep(0)
