"""A net driver's end of the cable to its port: packets off the rings to it, its packets onto the rings.

Knows packets, the port, and its rings as lanes; knows no store, no states, no slots. Holds a batch in either
direction at most: who sent more waits for `ready`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol
from zlib import crc32

from xenbus.drivers.net.counters import Counters
from xenbus.drivers.net.frames import lower_all
from xenbus.drivers.net.packet import ALL, ETH_DATA_LEN, ETH_HLEN, VLAN_HLEN, Gso, Link, Packet, Port

# Seconds without a free slot after which packets for that ring are dropped (netback's rx_drain_timeout).
STALL: Final = 10.0
# The same where other rings' packets wait behind it.
STALL_SHARED: Final = 0.25
# The same for a peer that may never say that there is room again (netif.h, feature-rx-notify; as netback).
STALL_SILENT: Final = 0.03
# Packets that are spread over several rings at a time: as many may have to wait here for one of those.
PORTION: Final = 64


class Lane(Protocol):
    """A ring that packets go out on."""

    def send(self, packets: Sequence[Packet]) -> int:
        """As End.send. If it takes fewer, it calls `Cable.room(lane)` once it can take more."""
        ...


class Cable:
    """An End, for the port. The driver opens it with `up` and closes it with `down`.

    counters: of the device
    resume:   what the rings have may be delivered again
    on_link:  the port's link changed
    log:      for what people want to know
    """

    def __init__(
        self,
        counters: Counters,
        resume: Callable[[], None],
        on_link: Callable[[bool], None],
        log: Callable[[str], None],
    ) -> None:
        self.counters = counters
        self.stall, self.stall_shared = STALL, STALL_SHARED
        self.notified = True  # whether our peer says so when it gives room
        self._resume = resume
        self._on_link = on_link
        self._log = log
        self.port: Port | None = None
        self._link: Link | None = None  # the port's
        self._plain = True  # whether it needs what we deliver to be lowered
        self._left: Sequence[Packet] = ()
        self.blocked = False
        self.limit = ETH_DATA_LEN + ETH_HLEN + VLAN_HLEN
        self._lanes: Sequence[Lane] = ()
        self._held = False
        self._waiting: dict[Lane, list[Packet]] = {}
        self._stalled: set[Lane] = set()
        self._timer: asyncio.TimerHandle | None = None

    # -- its life

    def plug(self, port: Port) -> None:
        """Once: this is the far side from now on."""
        self.port = port
        port.start(self)

    async def unplug(self, *, leave: bool = False) -> None:
        """Down, and the port closed. leave: see Port. Idempotent."""
        self.down()
        port, self.port = self.port, None
        self._link = None
        if port is not None:
            await port.close(leave=leave)

    def up(self, lanes: Sequence[Lane], link: Link) -> None:
        """These rings take packets. link: what our peer takes"""
        self._lanes = lanes
        self._held = False
        if self.port is not None:
            self.port.link(link)

    def down(self) -> None:
        """No ring takes any more; what waits is dropped. Idempotent."""
        was, self._lanes = bool(self._lanes), ()
        self.counters.tx_dropped += sum(map(len, self._waiting.values()))
        self.counters.rx_dropped += len(self._left)
        self._left, self.blocked = (), False
        self._stalled.clear()
        self._no_wait()
        self._held = False
        if was and self.port is not None:
            self.port.link(None)
            self.port.ready()  # what it holds back for us is of no use

    def hold(self) -> None:
        """Take nothing from the port until `release`, and drop nothing: the domain is being suspended."""
        self._held = True

    def release(self) -> None:
        self._held = False
        if not self._waiting and self.port is not None:
            self.port.ready()

    @property
    def connected(self) -> bool:
        return bool(self._lanes)

    @property
    def carrier(self) -> bool:
        """Whether the port's link is up."""
        return self._link is not None

    @property
    def waiting(self) -> int:
        """Packets that we hold: for a ring, or for the port."""
        return sum(map(len, self._waiting.values())) + len(self._left)

    def leaves(self) -> dict[str, Callable[[], object]]:
        """For sysctl: what waits, the device's counts, and the port's own."""
        port = self.port
        found: dict[str, Callable[[], object]] = {"waiting": lambda: self.waiting, **self.counters.leaves()}
        if port is not None:
            found["port"] = lambda: port.name
            for name in port.counters():
                found[f"port.{name}"] = lambda name=name: port.counters().get(name, 0)  # type: ignore[misc]
        return found

    # -- from the rings to the port

    def deliver(self, packets: Sequence[Packet]) -> None:
        """Lowered to what the port takes. Afterwards look at `blocked`: then `resume` comes later."""
        port = self.port
        if self._link is None or port is None:
            self.counters.rx_dropped += len(packets)
            return
        if self._plain:
            packets = self._lowered(packets)
        if self.blocked:  # by another ring, while pages of this one's were mapped
            self._left = [*self._left, *packets]
            return
        taken = port.send(packets)
        if taken < len(packets):
            self._left = packets[taken:]
            self.blocked = True

    def _lowered(self, packets: Sequence[Packet]) -> Sequence[Packet]:
        assert self._link is not None
        found = lower_all(packets, self._link.offloads)
        for _ in range(found.wrong):
            self.counters.bad_rx("frame", "an offload of a packet that is no TCP or UDP, or of tiny segments")
        self.counters.rx_dropped += found.left
        return found.packets

    # -- End, for the port

    def send(self, packets: Sequence[Packet]) -> int:
        lanes = self._lanes
        if self._held or self._waiting:
            return 0
        if not lanes:
            self.counters.tx_dropped += len(packets)
            return len(packets)
        if len(lanes) > 1:
            for start in range(0, len(packets), PORTION):
                if self._waiting:
                    return start
                self._spread(packets[start : start + PORTION])
            return len(packets)
        lane = lanes[0]
        taken = lane.send(packets)
        if taken == len(packets):
            return taken
        if self._stalled:
            self.counters.tx_dropped += len(packets) - taken
            return len(packets)
        self._wait_for(lane, [])
        return taken

    def _spread(self, packets: Sequence[Packet]) -> None:
        """Each flow to a ring of its own: within a flow the order stays."""
        lanes = self._lanes
        parts: list[list[Packet]] = [[] for _ in lanes]
        for packet in packets:
            parts[flow(packet.data) % len(lanes)].append(packet)
        for lane, part in zip(lanes, parts, strict=True):
            if not part:
                continue
            rest = part[lane.send(part) :]
            if rest and lane in self._stalled:
                self.counters.tx_dropped += len(rest)
            elif rest:
                self._wait_for(lane, [replace(packet, data=bytes(packet.data)) for packet in rest])

    def _wait_for(self, lane: Lane, packets: list[Packet]) -> None:
        self._waiting[lane] = packets
        if self._timer is None:
            seconds = self.stall_shared if len(self._lanes) > 1 else self.stall
            if not self.notified:
                seconds = STALL_SILENT
            self._timer = asyncio.get_running_loop().call_later(seconds, self._stall)

    def _no_wait(self) -> None:
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stall(self) -> None:
        """A ring that takes nothing is its peer's loss; it must hold up nobody else."""
        self._timer = None
        self._stalled.update(self._waiting)
        self.counters.tx_stalls += len(self._waiting)
        self.counters.tx_dropped += sum(map(len, self._waiting.values()))
        self._log("the other end gives no room for packets: those for it are dropped until it does")
        self._no_wait()
        self._tell_port()

    def room(self, lane: Lane) -> None:
        """From a lane that had taken fewer than it was given."""
        self._stalled.discard(lane)
        left = self._waiting.pop(lane, None)
        if left is None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if left:
            rest = left[lane.send(left) :]
            if rest:
                self._wait_for(lane, rest)
        if not self._waiting:
            self._tell_port()
        elif self._timer is None:
            self._wait_for(*next(iter(self._waiting.items())))

    def _tell_port(self) -> None:
        if not self._held and self.port is not None:
            self.port.ready()

    def ready(self) -> None:
        port = self.port
        if not self.blocked or port is None:
            return
        left = self._left
        taken = port.send(left) if self._link is not None else len(left)
        self._left = left[taken:]
        if not self._left:
            self.blocked = False
            self._resume()

    def link(self, link: Link | None) -> None:
        before, self._link = self._link, link
        if link is not None:
            self._plain = link.offloads != ALL
            self.limit = link.mtu + ETH_HLEN + VLAN_HLEN
        elif self.blocked:
            self.counters.rx_dropped += len(self._left)
            self._left, self.blocked = (), False
            self._resume()
        if (before is None) != (link is None):
            self._on_link(link is not None)


