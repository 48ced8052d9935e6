"""`packet:`: the far side is Python. `await port.put(frame)`, `await port.get()`; needs no root, no device.

Knows packets. Behaves as a socket does: what nobody reads is dropped once so much waits, and counted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from xenbus.drivers.net.packet import ALL, PLAIN, End, Link, Packet
from xenbus.drivers.net.ports.registry import Target, port_scheme
from xenbus.errors import DeadlineError, LinkDown, UsageError

# Packets, and bytes of them, that wait for `get`.
MAX_PACKETS: Final = 1024
MAX_BYTES: Final = 4 << 20
# Seconds for the driver to be connected and to have room.
PATIENCE: Final = 30.0


class PacketPort:
    """offloads: False, whatever `get` gives is a plain frame; True, it may be a Packet of any kind.

    Its MTU is that of the device.
    """

    name = "packet"

    def __init__(self, *, offloads: bool = False) -> None:
        self._offloads = ALL if offloads else PLAIN
        self._driver: End | None = None
        self._received: deque[Packet] = deque()
        self._octets = 0
        self._closed = False
        self._full = False
        self._wakes_get: set[asyncio.Future[None]] = set()
        self._wakes_put: set[asyncio.Future[None]] = set()
        self.peer: Link | None = None
        self.dropped = 0

    # -- for programs

    async def get(self, seconds: float = PATIENCE) -> Packet:
        """The next packet. DeadlineError when none came in that time, LinkDown once it is closed."""
        await self._wait(self._wakes_get, lambda: bool(self._received), seconds, "a packet")
        packet = self._received.popleft()
        self._octets -= len(packet.data)
        return packet

    async def put(self, packet: Packet | bytes, seconds: float = PATIENCE) -> None:
        """Send a packet, once the driver has a link, and room. DeadlineError, LinkDown. That it was sent does
        not say that it arrives."""
        packet = packet if isinstance(packet, Packet) else Packet(packet)
        while True:
            await self._wait(self._wakes_put, self._can_send, seconds, "a link with room for a packet")
            assert self._driver is not None
            if self._driver.send((packet,)):
                return
            self._full = True

    @property
    def waiting(self) -> int:
        """Packets that `get` would give at once."""
        return len(self._received)

    def put_many(self, packets: Sequence[Packet]) -> int:
        """As many as there is room for now: how many that were."""
        if not self._can_send() or self._driver is None:
            return 0
        taken = self._driver.send(packets)
        self._full = taken < len(packets)
        return taken

    async def linked(self, seconds: float = PATIENCE) -> Link:
        """What the other end takes, once there is one. DeadlineError, LinkDown."""
        await self._wait(self._wakes_put, lambda: self.peer is not None, seconds, "a link")
        assert self.peer is not None
        return self.peer

    def _can_send(self) -> bool:
        return self.peer is not None and not self._full

    async def _wait(
        self, wakes: set[asyncio.Future[None]], condition: Callable[[], bool], seconds: float, what: str
    ) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while not condition():
            if self._closed:
                raise LinkDown("the port is closed")
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            wakes.add(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                raise DeadlineError(what, "the net device's other end", seconds) from None
            finally:
                wakes.discard(waiter)

    @staticmethod
    def _wake(wakes: set[asyncio.Future[None]]) -> None:
        for waiter in wakes:
            if not waiter.done():
                waiter.set_result(None)

    # -- Port

    def counters(self) -> dict[str, int]:
        return {"dropped": self.dropped, "waiting": self.waiting}

    def start(self, driver: End) -> None:
        self._driver = driver
        driver.link(Link(self._offloads))

    def send(self, packets: Sequence[Packet]) -> int:
        for packet in packets:
            size = len(packet.data)
            if len(self._received) >= MAX_PACKETS or self._octets + size > MAX_BYTES:
                self.dropped += 1
                continue
            self._octets += size
            data = packet.data
            self._received.append(packet if isinstance(data, bytes) else replace(packet, data=bytes(data)))
        self._wake(self._wakes_get)
        return len(packets)

    def ready(self) -> None:
        self._full = False
        self._wake(self._wakes_put)

    def link(self, link: Link | None) -> None:
        self.peer = link
        self._full = False
        if link is not None and self._driver is not None:
            self._driver.link(Link(self._offloads, link.mtu))
        self._wake(self._wakes_put)

    async def close(self, *, leave: bool = False) -> None:
        self._closed = True
        self._driver = self.peer = None
        self._wake(self._wakes_get)
        self._wake(self._wakes_put)


@port_scheme("packet")
async def open_packet(target: Target) -> PacketPort:
    """`packet:`, `packet:?offloads=1`."""
    offloads = target.options.pop("offloads", "0")
    target.finish_options()
    if target.rest or offloads not in ("0", "1"):
        raise UsageError(f"{target.text}: `packet:` has no name, and offloads is 0 or 1")
    return PacketPort(offloads=offloads == "1")
