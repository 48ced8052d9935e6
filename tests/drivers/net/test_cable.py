"""The cable alone: several rings, of which one has no room. The lanes are played; flows are real."""

from __future__ import annotations

import asyncio

import pytest
from tests.drivers.net.test_pair import ip_frame
from tests.support.ip_frames import ether, ipv4, ipv6
from tests.support.until import until

from xenbus.drivers.net.cable import Cable, flow, unfit
from xenbus.drivers.net.counters import Counters
from xenbus.drivers.net.packet import ALL, PLAIN, Gso, Link, Offloads, Packet


class Lane:
    """room: packets that it takes"""

    def __init__(self, room):
        self.room = room
        self.got = []

    def send(self, packets):
        taken = min(self.room, len(packets))
        self.room -= taken
        self.got += [bytes(packet.data) for packet in packets[:taken]]
        return taken


class Port:
    """Sends what it is given as soon as there is room, and remembers the links that it was told."""

    name = "played"

    def __init__(self):
        self.waiting = []

    def start(self, driver):
        self.driver = driver

    def link(self, link):
        pass

    def put(self, *frames):
        self.waiting += [Packet(frame) for frame in frames]
        self.ready()

    def ready(self):
        taken = self.driver.send(self.waiting)
        del self.waiting[:taken]

    async def close(self, *, leave=False):
        pass


def of_lane(number, count):
    """Frames of flows that go to that one of two lanes."""
    made = (ip_frame(n % 50, n) for n in range(10_000))
    found = [frame for frame in made if flow(frame) % 2 == number]
    return found[:count]


def with_cable(check, rooms=(0, 1000)):
    async def run():
        cable = Cable(Counters(), lambda: None, lambda up: None, said.append)
        port, lanes = Port(), [Lane(room) for room in rooms]
        cable.plug(port)
        cable.up(lanes, Link(ALL))
        await check(cable, port, lanes)
        cable.down()
        assert not cable.waiting
        await cable.unplug()

    said: list[str] = []
    asyncio.run(run())
    return said


def test_a_ring_without_room_holds_up_the_others_for_a_moment_only():
    async def check(cable, port, lanes):
        cable.stall, cable.stall_shared = 100, 0.02
        stuck, free = of_lane(0, 5), of_lane(1, 5)
        port.put(*stuck)
        port.put(*free)
        assert not lanes[1].got  # the order of the port is kept for that long
        await until(lambda: lanes[1].got == free)
        assert cable.counters.tx_stalls == 1 and cable.counters.tx_dropped == 5
        # Given up: what is for it is dropped at once, until it has room again.
        port.put(*stuck, *free)
        assert cable.counters.tx_dropped == 10 and lanes[1].got == [*free, *free]
        lanes[0].room = 2
        cable.room(lanes[0])
        port.put(*stuck)
        assert lanes[0].got == stuck[:2] and cable.waiting == 3
        lanes[0].room = 100
        cable.room(lanes[0])
        assert lanes[0].got == stuck and (cable.counters.tx_stalls, cable.counters.tx_dropped) == (1, 10)

    assert len(with_cable(check)) == 1


def test_one_ring_alone_is_waited_for_longer():
    async def check(cable, port, lanes):
        cable.stall, cable.stall_shared = 100, 0
        frames = of_lane(0, 5)
        port.put(*frames)
        await asyncio.sleep(0.01)
        assert port.waiting and not cable.counters.tx_dropped
        lanes[0].room = 5
        cable.room(lanes[0])
        assert lanes[0].got == frames and not port.waiting

    assert not with_cable(check, rooms=(0,))


def ipv4_frame(port, *, fragment=0, options=b"", protocol=17):
    """Fragments have what they have where the ports would be."""
    packet = bytearray(ipv4(port.to_bytes(2, "big") + bytes(46), protocol, options))
    packet[6:8] = fragment.to_bytes(2, "big")
    return ether(bytes(packet))


def test_what_belongs_together_is_one_flow():
    plain = {flow(ipv4_frame(port)) for port in range(100)}
    assert len(plain) == 100 and len({value % 4 for value in plain}) == 4
    # More to come, an offset, options: no ports to go by, and all fragments have to keep their order.
    for strange in ({"fragment": 0x2000}, {"fragment": 0x2005}, {"fragment": 0x0100}, {"options": b"\1" * 8}):
        assert len({flow(ipv4_frame(port, **strange)) for port in range(100)}) == 1, strange
    v6 = {flow(ether(ipv6(port.to_bytes(2, "big") + bytes(46), 17))) for port in range(100)}
    assert len(v6) == 100
    assert len({flow(ether(ipv6(bytes([n]) + bytes(46), 58))) for n in range(100)}) == 1
    assert flow(b"\1" * 12 + b"\x08\x06" + bytes(46)) == flow(b"\1" * 12 + b"\x08\x06" + b"\2" * 46)
    for size in range(14, 70):  # nothing is read behind a frame's end
        for head in (b"\x08\x00\x45", b"\x86\xdd\x60"):
            flow((bytes(12) + head).ljust(size, b"\6")[:size])


@pytest.mark.parametrize("rooms", [(0,), (0, 0)])
def test_what_is_held_for_a_suspend_goes_on_afterwards(rooms):
    async def check(cable, port, lanes):
        cable.hold()
        port.put(*of_lane(0, 3))
        assert len(port.waiting) == 3
        for lane in lanes:
            lane.room = 10
        cable.release()
        assert not port.waiting and len(lanes[0].got) == 3

    with_cable(check, rooms)


@pytest.mark.parametrize(
    ("packet", "offloads", "says"),
    [
        (Packet(bytes(13)), ALL, "13 bytes: its header has 14"),
        (Packet(bytes(14)), ALL, ""),
        (Packet(bytes(1518)), PLAIN, ""),
        (Packet(bytes(1519)), ALL, "1519 bytes where the MTU is 1500"),
        (Packet(bytes(65535), True, True, Gso.TCPV4, 1448), ALL, ""),
        (Packet(bytes(65536), True, True, Gso.TCPV4, 1448), ALL, "65536 bytes in segments of 1448"),
        (Packet(bytes(3000), True, True, Gso.TCPV4, 0), ALL, "in segments of 0"),
        (
            Packet(bytes(3000), True, True, Gso.TCPV4, 1448),
            Offloads(True, True, False, True),
            "TCPV4 for a peer",
        ),
        (
            Packet(bytes(3000), True, True, Gso.TCPV6, 1448),
            Offloads(True, True, True, False),
            "TCPV6 for a peer",
        ),
    ],
)
def test_what_a_peer_cannot_be_sent(packet, offloads, says):
    assert says in unfit(packet, Link(offloads))
    assert bool(says) == bool(unfit(packet, Link(offloads)))
