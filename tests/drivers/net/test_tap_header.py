"""struct virtio_net_hdr (linux/virtio_net.h) both ways: a pair of sockets is the device."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

import pytest
from tests.support.ip_frames import ether, ipv4, ipv6, tcp, udp
from tests.support.net_ends import Sink, up
from tests.support.until import until

from xenbus.drivers.net.packet import ALL, PLAIN, Gso, Offloads, Packet
from xenbus.drivers.net.ports import tun
from xenbus.drivers.net.ports.schemes.tap import BATCH, TapOptions, TapPort

NEEDS_CSUM, DATA_VALID = 1, 2
TCPV4, UDP, TCPV6, UDP_L4, ECN = 1, 3, 4, 5, 0x80


class Device:
    """What a TunDevice is to a TapPort."""

    name = "played0"

    def __init__(self):
        ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.kernel.settimeout(5)
        self.fds = [ours.detach()]

    def take(self, offloads):
        pass

    set_mtu = set_carrier = take

    def close(self, *, leave=False):
        while self.fds:
            socket.socket(fileno=self.fds.pop()).close()
        self.kernel.close()


def with_port(check):
    async def run():
        device, driver = Device(), Sink()
        port = TapPort(device, TapOptions("played0"))
        port.start(driver)
        port.link(up(ALL))
        try:
            await check(port, device.kernel, driver)
        finally:
            await port.close()

    asyncio.run(run())


FRAME = ether(ipv4(tcp(bytes(3000), options=b"\1" * 12), 6))


@pytest.mark.parametrize(
    ("flags", "kind", "size", "packet"),
    [
        (0, 0, 0, Packet(FRAME)),
        (NEEDS_CSUM, 0, 0, Packet(FRAME, True, True)),
        (DATA_VALID, 0, 0, Packet(FRAME, False, True)),
        (NEEDS_CSUM, TCPV4, 1448, Packet(FRAME, True, True, Gso.TCPV4, 1448)),
        (NEEDS_CSUM, TCPV6, 1428, Packet(FRAME, True, True, Gso.TCPV6, 1428)),
        (NEEDS_CSUM, TCPV4 | ECN, 1448, Packet(FRAME, True, True, Gso.TCPV4, 1448)),
        (NEEDS_CSUM, UDP, 1448, None),
        (NEEDS_CSUM, UDP_L4, 1448, None),
    ],
)
def test_what_the_kernel_says_of_a_packet(flags, kind, size, packet):
    async def check(port, kernel, driver):
        last = Packet(ether(ipv4(udp(b"last"), 17)))
        for head, data in (((flags, kind, 54, size, 34, 16), FRAME), ((0,) * 6, last.data)):
            kernel.send(struct.pack("=BBHHHH", *head) + data)
        wanted = [last] if packet is None else [packet, last]
        await until(lambda: len(driver.got) == len(wanted))
        assert driver.got == wanted
        assert port.counters()["rx_dropped"] == (packet is None)

    with_port(check)


@pytest.mark.parametrize("raw", [b"", bytes(9), bytes(10), bytes(23), bytes(24)])
def test_what_has_no_header_or_nothing_behind_it_is_dropped(raw):
    """However much of it there is: the loop has its turn after a batch, and what follows is read."""

    async def check(port, kernel, driver):
        last = Packet(ether(ipv4(udp(b"last"), 17)))
        kernel.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 200:
                kernel.send(raw)
                sent += 1
        kernel.settimeout(5)
        port._readable(port._device.fds[0])
        assert port.counters()["rx_dropped"] == min(sent, BATCH)
        await until(lambda: port.counters()["rx_dropped"] == sent)
        kernel.send(bytes(10) + last.data)
        await until(lambda: driver.got == [last])

    with_port(check)


OPTIONS = b"\1" * 12
V4, V6 = ether(ipv4(tcp(bytes(3000), options=OPTIONS), 6)), ether(ipv6(tcp(bytes(3000), options=OPTIONS), 6))
TAGGED = ether(ipv4(tcp(bytes(3000)), 6), tags=(0x8100,))


@pytest.mark.parametrize(
    ("packet", "head"),
    [
        (Packet(V4), (0, 0, 0, 0, 0, 0)),
        (Packet(V4, False, True), (DATA_VALID, 0, 0, 0, 0, 0)),
        (Packet(V4, True, True), (NEEDS_CSUM, 0, 0, 0, 34, 16)),
        (Packet(V6, True, True), (NEEDS_CSUM, 0, 0, 0, 54, 16)),
        (Packet(ether(ipv4(udp(b"x"), 17)), True), (NEEDS_CSUM, 0, 0, 0, 34, 6)),
        (Packet(TAGGED, True), (NEEDS_CSUM, 0, 0, 0, 38, 16)),
        # hdr_len: all headers, with TCP's options
        (Packet(V4, True, True, Gso.TCPV4, 1448), (NEEDS_CSUM, TCPV4, 66, 1448, 34, 16)),
        (Packet(V6, True, True, Gso.TCPV6, 1428), (NEEDS_CSUM, TCPV6, 86, 1428, 54, 16)),
        (Packet(TAGGED, True, True, Gso.TCPV4, 1448), (NEEDS_CSUM, TCPV4, 58, 1448, 38, 16)),
        # What is not what it says
        (Packet(V4, True, True, Gso.TCPV6, 1448), None),
        (Packet(V6, True, True, Gso.TCPV4, 1448), None),
        (Packet(V4, True, True, Gso.TCPV4, 0), None),
        (Packet(ether(ipv4(udp(bytes(3000)), 17)), True, True, Gso.TCPV4, 1448), None),
        (Packet(ether(ipv4(bytes(40), 1)), True), None),
        (Packet(bytes(60), True, True, Gso.TCPV4, 1448), None),
    ],
)
def test_what_the_kernel_is_told_of_a_packet(packet, head):
    async def check(port, kernel, driver):
        assert port.send([packet, Packet(V4)]) == 2
        if head is not None:
            raw = kernel.recv(1 << 17)
            assert struct.unpack_from("=BBHHHH", raw) == head
            assert raw[10:] == packet.data
        assert kernel.recv(1 << 17)[10:] == V4
        assert port.counters()["tx_dropped"] == (head is None)

    with_port(check)


@pytest.mark.parametrize(
    ("offloads", "flags"),
    [
        (PLAIN, 0),
        (ALL, 1 | 2 | 4),
        (Offloads(csum=True), 1),
        (Offloads(csum6=True), 1),
        (Offloads(csum=True, csum6=True, tso4=True), 1 | 2),
        (Offloads(csum=True, csum6=True, tso6=True), 1 | 4),
    ],
)
def test_what_the_kernel_may_hand_over(offloads, flags, monkeypatch):
    """TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 (linux/if_tun.h), of each queue."""
    asked = []
    monkeypatch.setattr(tun.fcntl, "ioctl", lambda *given: asked.append(given))
    device = tun.TunDevice.__new__(tun.TunDevice)
    device.fds = [7, 8]
    device.take(offloads)
    assert asked == [(7, 0x400454D0, flags), (8, 0x400454D0, flags)]
