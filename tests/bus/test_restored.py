"""A domain that was restored without a word to us: what the store says then is no device's end."""

from __future__ import annotations

import asyncio

from tests.bus.test_suspend import connected
from tests.support.split import NODE, S, settle, world
from tests.support.tap import Tap
from tests.support.until import until

from xenbus.xenstore.wire.message import Op


def test_nothing_ends_while_the_domain_was_restored():
    """Own state back at Initialising, the peer's node gone: each asks first, and then nobody is told."""

    async def run():
        async with world() as w:
            dom0, guest, front, _ = await connected(w)
            asked = asyncio.Event()
            restored = True

            async def was_restored():
                asked.set()
                return restored

            guest.front.restored = was_restored
            front.driver.heard.clear()
            for change in (
                w.tool.write(w.front_node("toy", 0) + "/state", "1"),
                w.tool.rm(w.back_node("toy", 0)),
                w.tool.rm(w.front_node("toy", 0)),
            ):
                asked.clear()
                await change
                await asked.wait()
                await settle(guest)
            assert front.driver.heard == [] and front.state is S.CONNECTED
            assert guest.front.devices[NODE] is front and not front.gone
            restored = False  # it was not: then it is the end
            await w.plug(devid=7)
            await w.tool.write(w.front_node("toy", 0) + "/state", "1")
            await until(lambda: guest.front.devices.get(NODE) is not front)
            await settle(dom0, guest)

    asyncio.run(run())


def test_a_bus_that_stands_still_hears_it_all_on_resume():
    async def run():
        async with world() as w:
            dom0, guest, front, _ = await connected(w)
            await guest.front.stand_still()
            front.driver.heard.clear()
            await w.tool.write(front.otherend_path + "/state", "5")
            await w.tool.read("/")
            assert front.driver.heard == []
            await w.tool.write(front.otherend_path + "/state", "4")
            await guest.front.resume(True)
            await until(lambda: ("otherend", S.CONNECTED) in front.driver.heard)
            assert not front.driver.count("suspend")
            await settle(dom0, guest)

    asyncio.run(run())


class LateRoot(Tap):
    """A store whose first event of the root comes well after the answer to the watch, as xenstored's may."""

    def __init__(self):
        super().__init__()
        self.came = asyncio.Event()

    def _deliver(self, message):
        if message.op == Op.WATCH_EVENT and message.payload.startswith(b"device\0"):
            asyncio.get_running_loop().call_later(0.1, self._late, message)
        else:
            super()._deliver(message)

    def _late(self, message):
        super()._deliver(message)
        self.came.set()


def test_the_root_s_first_event_comes_late():
    """It touches every device; one that was adopted by then would count as replaced."""

    async def run():
        async with world() as w:
            dom0, guest, front, _ = await connected(w)
            await guest.front.suspend()
            await guest.back.suspend()
            driver = front.driver
            await guest.hv.revoke(driver.pages)
            await driver.port.close()
            await guest.store.close()
            await w.unplug()
            await until(lambda: not dom0.back.devices)
            other = await w.guest(2)
            await w.plug(back=2)
            late = LateRoot()
            guest.store = await guest.connect(late.around)
            for bus in guest.buses:
                assert await bus.resume(False, store=guest.store, hv=guest.hv) == {}
            await late.came.wait()
            await settle(guest)  # nobody serves it yet: it is Initialising, and looked at
            await other.attach()
            await until(lambda: front.state is S.CONNECTED)
            await settle(dom0, guest, other)
            assert guest.front.devices[NODE] is front and front.driver is driver
            assert guest.front.counters["replaced"] == 0

    asyncio.run(run())
