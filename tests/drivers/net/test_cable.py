"""The cable alone: several rings, of which one has no room. The lanes are played; flows are real."""

from __future__ import annotations

import asyncio

import pytest
from tests.drivers.net.test_pair import ip_frame
from tests.support.until import until

from xenbus.drivers.net.cable import Cable, flow
from xenbus.drivers.net.counters import Counters
from xenbus.drivers.net.packet import ALL, Link, Packet


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
        lanes[0].room = 100
        cable.room(lanes[0])
        port.put(*stuck)
        assert lanes[0].got == stuck and cable.counters.tx_stalls == 1

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
