"""`tap:NAME?OPTIONS`: a TAP device as a far side, checksum and segmentation offloads passed through.

Knows virtio_net_hdr (linux/virtio_net.h) and the event loop; the device's kernel side is ports/tun.py.

bridge:  a bridge to put it into; netns: a network namespace to open or make it in
mac:     its address; `guest` for the one that the driver's link has: for a guest's own stack behind the TAP
mtu:     its MTU; without, it follows the driver's link
queues:  how often it is opened (IFF_MULTI_QUEUE). One suffices, all are served by one loop; more are for a
         device that was made with `multi_queue`
up:      0 leaves it as it is, down if it is new
keep:    1: it outlives this process where that is killed or hands over, with its place in a bridge and all
         that others set of it; it goes when the port is closed in order, whoever made it
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from struct import Struct
from typing import Final

from xenbus.drivers.net.frames import checksum_at, lower_all
from xenbus.drivers.net.packet import (
    ALL,
    ETH_HLEN,
    MAX_FRAME,
    MAX_MTU,
    MIN_MTU,
    End,
    Gso,
    Link,
    Packet,
)
from xenbus.drivers.net.ports.mac import parse_mac
from xenbus.drivers.net.ports.registry import PortError, Target, port_scheme
from xenbus.drivers.net.ports.tun import BRIDGED_MAC, TunDevice, check_ifname, inside
from xenbus.errors import UsageError

log = logging.getLogger(__name__)

# struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
HEADER: Final = Struct("=BBHHHH")
_NEEDS_CSUM, _DATA_VALID = 1, 2
_TO_GSO: Final = {0: Gso.NONE, 1: Gso.TCPV4, 4: Gso.TCPV6}
_FROM_GSO: Final = {gso: number for number, gso in _TO_GSO.items()}
_ECN: Final = 0x80
_PLAIN_HEADER: Final = HEADER.pack(0, 0, 0, 0, 0, 0)
# Of what is nearly every packet: (where the transport begins, where in it the checksum is).
_TCP_CHECKSUM: Final = 16
_BLANK_HEADERS: Final = {
    (start, offset): HEADER.pack(_NEEDS_CSUM, 0, 0, 0, start, offset)
    for start in (34, 54)
    for offset in (_TCP_CHECKSUM, 6)
}
_VALID_HEADER: Final = HEADER.pack(_DATA_VALID, 0, 0, 0, 0, 0)

QUEUES_MAX: Final = 16
BATCH: Final = 64  # packets that one wake-up reads, at most
_ROOM: Final = HEADER.size + MAX_FRAME  # what a read needs to have free: a longer frame there is not
_SLAB: Final = 4 * _ROOM  # what they are read into: a batch ends when there is no room for the longest frame
_GONE: Final = frozenset({errno.EBADFD, errno.ENODEV, errno.EBADF})


@dataclass(slots=True, frozen=True)
class TapOptions:
    """See the module."""

    name: str
    bridge: str = ""
    netns: str = ""
    mac: bytes | None = None
    mac_of_guest: bool = False
    mtu: int = 0
    queues: int = 1
    up: bool = True
    keep: bool = False

    @classmethod
    def of(cls, target: Target) -> TapOptions:
        """UsageError."""
        said = target.options
        mac, bridge = said.pop("mac", ""), said.pop("bridge", "")
        options = cls(
            name=check_ifname(target.rest or "tap%d"),
            bridge=check_ifname(bridge) if bridge else "",
            netns=said.pop("netns", ""),
            mac=parse_mac(mac) if mac not in ("", "guest") else None,
            mac_of_guest=mac == "guest",
            mtu=_number(target, "mtu", 0, MIN_MTU, MAX_MTU),
            queues=_number(target, "queues", 1, 1, QUEUES_MAX),
            up=bool(_number(target, "up", 1, 0, 1)),
            keep=bool(_number(target, "keep", 0, 0, 1)),
        )
        target.finish_options()
        return options

    def open(self, target: str) -> TunDevice:
        """Blocks; for a thread of its own. PortError."""
        device = TunDevice(target, self.name, self.queues)
        try:
            if self.mac is not None or self.bridge:
                device.set_mac(self.mac or BRIDGED_MAC)
            if self.mtu:
                device.set_mtu(self.mtu)
            if self.bridge:
                device.join(self.bridge)
            if self.up:
                device.up()
            if self.keep:
                device.keep()
        except BaseException:
            device.close()
            raise
        return device


def _number(target: Target, key: str, default: int, least: int, most: int) -> int:
    text = target.options.pop(key, None)
    if text is None:
        return default
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UsageError(f"{target.text}: {key} is a number from {least} to {most}")
    return int(text)


@port_scheme("tap")
async def open_tap(target: Target) -> TapPort:
    """UsageError, PortError."""
    options = TapOptions.of(target)
    # A thread that ends: it may have entered another namespace, and the kernel's lock may keep it waiting.
    with ThreadPoolExecutor(1) as thread:
        device = await asyncio.get_running_loop().run_in_executor(
            thread, lambda: inside(options.netns, target.text, lambda: options.open(target.text))
        )
    return TapPort(device, options)


class TapPort:
    """See Port. rx is what came out of the TAP device, tx what went into it."""

    def __init__(self, device: TunDevice, options: TapOptions) -> None:
        self._device = device
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._driver: End | None = None
        self._link: Link | None = None
        self._slab = bytearray(_SLAB)
        self._view = memoryview(self._slab)
        self._rest: Sequence[Packet] = []  # what the driver had no room for
        self._reading = False
        self._full = False
        self._gone = False
        self.rx_packets = self.rx_bytes = self.rx_gso = self.rx_dropped = 0
        self.tx_packets = self.tx_bytes = self.tx_gso = self.tx_dropped = self.tx_errors = 0

    @property
    def name(self) -> str:
        return f"tap {self._device.name}"

    @property
    def interface(self) -> str:
        """The device's name in its namespace."""
        return self._device.name

    def counters(self) -> dict[str, int]:
        names = "rx_packets rx_bytes rx_gso rx_dropped tx_packets tx_bytes tx_gso tx_dropped tx_errors"
        return {name: getattr(self, name) for name in names.split()}

    def start(self, driver: End) -> None:
        self._driver = driver
        self._set_carrier(False)
        self._loop.call_soon(self._announce)

    def _announce(self) -> None:
        if self._driver is not None and self._device.fds:
            self._driver.link(Link(ALL, self._options.mtu or MAX_MTU))

    async def close(self, *, leave: bool = False) -> None:
        self._set_reading(False)
        if self._full:
            self._loop.remove_writer(self._device.fds[0])
        self._driver, self._full = None, False
        self._rest = []
        self._device.close(leave=leave)

    # -- what the driver calls

    def link(self, link: Link | None) -> None:
        if self._driver is None:
            return
        self._link = link
        if link is None:
            self.rx_dropped += len(self._rest)
            self._rest = []
        self._set_reading(link is not None and not self._rest)
        if link is not None and not self._gone:
            self._follow(link)
        self._set_carrier(link is not None)

    def ready(self) -> None:
        if self._link is None:
            return
        rest, self._rest = self._rest, []
        if self._hand_over(rest):
            self._set_reading(True)

    def send(self, packets: Sequence[Packet]) -> int:
        """One write a packet: the kernel takes no more at once."""
        fds = self._device.fds
        if not fds:
            return len(packets)
        fd, writev = fds[0], os.writev
        taken = sent = octets = 0
        for packet in packets:
            data = packet.data
            if packet.csum_blank or packet.data_validated or packet.gso:
                header = self._header_of(packet)
            else:
                header = _PLAIN_HEADER
            if header is None:
                self.tx_dropped += 1
            else:
                try:
                    writev(fd, (header, data))
                except BlockingIOError:
                    self._wait_writable()
                    break
                except OSError as error:
                    # EIO: the device is down. EINVAL: the kernel finds the headers to be nonsense.
                    self._refused(error)
                else:
                    sent += 1
                    octets += len(data)
            taken += 1
        self.tx_packets += sent
        self.tx_bytes += octets
        return taken

    def _header_of(self, packet: Packet) -> bytes | None:
        """None for a packet that says of itself what its headers do not. More of it the kernel checks."""
        if packet.gso is Gso.NONE and not packet.csum_blank:
            return _VALID_HEADER if packet.data_validated else _PLAIN_HEADER
        data, is_gso = packet.data, packet.gso is not Gso.NONE
        found = checksum_at(data, gso=is_gso)
        if found is None:
            return None
        version, start, offset = found
        if not is_gso:
            return _BLANK_HEADERS.get((start, offset)) or HEADER.pack(_NEEDS_CSUM, 0, 0, 0, start, offset)
        if version != (4 if packet.gso is Gso.TCPV4 else 6) or offset != _TCP_CHECKSUM:
            return None
        if not 0 < packet.gso_size <= 0xFFFF:
            return None
        self.tx_gso += 1
        length = start + (data[start + 12] >> 4) * 4
        return HEADER.pack(_NEEDS_CSUM, _FROM_GSO[packet.gso], length, packet.gso_size, start, offset)

    def _refused(self, error: OSError) -> None:
        if error.errno == errno.EIO:
            self.tx_dropped += 1
            return
        self.tx_errors += 1
        if error.errno in _GONE:
            self._vanished(error)

    def _wait_writable(self) -> None:
        if not self._full:
            self._full = True
            self._loop.add_writer(self._device.fds[0], self._writable)

    def _writable(self) -> None:
        self._loop.remove_writer(self._device.fds[0])
        self._full = False
        if self._driver is not None:
            self._driver.ready()

    # -- what the kernel says

    def _set_reading(self, wanted: bool) -> None:
        wanted = wanted and not self._gone
        if wanted == self._reading:
            return
        self._reading = wanted
        for fd in self._device.fds:
            if wanted:
                self._loop.add_reader(fd, self._readable, fd)
            else:
                self._loop.remove_reader(fd)

    def _readable(self, fd: int) -> None:
        """A batch, handed over as one. What the driver has no room for stays in the slab until it has."""
        view, slab, at, readv, size = self._view, self._slab, 0, os.readv, HEADER.size
        packets: list[Packet] = []
        try:
            for _ in range(BATCH):
                if at + _ROOM > _SLAB:
                    break
                length = readv(fd, (view[at : at + _ROOM],))
                if length <= size + ETH_HLEN:
                    self.rx_dropped += 1
                    continue
                packet = Packet(view[at + size : at + length])
                # flags, gso_type
                if not slab[at] | slab[at + 1] or self._set_offloads(packet, at):
                    packets.append(packet)
                    self.rx_bytes += length - size
                at += length + 1 & ~1
        except BlockingIOError:
            pass
        except OSError as error:
            self._vanished(error)
        self.rx_packets += len(packets)
        if packets and not self._hand_over(packets):
            self._set_reading(False)

    def _set_offloads(self, packet: Packet, at: int) -> bool:
        """As its header, there in the slab, says; False for a kind that nobody asked for."""
        flags, kind, _, size, _, _ = HEADER.unpack_from(self._slab, at)
        gso = _TO_GSO.get(kind & ~_ECN)
        if gso is None:
            self.rx_dropped += 1
            return False
        packet.csum_blank = bool(flags & _NEEDS_CSUM)
        packet.data_validated = bool(flags & (_NEEDS_CSUM | _DATA_VALID))
        if gso is not Gso.NONE:
            packet.gso, packet.gso_size = gso, size
            self.rx_gso += 1
        return True

    def _hand_over(self, packets: Sequence[Packet]) -> bool:
        """False: the driver is full, and calls `ready`."""
        driver, link = self._driver, self._link
        if driver is None or link is None:
            self.rx_dropped += len(packets)
            return True
        if link.offloads != ALL:
            # Of what the kernel made before it knew, and the one kind of checksum that it can't be told.
            found = lower_all(packets, link.offloads)
            self.rx_dropped += found.wrong + found.left
            packets = found.packets
        taken = driver.send(packets)
        self._rest = packets[taken:]
        return not self._rest

    def _vanished(self, error: OSError) -> None:
        """Somebody deleted the device: there is nothing to read from any more."""
        self._set_reading(False)
        if not self._gone:
            self._gone = True
            log.error("%s: somebody deleted it (%s): attach the device anew", self.name, error.strerror)
        if self._driver is not None:
            self._driver.link(None)

    # -- the device follows the driver's link

    def _follow(self, link: Link) -> None:
        try:
            self._device.take(link.offloads)
            if not self._options.mtu and link.mtu:
                self._device.set_mtu(link.mtu)
            if self._options.mac_of_guest and link.mac is not None:
                self._device.set_mac(link.mac)
        except (PortError, OSError) as error:
            log.warning("%s keeps what it had: %s", self.name, error)

    def _set_carrier(self, up: bool) -> None:
        if self._gone:
            return
        try:
            self._device.set_carrier(up)
        except OSError as error:
            log.warning("%s: carrier: %s", self.name, error.strerror)
