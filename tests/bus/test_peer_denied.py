"""To a domain that may not read the parent, the store says EACCES of a peer's node that is gone."""

import asyncio

import pytest
from tests.support.split import NODE, Recorder, S, one, use, world
from tests.support.tap import Tap
from tests.support.until import until

from xenbus.errors import Denied
from xenbus.xenstore.wire import Op


def test_a_back_end_whose_directory_went_is_closed_to_its_front_end():
    async def run():
        async with world() as w:
            guest, dev = await one(w)
            back = w.back_node("toy", 0)
            await w.tool.set_perms("/local/domain", ["n0"])
            await w.tool.write(f"{back}/state", "2")
            await until(lambda: dev.otherend_state is S.INIT_WAIT)
            await w.tool.rm("/local/domain/0")
            with pytest.raises(Denied):
                await guest.store.read(f"{back}/state")
            await until(lambda: dev.otherend_state is S.CLOSED)
            assert ("otherend", S.CLOSED) in dev.driver.heard

    asyncio.run(run())


def test_a_front_end_that_died_is_closed_to_its_driver_domain():
    async def run():
        async with world() as w:
            use(w, None, Recorder)
            storage = await w.guest(2)
            await storage.attach()
            w.machine.domain(1)
            await w.tool.mkdir("/local/domain/1")
            await w.tool.set_perms("/local/domain/1", ["n0", "r1"])
            await w.plug(back=2)
            await until(
                lambda: storage.back.devices and storage.back.devices["backend/toy/1/0"].device.attached
            )
            dev = storage.back.devices["backend/toy/1/0"]
            await until(lambda: dev.otherend_state is S.INITIALISING)
            w.machine.kill(1)
            await until(lambda: dev.otherend_state is S.CLOSED)

    asyncio.run(run())


def test_a_denial_that_passes_is_not_the_end():
    async def run():
        async with world() as w:
            tap = Tap()
            _guest, dev = await one(w, wrap=tap)
            back = w.back_node("toy", 0)
            rule = tap.fail(Op.READ, f"{back}/state", "EACCES", times=2)
            await w.tool.write(f"{back}/state", "2")
            await until(lambda: dev.otherend_state is S.INIT_WAIT)
            assert rule.times == 0 and ("otherend", S.CLOSED) not in dev.driver.heard
            assert dev.node == NODE

    asyncio.run(run())
