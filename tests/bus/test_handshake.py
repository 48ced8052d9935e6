"""A split device from nothing to Connected and back, both halves in one process on the real store."""

from __future__ import annotations

import asyncio

from tests.support.split import S, ToyBack, ToyFront, use, world
from tests.support.until import until

from xenbus.bus import describe, lines


def test_both_halves_connect_and_leave_nothing():
    async def run():
        async with world() as w:
            use(w, ToyFront, ToyBack)
            dom0, guest = await w.guest(0), await w.guest(1)
            before = guest.hv.held(), dom0.hv.held()
            await dom0.attach()
            await guest.attach()
            await w.plug()
            fnode, bnode = w.front_node("toy", 0), w.back_node("toy", 0)
            front = back = None
            await until(lambda: guest.front.devices and dom0.back.devices)
            front = guest.front.devices["device/toy/0"]
            back = dom0.back.devices["backend/toy/1/0"]
            await until(lambda: front.state is back.state is S.CONNECTED)
            assert await w.state(fnode) == await w.state(bnode) == 4
            assert front.nameunit == "toy0" and back.nameunit == "toyb0"
            assert front.counts() == {
                "tasks": 0, "watches": 0, "channels": 1, "mapped_pages": 0, "granted_pages": 1,
            }  # fmt: skip
            assert guest.hv.held().granted_pages == before[0].granted_pages + 1
            assert dom0.hv.held().mapped_pages == 1
            assert str(front.device) == "toy0: <Toy front end> at device/toy/0 on xenbusb_front0"
            assert list(lines(describe(guest.tree.root))) == [
                "xenstore0",
                "  xenbusb_front0",
                "    toy0 at device/toy/0: Connected",
                "  xenbusb_back0",
            ]
            await w.unplug()
            await until(lambda: not guest.front.devices and not dom0.back.devices)
            assert (guest.hv.held(), dom0.hv.held()) == before
            assert front.driver is None and back.driver is None
            assert guest.store.counts()["watches"] == dom0.store.counts()["watches"] == 2

    asyncio.run(run())
