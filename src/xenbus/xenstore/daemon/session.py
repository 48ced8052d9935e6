"""One client of the daemon: bytes in from its transport, requests to the engine, bytes out. asyncio.

Knows a `Transport` and the engine's `Connection`; not which kind of transport it is, save that a ring
can be told why it is stopped. Who does not read is not read from, and what waits for it is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Protocol

from xenbus.errors import PeerError
from xenbus.xenstore.engine import Connection
from xenbus.xenstore.transport import Transport
from xenbus.xenstore.transport.ringpage import RingFault, RingTransport
from xenbus.xenstore.wire import Message, Parser, ProtocolError
from xenbus.xenstore.wire.message import next_begin

_log = logging.getLogger("xenbus.xenstored")

# Requests of one client that one turn of the loop may serve: others wait no longer than that.
BUDGET = 256
# How much is handed to a transport at a time, bytes; the rest stays where identical events merge.
PORTION = 1 << 18
# What is handed to a ring at a time, bytes: its size.
RING_PORTION = 1024
# After this long a guest's untaken events are dropped (xenstored's "watch-event" timeout), if they ever are.
EVENT_SECONDS = 20.0


class Host(Protocol):
    """What a session needs of its daemon. drops_events: those not taken for `EVENT_SECONDS`."""

    @property
    def drops_events(self) -> bool: ...

    def serve(self, session: Session, messages: deque[Message], budget: int) -> None:
        """Give requests to the engine, in order, while the session may go on; then send what came of it."""
        ...

    def reset(self, session: Session) -> None:
        """Its watches and transactions are dropped, and its queue."""
        ...

    def ended(self, session: Session, exc: Exception | None) -> None: ...
    def relieved(self) -> None:
        """Events were taken or dropped: whoever waited for that may go on."""
        ...

    def serve_held(self, session: Session, message: Message) -> None:
        """Give one request to the engine, and send nothing."""
        ...

    def waits(self, session: Session) -> None:
        """A part of a request was read, and nothing else."""
        ...

    def stalled(self, session: Session) -> None:
        """It has as much outstanding as it may: try again when others have taken something."""
        ...


class Session:
    """A `Receiver`. `busy`: a request of it is under way (INTRODUCE), later ones wait."""

    __slots__ = (
        "_cut",
        "_deadline",
        "_handed",
        "_kept",
        "_loop",
        "_paused",
        "_pending",
        "_scheduled",
        "_taken",
        "busy",
        "closed",
        "conn",
        "host",
        "parser",
        "transport",
    )

    def __init__(self, host: Host, conn: Connection, transport: Transport) -> None:
        self.host = host
        self.conn = conn
        self.transport = transport
        self.parser = Parser()
        self.busy = False
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._pending: deque[Message] = deque()
        self._paused = False
        self._scheduled = False
        self._taken = 0
        self._deadline: asyncio.TimerHandle | None = None
        # What was handed over last, if not all of it was sent, and where its first message begins.
        self._handed = b""
        self._cut = 0
        # `unsent` of a transport that is not there for a while.
        self._kept: tuple[bytes, int] | None = None

    def start(self) -> None:
        self.transport.start(self)

    # ---- what is under way, for whoever saves it ----

    @property
    def inbound(self) -> bytes:
        """Read, and not given to the engine yet."""
        return b"".join(message.encode() for message in self._pending) + self.parser.rest

    @property
    def unsent(self) -> tuple[bytes, int]:
        """Taken from the engine and not sent yet; how much of it is the rest of a message."""
        if self._kept is not None:
            return self._kept
        left = self.transport.backlog
        if not left:
            return b"", 0
        data = self._handed
        sent = len(data) - left
        return data[sent:], next_begin(data, self._cut, sent) - sent

    @property
    def under_way(self) -> bool:
        """Whether a part of a request was read, or of an answer sent."""
        return bool(self._pending or self.parser.buffered or self.transport.backlog)

    def shorten(self) -> None:
        """The next request is served, whether its answer can be sent or not."""
        self.host.serve_held(self, self._pending.popleft())

    def prepare(self, inbound: bytes, partial: bytes) -> None:
        """Begin where another session stopped, and wait for `carry_on`: the rest of a message goes out first,
        what was read comes in first."""
        self._kept = partial, len(partial)
        self._pending.extend(self.parser.feed(inbound))

    def _send_on(self, data: bytes, cut: int) -> None:
        self._handed, self._cut = data, cut
        if data:
            self.transport.send((data,))

    @property
    def held(self) -> bool:
        """It waits for `carry_on`."""
        return self._kept is not None and not self.closed

    def hold(self) -> None:
        """Nothing is read, served or sent until `carry_on`: the transport goes, and not the client."""
        self._kept = self.unsent

    def carry_on(self, transport: Transport) -> None:
        """Everything flows; the transport is of the same client as the one before."""
        assert self._kept is not None
        (unsent, cut), self._kept = self._kept, None
        self.transport = transport
        self._paused = False
        self._send_on(unsent, cut)
        self.start()
        self.pump()
        self.schedule()

    # ---- Receiver ----

    def data_received(self, data: bytes | memoryview) -> None:
        if self.closed:
            return
        broken = None
        try:
            messages = self.parser.feed(data)
        except ProtocolError as error:
            messages, broken = error.messages, error
        if not messages:
            self.host.waits(self)
        self._pending.extend(messages)
        self._work()
        if broken is not None and not self.closed:
            _log.warning("%s: %s", self.transport.peer, broken)
            self.stop(RingFault.PROTO, broken)

    def drained(self) -> None:
        self.pump()
        # Whoever caused the events that went now may ask again.
        self.host.relieved()
        self._work()

    def reset(self) -> None:
        """The guest begins anew: what it asked, watched and opened is gone, and what waits for it."""
        self.parser = Parser(self.parser.limit)
        self._pending.clear()
        self.host.reset(self)
        self._work()  # and is read again, if it was not because its ring was full

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, PeerError):
            _log.warning("%s", exc)
        self._end(exc)

    # ---- requests ----

    @property
    def ready(self) -> bool:
        """Whether the next request may be looked at."""
        return not (self.busy or self.closed or self._kept is not None or self.transport.backlog)

    def _work(self) -> None:
        """Serve what may be served; read no more while anything is left."""
        pending = self._pending
        if pending and self.ready:
            if self.conn.may_send:
                self.host.serve(self, pending, BUDGET)
            if pending and not self.closed:
                if not self.conn.may_send:
                    self.host.stalled(self)
                elif self.ready:
                    self.schedule()
        if not self.closed and self._kept is None and self._paused != bool(pending or self.transport.backlog):
            self._paused = not self._paused
            self.transport.pause(self._paused)

    def schedule(self) -> None:
        """Go on in the loop's next turn."""
        if not self._scheduled and not self.closed:
            self._scheduled = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._scheduled = False
        if not self.closed:
            self._work()

    # ---- replies and events ----

    def pump(self) -> None:
        """Hand over what is queued, as far as the other side takes it."""
        conn, transport = self.conn, self.transport
        if self.closed or self._kept is not None:
            return
        if conn.overflow:
            _log.warning("%s does not read: dropped with %d bytes waiting", transport.peer, conn.queued)
            self.stop(RingFault.COMM, None)
            return
        portion = RING_PORTION if conn.guest else PORTION
        while conn.out and not transport.backlog and not self.closed:
            data = conn.take(portion)
            self._taken += 1
            transport.send((data,))
            if transport.backlog:
                self._handed, self._cut = data, 0
        if conn.guest and conn.out and self._deadline is None and self.host.drops_events and not self.closed:
            self._deadline = self._loop.call_later(EVENT_SECONDS, self._overdue, self._taken)

    def _overdue(self, taken: int) -> None:
        self._deadline = None
        if self.closed or not self.conn.out:
            return
        if taken == self._taken:
            dropped = self.conn.drop_events()
            if dropped:
                _log.warning("%s: %d events not taken for %g s", self.transport.peer, dropped, EVENT_SECONDS)
                self.host.relieved()
        self.pump()

    # ---- ends ----

    def stop(self, fault: RingFault, exc: Exception | None) -> None:
        """Our side ends it; a ring is told why."""
        if isinstance(self.transport, RingTransport):
            self.transport.fault(fault, exc)
        self._end(exc)

    def close(self) -> None:
        self._end(None)

    def _end(self, exc: Exception | None) -> None:
        if self.closed:
            return
        self.closed = True
        self._pending.clear()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self.transport.close()
        self.host.ended(self, exc)
