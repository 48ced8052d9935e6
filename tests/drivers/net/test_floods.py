"""xnb under a flood, or before a far side that reads nothing: bounded, and the others are served."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.ip_frames import ether, ipv4, tcp
from tests.support.raw_vif import DATA_PAGES, RawFront, still_serves, with_raw_front
from tests.support.split import use
from tests.support.until import until
from tests.support.vif import frame, rig

from xenbus.bus import XenbusState
from xenbus.drivers.net import Gso, Xn, Xnb, frames, netif
from xenbus.drivers.net.netif import (
    NETIF_RSP_OKAY,
    TX_EXTRA_INFO,
    TX_MORE_DATA,
)
from xenbus.drivers.net.xnb_tx import BATCH, WORK_PER_WAKEUP

S = XenbusState
pytestmark = pytest.mark.usefixtures("either_way")


def test_nobody_reads_on_the_far_side():
    """The packet interface drops what nobody takes: the guest is answered all the same, memory is bounded."""

    async def check(r, front):
        for n in range(40):
            for ident in range(64):
                front.put(60, ident=ident)
            front.push()
            await front.answered(64 * (n + 1))
        assert r.far.counters() == {"dropped": 40 * 64 - 1024, "waiting": 1024}

    with_raw_front(check)


def test_nobody_reads_long_packets_on_the_far_side():
    """4 MiB of them are kept, however few that are."""

    async def check(r, front):
        for n in range(80):
            for slot in range(16):
                more = TX_MORE_DATA if slot < 15 else 0
                front.put(
                    4096 * 15 + 4000 if not slot else 4096 if more else 4000, flags=more | 3 * (not slot)
                )
            front.push()
            await front.answered(16 * (n + 1))
        assert r.back.counters.rx_packets == 80 and not r.back.counters.rx_errors
        kept = (4 << 20) // (4096 * 15 + 4000)
        assert r.far.counters() == {"dropped": 80 - kept, "waiting": kept}

    with_raw_front(check, mtu="65521")


def test_a_flood_does_not_starve_the_loop_or_another_guest():
    """A front that refills its ring whenever it is asked, beside one that sends a frame now and then."""

    class Flood(RawFront):
        rounds = 0

        def kicked(self):
            super().kicked()
            if self.flooding:
                self.flood()

        flooding = False

        def flood(self):
            self.rounds += 1
            while self.tx.free():
                self.put(60, ident=1)
            self.tx.push_requests()
            self.channel.notify()

    async def run():
        async with rig(front=Xn) as r:
            await r.up()
            r.world.registry._drivers.clear()
            use(r.world, Flood, Xnb, "vif")
            good = r.front, r.back
            r.devid = 1
            await r.plug()
            await r.states(S.CONNECTED, S.CONNECTED)
            r.front.flooding = True
            r.front.flood()
            flood = r.front
            for n in range(100):
                rounds = flood.rounds
                await good[0].cable.port.put(frame(60, n))
                assert (await good[1].cable.port.get(5)).data == frame(60, n)
                await until(lambda rounds=rounds: flood.rounds > rounds)
            flood.flooding = False

    asyncio.run(run())


def test_a_guest_that_refills_while_it_is_served_does_not_keep_the_loop():
    """Another CPU puts as fast as we take: after some hundred slots the loop has its turn."""

    async def check(r, front):
        await still_serves(r, front)  # its pages are known from here on
        loop, taken, turns = asyncio.get_running_loop(), 0, [0]
        real = r.far.send

        def send(packets):
            nonlocal taken
            taken += len(packets)
            turns[-1] += len(packets)
            front.kicked()
            while taken < 5000 and front.tx.free():
                front.put(60)
            front.tx.push_requests()
            return real(packets)

        def turn():
            turns.append(0)
            if taken < 5000:
                loop.call_soon(turn)

        r.far.send = send
        front.put(60)
        loop.call_soon(turn)
        front.push()
        await until(lambda: taken >= 5000)
        assert max(turns) <= WORK_PER_WAKEUP + BATCH

    with_raw_front(check)


@pytest.mark.parametrize("size", [1, 4])
def test_packets_of_tiny_segments_take_little_of_our_time(size):
    """A slot of 4 KiB may stand for 4000 packets: the loop must not be in there until all are made."""

    async def check(r, front):
        data = ether(ipv4(tcp(bytes(4000)), 6))
        front.data.view[: len(data)] = data
        for ident in range(100):
            front.put(len(data), flags=3 | TX_EXTRA_INFO, ident=ident)
            front.put_extra(netif.gso_extra(Gso.TCPV4, size).ljust(netif.TX_SLOT_SIZE, b"\0"))
        front.push()
        await front.answered(200)
        counters = r.far.counters()
        made = counters["waiting"] + counters["dropped"]
        assert made < 4 * (frames.LOWERED_MAX + frames.SEGMENTS_MAX)
        assert r.back.counters.rx_errors == (100 if size == 1 else 0)
        assert r.back.counters.rx_dropped == (0 if size == 1 else 100 - made // 1000)
        while r.far.waiting:
            await r.far.get()
        await still_serves(r, front)

    with_raw_front(check, port="packet:")


def test_all_pages_at_once():
    """Every slot of both rings, each page used many times over."""

    async def check(r, front):
        for n in range(256):
            front.put(60, page=n % DATA_PAGES, ident=n)
        front.push()
        answers = await front.answered(256)
        assert answers == [(n, NETIF_RSP_OKAY) for n in range(256)]
        assert not r.back.counters.rx_errors

    with_raw_front(check)
