"""One connection of a console: bytes between the ring and what is behind it, while both ends are there.

Knows a ring and an event channel. Neither side ever waits here: what there is no room for stays where it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from xenbus.drivers.console.consif import ConsoleRing
from xenbus.errors import PeerError
from xenbus.hypervisor.interface import Channel

# A peer that kicks more often than that within PERIOD is not listened to for the rest of it.
PERIOD = 0.1  # seconds
KICKS_MAX = 256


class Behind(Protocol):
    """What is behind one end of a console."""

    def room(self) -> int:
        """Bytes that `put` may be called with."""
        ...

    def put(self, data: bytes) -> None:
        """What the peer sent."""
        ...

    def peek(self) -> bytes | bytearray | memoryview:
        """What is to be sent, as much as is there."""
        ...

    def sent(self, count: int) -> None:
        """So many of them went."""
        ...


class ConsoleLink:
    """`pump` after anything changed behind it; `kicked` is the channel's handler.

    on_broken: the peer's indices are nonsense: nothing more is read or written
    """

    def __init__(self, ring: ConsoleRing, behind: Behind, on_broken: Callable[[PeerError], None]) -> None:
        self._ring = ring
        self._behind = behind
        self._on_broken = on_broken
        self._channel: Channel | None = None
        self._loop = asyncio.get_running_loop()
        self._kicks = 0
        self._period_ends = 0.0
        self._unmasking: asyncio.TimerHandle | None = None
        self.throttled = 0
        self.on_drained: Callable[[], None] | None = None

    def start(self, channel: Channel) -> None:
        """Move bytes from now on; what waits on the ring is taken at once."""
        self._channel = channel
        self.pump()
        channel.notify()  # whoever was there before us may not have come to it

    def stop(self) -> None:
        """No byte moves any more, and the page is let go. Idempotent."""
        self._channel = None
        if self._unmasking is not None:
            self._unmasking.cancel()
            self._unmasking = None
        self._ring.release()

    def hold(self) -> None:
        """No byte moves until `start`."""
        self._channel = None

    def kicked(self) -> None:
        channel = self._channel
        if channel is None:
            return
        now = self._loop.time()
        if now >= self._period_ends:
            self._period_ends, self._kicks = now + PERIOD, 0
        self._kicks += 1
        if self._kicks > KICKS_MAX and self._unmasking is None:
            self.throttled += 1
            channel.mask()
            self._unmasking = self._loop.call_at(self._period_ends, self._unmask)
        self.pump()

    def _unmask(self) -> None:
        self._unmasking = None
        if self._channel is not None:
            self._channel.unmask()

    def pump(self) -> None:
        """What fits, in both directions, once: the peer kicks after each of its moves."""
        channel, ring, behind = self._channel, self._ring, self._behind
        if channel is None:
            return
        try:
            moved = 0
            room = behind.room()
            if room > 0 and (data := ring.receive.read(room)):
                behind.put(data)
                moved += len(data)
            if (waiting := behind.peek()) and (count := ring.transmit.write(waiting)):
                behind.sent(count)
                moved += count
            if moved:
                channel.notify()
            unread = ring.transmit.readable  # checks the peer's index, even if we have nothing to send
            if self.on_drained is not None and not unread:
                self.on_drained()
        except PeerError as error:
            self._channel = None
            self._on_broken(error)

    def take_rest(self) -> bytes:
        """What the peer sent and nobody had room for: at most the ring's size. RingError."""
        return self._ring.receive.read()

    def unread(self) -> bytes:
        """What we sent and the peer has not taken, which it won't any more. RingError."""
        return self._ring.transmit.unread()
