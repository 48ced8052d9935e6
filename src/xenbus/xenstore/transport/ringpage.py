"""Both ends of the ring page between a guest and the store, over a buffer and a doorbell.

Knows struct xenstore_domain_interface (xen/include/public/io/xs_wire.h) and docs/misc/xenstore-ring.txt.
Is handed the page and how to kick; knows no hypervisor, and nothing of the messages. There is no address
to dial: whoever holds the page makes the transport.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum, IntFlag
from time import monotonic

from xenbus.errors import LinkDown, PeerError, XenbusError
from xenbus.ring import fence
from xenbus.ring.bytering import XENSTORE_REQ, XENSTORE_RSP, ByteRingEnd, RingError
from xenbus.xenstore.transport import GUEST_OUTSTANDING, Receiver

# Byte offsets in the page, and the words they are.
FEATURES, CONNECTION, ERROR, EVTCHN_PORT = 2064, 2068, 2072, 2076
# Without a fence of our own (ring.fence.FENCED) a kick may be missed: look again this often, seconds.
POLL_INTERVAL = 0.01
# What a blocking end takes in while the store has no room for what it sends, bytes.
INBOX_LIMIT = 1 << 20
# Ring passes one wake-up may make before others get their turn.
PASSES = 64


class Feature(IntFlag):
    """XENSTORE_SERVER_FEATURE_*."""

    RECONNECTION = 1
    ERROR = 2
    WATCHDEPTH = 4
    DOMID_ANY = 8


class RingFault(IntEnum):
    """XENSTORE_ERROR_*: why the store stopped the connection."""

    NONE = 0
    COMM = 1
    RINGIDX = 2
    PROTO = 3


class ConnectionWord(IntEnum):
    """XENSTORE_CONNECTED, XENSTORE_RECONNECT."""

    CONNECTED = 0
    RECONNECT = 1


class Side(Enum):
    """Which end of the page is ours: (what we read, what we write)."""

    GUEST = (XENSTORE_RSP, XENSTORE_REQ)
    DAEMON = (XENSTORE_REQ, XENSTORE_RSP)


class RingPage:
    """The page itself: two byte rings and four words. Keeps slices of `view` until `release()`."""

    __slots__ = ("_inbound", "_ours", "_outbound", "_words", "released")

    def __init__(self, view: memoryview, side: Side) -> None:
        inbound, outbound = side.value
        self._inbound = ByteRingEnd(view, *inbound)
        self._outbound = ByteRingEnd(view, *outbound)
        self._ours = inbound[2], outbound[3]
        octets = view.cast("B")
        self._words = octets.cast("I")
        octets.release()
        self.released = False

    def read(self) -> bytes:
        """All there is; b"" if nothing. RingError for indices further apart than the ring."""
        return self._inbound.read()

    def write(self, data: bytes | memoryview) -> int:
        """Bytes taken, 0 when the ring is full. RingError as for `read`."""
        return self._outbound.write(data)

    @property
    def readable(self) -> int:
        return self._inbound.readable

    @property
    def indices(self) -> tuple[int, int]:
        """Where our end stands: (consumer of what we read, producer of what we write)."""
        return self._get(self._ours[0]), self._get(self._ours[1])

    def _get(self, offset: int) -> int:
        return self._words[offset // 4]

    def _set(self, offset: int, value: int) -> None:
        fence.full_fence()
        self._words[offset // 4] = value
        fence.full_fence()

    @property
    def features(self) -> int:
        """Feature bits as the store wrote them, unknown ones included."""
        return self._get(FEATURES)

    @features.setter
    def features(self, bits: int) -> None:
        self._set(FEATURES, bits)

    @property
    def connection(self) -> int:
        return self._get(CONNECTION)

    @connection.setter
    def connection(self, value: int) -> None:
        self._set(CONNECTION, value)

    @property
    def error(self) -> int:
        return self._get(ERROR)

    @error.setter
    def error(self, value: int) -> None:
        self._set(ERROR, value)

    @property
    def evtchn_port(self) -> int:
        return self._get(EVTCHN_PORT)

    def empty(self) -> None:
        """The daemon's part of a reconnection: nothing is in either ring, and the indices begin anew."""
        for _, _, cons, prod in (XENSTORE_REQ, XENSTORE_RSP):
            self._words[cons // 4] = self._words[prod // 4] = 0
        fence.full_fence()

    def release(self) -> None:
        """Let go of the buffer. Idempotent."""
        self.released = True
        self._inbound.release()
        self._outbound.release()
        self._words.release()


def stopped(page: RingPage, peer: str) -> LinkDown | None:
    """What the store says in the error word, if it says that it stopped the connection."""
    error = page.error
    if not error or not page.features & Feature.ERROR:
        return None
    name = RingFault(error).name if error in RingFault._value2member_map_ else "unknown"
    return LinkDown(f"{peer} stopped the connection: error {error} ({name})")


def ask_reconnect(page: RingPage) -> bool:
    """Guest's end: asks for a fresh start if the store offers it; whether the other end must be notified."""
    if page.connection or not page.features & Feature.RECONNECTION:
        return False
    page.connection = ConnectionWord.RECONNECT
    return True


class RingTransport:
    """One end as a `Transport`. Its owner calls `on_event` from the event channel's handler.

    view:    the shared page, writable, 4096 bytes (at least 2080)
    notify:  kicks the other end
    side:    the guest's end, or the daemon's
    peer:    who is at the other end, for people
    on_reconnect: daemon's end only: the guest asked for a fresh start (the connection word); called after
             the rings were emptied and before the guest is told. The owner drops what it holds for it.
    reconnect: guest's end only: ask for that fresh start first, if the store offers it. A connection word
             found set is waited for in any case, as docs/misc/xenstore-ring.txt asks.
    Whatever the other end writes into the page, the worst is `connection_lost` with a PeerError.
    """

    max_outstanding = GUEST_OUTSTANDING

    def __init__(
        self,
        view: memoryview,
        notify: Callable[[], None],
        side: Side,
        peer: str,
        *,
        on_reconnect: Callable[[], None] | None = None,
        reconnect: bool = False,
    ) -> None:
        self.peer = peer
        self.page = RingPage(view, side)
        self._guest = side is Side.GUEST
        self._notify = notify
        self._on_reconnect = on_reconnect
        self._receiver: Receiver | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._poll: asyncio.TimerHandle | None = None
        self._out: deque[memoryview] = deque()
        self._backlog = 0
        self._paused = False
        self._closed = False
        self._why: Exception | None = None
        self._running = False
        self._reconnecting = False
        if self._guest:
            self._begin(reconnect)

    @property
    def backlog(self) -> int:
        return self._backlog

    def _begin(self, reconnect: bool) -> None:
        if reconnect and ask_reconnect(self.page):
            self._kick()
        self._reconnecting = not self._closed and bool(self.page.connection)

    # ---- Transport ----

    def start(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        if self._closed:
            self._loop.call_soon(receiver.connection_lost, self._why)
            return
        self._loop.call_soon(self.on_event)
        if not fence.FENCED:
            self._poll = self._loop.call_later(POLL_INTERVAL, self._look_again)

    def send(self, messages: Sequence[bytes]) -> None:
        if self._closed:
            return
        waiting = bool(self._out)
        for message in messages:
            if message:
                self._out.append(memoryview(message))
                self._backlog += len(message)
        if waiting:
            # The other end kicks when it has made room; `on_event` goes on, and says when all is gone.
            return
        try:
            wrote = self._push()
        except RingError as exc:
            self._broken(exc)
            return
        if wrote:
            self._kick()

    def pause(self, paused: bool) -> None:
        was, self._paused = self._paused, paused
        if was and not paused and self._loop is not None:
            self._loop.call_soon(self.on_event)

    def close(self) -> None:
        self._lost(None)

    def detach(self) -> None:
        """As `close`, but the receiver hears nothing: another transport takes over."""
        self._receiver = None
        self._lost(None)

    def fault(self, fault: RingFault, exc: Exception | None = None) -> None:
        """Daemon's end: says in the page why this connection stops, and stops it. `exc` is what our own
        receiver hears."""
        if not self._closed:
            self.page.error = fault
            self._kick()
            self._lost(exc)

    def notify_by(self, notify: Callable[[], None]) -> None:
        """The other end has another event channel from now on."""
        self._notify = notify

    # ---- the page ----

    def on_event(self) -> None:
        """The other end kicked, or may have. Never raises for what the other end did."""
        if self._closed or self._receiver is None or self._running:
            return
        self._running = True
        try:
            again = self._turn()
        except RingError as exc:
            self._broken(exc)
            return
        finally:
            self._running = False
        if again and self._loop is not None and not self._closed:
            self._loop.call_soon(self.on_event)

    def _turn(self) -> bool:
        """Whether work is left for another turn of the loop."""
        if not self._words_agree():
            return False
        had_backlog = False
        for _ in range(PASSES):
            # Each time: what a pass leaves waiting may be gone after the next, if the other end is quick.
            had_backlog = had_backlog or bool(self._backlog)
            wrote = self._push()
            data = b"" if self._paused else self.page.read()
            if wrote or data:
                self._kick()
            if data and self._receiver is not None:
                self._receiver.data_received(data)
            if self._closed:
                return False
            if not wrote and not data:
                break
        if had_backlog and not self._backlog:
            assert self._receiver is not None
            self._receiver.drained()
        return not self._closed and not self._paused and bool(self.page.readable)

    def _words_agree(self) -> bool:
        """False while (guest) the store resets the connection, or once it is down."""
        page = self.page
        if self._guest:
            if page.connection:
                return False
            self._reconnecting = False
            if down := stopped(page, self.peer):
                self._lost(down)
                return False
        elif page.connection == ConnectionWord.RECONNECT and page.features & Feature.RECONNECTION:
            self._out.clear()
            self._backlog = 0
            page.empty()
            page.error = RingFault.NONE
            if self._on_reconnect is not None:
                self._on_reconnect()
            if not self._closed:
                page.connection = ConnectionWord.CONNECTED
                self._kick()
        return not self._closed

    def _push(self) -> int:
        """Bytes of the backlog that went into the ring."""
        if self._guest and (self._reconnecting or self.page.connection):
            return 0
        total, out = 0, self._out
        while out:
            taken = self.page.write(out[0])
            total += taken
            if taken < len(out[0]):
                out[0] = out[0][taken:]
                break
            out.popleft()
        self._backlog -= total
        return total

    def _look_again(self) -> None:
        self._poll = None
        if not self._closed and self._loop is not None:
            self._poll = self._loop.call_later(POLL_INTERVAL, self._look_again)
            self.on_event()

    # ---- ends ----

    def _kick(self) -> None:
        try:
            self._notify()
        except (OSError, XenbusError) as exc:
            self._lost(LinkDown(f"cannot notify {self.peer}: {exc}"))

    def _broken(self, exc: RingError) -> None:
        if not self._guest:
            self.fault(RingFault.RINGIDX, PeerError(f"{self.peer}: {exc}"))
        self._lost(PeerError(f"{self.peer}: {exc}"))

    def _lost(self, exc: Exception | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._why = exc
        self._out.clear()
        self._backlog = 0
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        self.page.release()
        receiver, self._receiver = self._receiver, None
        if receiver is not None and self._loop is not None:
            self._loop.call_soon(receiver.connection_lost, exc)


class RingPipe:
    """The guest's end for a caller that blocks.

    wait: `wait(seconds)` returns when the channel was kicked, or after `seconds`; early is fine
    reconnect: as for `RingTransport`
    """

    max_outstanding = GUEST_OUTSTANDING

    def __init__(
        self,
        view: memoryview,
        notify: Callable[[], None],
        wait: Callable[[float], object],
        peer: str,
        *,
        reconnect: bool = False,
    ) -> None:
        self.peer = peer
        self.page = RingPage(view, Side.GUEST)
        self._notify = notify
        self._wait = wait
        self._inbox = bytearray()
        if reconnect and ask_reconnect(self.page):
            notify()

    def _up(self) -> bool:
        """Whether the rings may be touched. LinkDown if the connection is over."""
        if self.page.released:
            raise LinkDown("the connection was closed here")
        if self.page.connection:
            return False
        if down := stopped(self.page, self.peer):
            raise down
        return True

    def _pause(self, until: float, what: str) -> None:
        left = until - monotonic()
        if left <= 0:
            raise TimeoutError(f"{self.peer} {what}")
        self._wait(left if fence.FENCED else min(left, POLL_INTERVAL))

    def _take(self) -> None:
        try:
            data = self.page.read()
        except RingError as exc:
            raise LinkDown(f"{self.peer}: {exc}") from exc
        if data:
            self._inbox += data
            self._notify()

    def send(self, messages: Sequence[bytes], timeout: float) -> None:
        data = memoryview(b"".join(messages))
        until = monotonic() + timeout
        while data:
            taken = 0
            if self._up():
                try:
                    taken = self.page.write(data)
                except RingError as exc:
                    raise LinkDown(f"{self.peer}: {exc}") from exc
                if not taken and len(self._inbox) < INBOX_LIMIT:
                    # The store may wait for room in the other ring before it makes any in this one.
                    self._take()
            if taken:
                data = data[taken:]
                self._notify()
            else:
                self._pause(until, f"took nothing for {timeout:g} s")

    def receive(self, timeout: float) -> bytes:
        until = monotonic() + timeout
        while True:
            if self._up():
                self._take()
            if self._inbox:
                data = bytes(self._inbox)
                self._inbox.clear()
                return data
            self._pause(until, f"sent nothing for {timeout:g} s")

    def close(self) -> None:
        self.page.release()
