"""A far side that has no room: what it does not take stays where it is, and nothing is lost or held twice."""

from __future__ import annotations

import asyncio

import pytest
import tests.support.slow_port  # noqa: F401 - registers `slow:`
from tests.drivers.net.test_pair import ip_frame
from tests.support.until import until
from tests.support.vif import frame, rig

from xenbus.bus import XenbusState
from xenbus.drivers.net import Packet, Xn, Xnb
from xenbus.drivers.net.packet import ALL, Link

S = XenbusState
pytestmark = pytest.mark.usefixtures("either_way")
COUNT = 600  # more than both rings


def with_slow(check, side, *, front=Xn, back=Xnb):
    """check(rig, the slow port, its driver's half, the other half's packet port)"""

    async def run():
        async with rig(front, back) as r:
            ports = {"front_port": "slow:x"} if side == "front" else {"port": "slow:x"}
            await r.plug(**ports)
            await r.states(S.CONNECTED, S.CONNECTED)
            await until(lambda: r.front.cable.connected and r.back.cable.connected)
            half, other = (r.front, r.back) if side == "front" else (r.back, r.front)
            await check(r, half.cable.port, half, other.cable.port)
            await r.gone()

    asyncio.run(run())


async def pour(port, sent):
    packets = [Packet(data) for data in sent]
    while packets:
        packets = packets[port.put_many(packets) :]
        await asyncio.sleep(0)


@pytest.mark.parametrize("queues", [1, 3])
@pytest.mark.parametrize("side", ["front", "back"])
def test_all_of_it_arrives_in_the_end(side, queues):
    async def check(r, slow, half, port):
        half.cable.stall = half.cable.stall_shared = 100
        for cable in (r.front.cable, r.back.cable):
            cable.stall = cable.stall_shared = 100
        # With several queues as many flows as there may be queues, and more.
        flows = 7 if queues > 1 else 1
        sent = [ip_frame(n % flows, n) for n in range(COUNT)]
        task = asyncio.ensure_future(pour(port, sent))
        # The rings fill up, and the program that sends has to wait.
        await until(lambda: half.cable.blocked)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not task.done()
        assert half.cable.waiting <= 64 * queues
        async with asyncio.timeout(10):
            while len(slow.got) < COUNT:
                slow.more(7)
                await asyncio.sleep(0)
            await task
        assert sorted(slow.got) == sorted(sent)
        for n in range(flows):
            assert [data for data in slow.got if data[35] == n] == sent[n::flows]
        for counters in (r.front.counters, r.back.counters):
            assert not counters.tx_dropped + counters.rx_dropped + counters.tx_errors

    with_slow(check, side, front=type("Xn", (Xn,), {"num_queues": queues}))


@pytest.mark.parametrize("side", ["front", "back"])
def test_its_link_goes_down_meanwhile(side):
    async def check(r, slow, half, port):
        await pour(port, [frame(60)] * 20)
        await until(lambda: half.cable.waiting == 20)
        slow.driver.link(None)
        assert half.cable.waiting == 0
        assert half.counters.rx_dropped == 20
        slow.driver.link(Link(ALL))
        slow.room = 1000
        await port.linked(5)
        await port.put(frame(61))
        await until(lambda: slow.got == [frame(61)])

    with_slow(check, side)


@pytest.mark.parametrize("side", ["front", "back"])
def test_the_device_goes_meanwhile(side):
    async def check(r, slow, half, port):
        await pour(port, [frame(60)] * 20)
        await until(lambda: half.cable.waiting == 20)
        await r.toolstack_close()
        await r.states(S.CLOSED, S.CLOSED)
        assert half.cable.waiting == 0
        assert half.counters.rx_dropped == 20
        assert slow.peer is None
        slow.more(10)
        assert not slow.got

    with_slow(check, side)


def test_pages_that_are_being_mapped_keep_the_order():
    """A kick that comes while the pages of a batch are mapped does not let the next batch overtake it."""

    class Burst(Xn):
        num_queues = 1

    async def check(r, slow, half, port):
        slow.room = 1000
        tx = half._links[0].tx
        sent = [frame(60, n) for n in range(40)]
        for data in sent:
            await port.put(data)
            tx.kick()
        await until(lambda: len(slow.got) == 40)
        assert slow.got == sent

    with_slow(check, "back", front=Burst)