def flow(data: bytes | bytearray | memoryview) -> int:
    """The same for all packets of a flow: addresses and ports of IPv4 and IPv6, otherwise the two MACs."""
    kind = data[12:14]
    if kind == b"\x08\x00":
        # Ports behind options or in fragments would differ: then the addresses alone.
        plain = len(data) > 38 and data[14] == 0x45 and not (data[20] & 0x3F or data[21])
        return crc32(data[26:38] if plain else data[26:34])
    if kind == b"\x86\xdd":
        return crc32(data[22:58] if len(data) > 58 and data[20] in (6, 17) else data[22:54])
    return crc32(data[:12])


def unfit(packet: Packet, link: Link) -> str:
    """Why the peer cannot be sent this packet; "" if it can."""
    size = len(packet.data)
    if size < ETH_HLEN:
        return f"a frame of {size} bytes: its header has {ETH_HLEN}"
    if packet.gso:
        offloads = link.offloads
        if not (offloads.tso4 if packet.gso is Gso.TCPV4 else offloads.tso6):
            return f"{packet.gso.name} for a peer that takes none"
        if not packet.gso_size or size > 0xFFFF:
            return f"a GSO frame of {size} bytes in segments of {packet.gso_size}"
    elif size > link.mtu + ETH_HLEN + VLAN_HLEN:
        return f"a frame of {size} bytes where the MTU is {link.mtu}"
    return ""
