"""What the bus costs: a guest's default quotas for 60 devices, bytes a device, and that more devices cost no
more."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

import pytest
from tests.support.split import QUICK, Recorder, S, ToyBack, ToyFront, settle, use, world
from tests.support.tap import Tap
from tests.support.until import until

from xenbus import bus, newbus
from xenbus.bus import Settings, XenbusDriver
from xenbus.xenstore.wire.message import Op


def test_sixty_devices_stay_within_a_guests_quotas():
    """128 watches, 10 transactions, 1000 nodes: with both buses and control/shutdown watched."""

    async def run():
        async with world() as w:
            use(w, ToyFront, ToyBack)
            tap = Tap()
            dom0, guest = await w.guest(0), await w.guest(1, QUICK, tap.around)
            await dom0.attach()
            await guest.attach()
            await guest.store.watch("control/shutdown", lambda path: None)
            for devid in range(60):
                await w.plug(devid=devid)
            await until(lambda: sum(d.state is S.CONNECTED for d in guest.front.devices.values()) == 60)
            assert guest.store.counts()["watches"] == 2 * 60 + 2 + 1 <= 128
            assert all(not dev.counters.get("errors") for dev in guest.front.devices.values())
            assert open_at_once(tap) <= 4

    asyncio.run(run())


def open_at_once(tap):
    """The most transactions that were under way together, counted from START's sending to END's."""
    most = now = 0
    for message in tap.ops(Op.TRANSACTION_START, Op.TRANSACTION_END):
        now += 1 if message.op == Op.TRANSACTION_START else -1
        most = max(most, now)
    return most


def test_at_most_four_transactions_at_a_time():
    """Sixty devices write their state together."""

    async def run():
        async with world() as w:
            use(w, Recorder, None)
            tap = Tap()
            guest = await w.guest(1, QUICK, tap.around)
            await guest.attach()
            for devid in range(60):
                await w.plug(devid=devid)
            await until(lambda: sum(d.device.attached for d in guest.front.devices.values()) == 60)
            devs = list(guest.front.devices.values())
            assert all(await asyncio.gather(*(dev.set_state(S.CONNECTED) for dev in devs)))
            assert open_at_once(tap) == 4

    asyncio.run(run())


class Nothing(XenbusDriver):
    """The smallest driver, so that what is measured is the bus's."""

    __slots__ = ()
    name = "nothing"


async def bytes_a_device(count):
    async with world() as w:
        use(w, Nothing, Nothing)
        guest = await w.guest(0, Settings(detach=0.01))
        await guest.attach()
        await w.plug(devid=10_000, front=0)
        await until(lambda: guest.front.devices and guest.back.devices)
        await settle(guest)
        for devid in range(count):
            await w.plug(devid=devid, front=0)
            if devid == 0:
                await settle(guest)
                gc.collect()
        gc.collect()
        tracemalloc.start()
        try:
            for devid in range(count, 2 * count):
                await w.plug(devid=devid, front=0)
            await until(lambda: len(guest.front.devices) == len(guest.back.devices) == 2 * count + 1, 30)
            await settle(guest)
            gc.collect()
            snapshot = tracemalloc.take_snapshot()
        finally:
            tracemalloc.stop()
        ours = [tracemalloc.Filter(True, f"{p.__path__[0]}/*") for p in (bus, newbus)]
        return sum(stat.size for stat in snapshot.filter_traces(ours).statistics("filename")) / (2 * count)


def test_bytes_a_device():
    """newbus and bus objects together: at most 2 KB a device (the driver and the store are not in it)."""
    size = asyncio.run(bytes_a_device(50))
    print(f"{size:.0f} bytes a device")
    assert size <= 2048


@pytest.mark.slow
def test_twice_the_devices_cost_twice():
    """The number of requests is what it is per device, however many there are."""

    async def requests(count):
        async with world() as w:
            use(w, Nothing, None)
            tap = Tap()
            guest = await w.guest(0, Settings(detach=0.01), tap.around)
            for devid in range(count):
                await w.plug(devid=devid, front=0)
            await guest.attach()
            await until(lambda: sum(d.device.attached for d in guest.front.devices.values()) == count, 30)
            await settle(guest)
            return len(tap.sent) / count

    few, many = asyncio.run(requests(100)), asyncio.run(requests(400))
    assert many <= few * 1.1
