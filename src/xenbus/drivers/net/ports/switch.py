"""A learning switch between the ports of one process (IEEE 802.1D, 7 and 8, without spanning trees).

Knows packets and a clock; knows no device, no loop but for `call_soon`. Every port has bounds of its own: a
slow one loses its own frames, one that floods is cut, one that invents addresses pushes out its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from xenbus.drivers.net.frames import Lowered, lower_all, segments_of
from xenbus.drivers.net.packet import ALL, ETH_HLEN, MAX_MTU, VLAN_HLEN, End, Gso, Link, Packet
from xenbus.errors import UsageError

AGE: Final = 300.0  # seconds after which an address that said nothing is forgotten (802.1D, table 7-5)
PORTS_MAX: Final = 256
_FRESH: Final = 1.0  # seconds: an address is looked at as just seen
ADDRESSES_MAX: Final = 256  # of one port
WAITING_PACKETS: Final = 256  # what a port keeps for an end that has no room...
WAITING_BYTES: Final = 1 << 20  # ...and how many bytes of it, at most
# Frames a second from one port that go to all others, and how many of them at once.
FLOOD_RATE: Final = 20_000.0
FLOOD_BURST: Final = 2_000.0

# 802.1D, table 7-10: the addresses that a bridge keeps to itself.
_RESERVED: Final = frozenset(bytes.fromhex("0180c20000") + bytes([last]) for last in range(16))


# What a batch is for ends of some offloads: made once, however many ports it goes to.
_Memo = dict[tuple[object, ...], Lowered]


@dataclass(slots=True)
class _Seen:
    port: SwitchPort
    at: float


class SwitchPort:
    """See Port: made by `Switch.plug`. rx is what came from the switch to the driver, tx the other way."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch
        self.driver: End | None = None
        self.peer: Link | None = None  # the driver's end of the link, as long as it is up
        self.addresses: dict[bytes, _Seen] = {}  # who was silent longest comes first
        self.own_source_only = False  # frames from another address than the driver's own are dropped
        self._waiting: deque[Packet] = deque()
        self._waiting_bytes = 0
        self._full = False
        self._allowance = FLOOD_BURST
        self._counted_at = switch.now()
        self.rx_packets = self.rx_bytes = self.rx_dropped = 0
        self.tx_packets = self.tx_bytes = self.tx_dropped = 0
        self.flooded = self.flood_dropped = self.spoofed = 0

    @property
    def name(self) -> str:
        return f"switch {self._switch.name}"

    @property
    def waiting(self) -> int:
        """Packets that the driver has no room for."""
        return len(self._waiting)

    def counters(self) -> dict[str, int]:
        names = "rx_packets rx_bytes rx_dropped tx_packets tx_bytes tx_dropped flooded flood_dropped spoofed"
        found = {name: getattr(self, name) for name in names.split()}
        return found | {"waiting": self.waiting, "addresses": len(self.addresses)}

    def start(self, driver: End) -> None:
        self.driver = driver
        self._switch.soon(self._announce)

    def _announce(self) -> None:
        if self.driver is not None:
            self.driver.link(Link(ALL, self._switch.mtu))

    async def close(self, *, leave: bool = False) -> None:
        self.link(None)
        self.driver = None
        self._switch.unplug(self)

    # -- what the driver calls

    def link(self, link: Link | None) -> None:
        self.peer = link
        self._full = False
        if link is None:
            self.rx_dropped += len(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._switch.forget(self)
        elif self._waiting:
            self.ready()

    def send(self, packets: Sequence[Packet]) -> int:
        """All are taken, always: what cannot go on is dropped."""
        if self.driver is not None:
            self._switch.forward(self, packets)
        return len(packets)

    def ready(self) -> None:
        self._full = False
        waiting, driver = self._waiting, self.driver
        if not waiting or driver is None:
            return
        taken = driver.send(list(waiting))
        for _ in range(taken):
            packet = waiting.popleft()
            self._waiting_bytes -= len(packet.data)
            self._count(packet)
        self._full = bool(waiting)

    # -- what the switch calls

    def deliver(self, packets: Sequence[Packet], lowered: _Memo) -> None:
        """Hand over, or keep what there is no room for, or drop it."""
        driver, peer = self.driver, self.peer
        if driver is None or peer is None:
            self.rx_dropped += len(packets)
            return
        if peer.offloads != ALL:
            key = (peer.offloads, *map(id, packets))
            if (found := lowered.get(key)) is None:
                found = lowered[key] = lower_all(packets, peer.offloads)
            self.rx_dropped += found.wrong + found.left
            packets = found.packets
        longest = peer.mtu + ETH_HLEN + VLAN_HLEN
        if any(len(packet.data) > longest for packet in packets):
            fits = [p for p in packets if len(p.data) <= longest or p.gso is not Gso.NONE]
            self.rx_dropped += len(packets) - len(fits)
            packets = fits
        taken = 0
        if not self._full and packets:
            taken = driver.send(packets)
            for packet in packets[:taken]:
                self._count(packet)
        if taken < len(packets):
            self._full = True
            self._keep(packets[taken:])

    def _keep(self, packets: Sequence[Packet]) -> None:
        """Copies: the sender's bytes are its own again when its call returns."""
        for packet in packets:
            size = len(packet.data)
            if len(self._waiting) >= WAITING_PACKETS or self._waiting_bytes + size > WAITING_BYTES:
                self.rx_dropped += 1
                continue
            self._waiting.append(replace(packet, data=bytes(packet.data)))
            self._waiting_bytes += size

    def _count(self, packet: Packet) -> None:
        self.rx_packets += 1
        self.rx_bytes += len(packet.data)

    def may_flood(self, now: float, count: int) -> bool:
        """Takes so many from what this port may send to all others."""
        self._allowance = min(FLOOD_BURST, self._allowance + (now - self._counted_at) * FLOOD_RATE)
        self._counted_at = now
        if self._allowance < count:
            self.flood_dropped += 1
            return False
        self._allowance -= count
        self.flooded += 1
        return True


class Switch:
    """`port = switch.plug()`; forwards from its first port on.

    now, soon: the loop's `time` and `call_soon`
    mtu:       the longest payload that is taken
    """

    def __init__(
        self,
        name: str,
        now: Callable[[], float] | None = None,
        soon: Callable[[Callable[[], None]], object] | None = None,
        mtu: int = MAX_MTU,
    ) -> None:
        self.name = name
        self.mtu = mtu
        self.now = now or asyncio.get_running_loop().time
        self.soon = soon or asyncio.get_running_loop().call_soon
        self.ports: list[SwitchPort] = []
        self._table: dict[bytes, _Seen] = {}
        self._forwarding = False
        self._later: deque[tuple[SwitchPort, Packet]] = deque()

    def plug(self) -> SwitchPort:
        """A port. UsageError if it has PORTS_MAX."""
        return self.add(SwitchPort(self))

    def add(self, port: SwitchPort) -> SwitchPort:
        """A port of a kind of its own."""
        if len(self.ports) >= PORTS_MAX:
            raise UsageError(f"switch {self.name}: all its {PORTS_MAX} ports are in use")
        self.ports.append(port)
        return port

    def unplug(self, port: SwitchPort) -> None:
        """Idempotent."""
        if port in self.ports:
            self.ports.remove(port)
        self.forget(port)

    def port_of(self, mac: bytes) -> SwitchPort | None:
        """Who was heard with this address, not too long ago."""
        seen = self._table.get(mac)
        if seen is None or self.now() - seen.at > AGE:
            return None
        return seen.port

    def forget(self, port: SwitchPort) -> None:
        """Every address of a port."""
        for mac in port.addresses:
            self._table.pop(mac, None)
        port.addresses.clear()

    def forward(self, source: SwitchPort, packets: Sequence[Packet]) -> None:
        """Each packet to where it goes; those of one port are handed over together, in their order."""
        if self._forwarding:  # an end answers from within its `send`: not on top of the stack that it is in
            self._postpone(source, packets)
            return
        self._forwarding = True
        try:
            self._forward(source, packets)
        finally:
            self._forwarding = False

    def _postpone(self, source: SwitchPort, packets: Sequence[Packet]) -> None:
        if not self._later:
            self.soon(self._forward_later)
        for packet in packets:
            if len(self._later) >= WAITING_PACKETS * 4:
                source.tx_dropped += 1
            else:
                self._later.append((source, replace(packet, data=bytes(packet.data))))

    def _forward_later(self) -> None:
        later, self._later = self._later, deque()
        while later:
            source, packet = later.popleft()
            batch = [packet]
            while later and later[0][0] is source:
                batch.append(later.popleft()[1])
            if source.driver is not None:
                self.forward(source, batch)

    def _forward(self, source: SwitchPort, packets: Sequence[Packet]) -> None:
        now = self.now()
        batches: dict[SwitchPort, list[Packet]] = {}
        for packet in packets:
            data = packet.data
            destination, origin = bytes(data[:6]), bytes(data[6:12])
            if len(data) < ETH_HLEN or origin[0] & 1 or destination in _RESERVED:
                source.tx_dropped += 1
                continue
            if source.own_source_only and (source.peer is None or origin != source.peer.mac):
                source.spoofed += 1
                continue
            source.tx_packets += 1
            source.tx_bytes += len(data)
            self._learn(source, origin, now)
            seen = None if destination[0] & 1 else self._table.get(destination)
            if seen is not None and now - seen.at <= AGE:
                if seen.port is not source:
                    batches.setdefault(seen.port, []).append(packet)
            elif source.may_flood(now, segments_of(packet)):
                for port in self.ports:
                    if port is not source and port.peer is not None:
                        batches.setdefault(port, []).append(packet)
        lowered: _Memo = {}
        for port, batch in batches.items():
            port.deliver(batch, lowered)

    def _learn(self, source: SwitchPort, mac: bytes, now: float) -> None:
        seen = self._table.get(mac)
        if seen is not None and seen.port is source and now - seen.at < _FRESH:
            return
        if seen is not None:
            del seen.port.addresses[mac]  # it has moved, or goes to the end of the line
        addresses = source.addresses
        if len(addresses) >= ADDRESSES_MAX:
            oldest = next(iter(addresses))
            del self._table[oldest], addresses[oldest]
        self._table[mac] = addresses[mac] = _Seen(source, now)
