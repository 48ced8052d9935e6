"""A domain that was restored without a word to us: what the store says then is no device's end."""

from __future__ import annotations

import asyncio

from tests.bus.test_suspend import connected
from tests.support.split import NODE, S, settle, world
from tests.support.until import until


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
