"""The handshake as a state machine: whatever toolstack and peers do to two toy drivers, a fresh device
connects afterwards, and nothing is left of the old ones."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from tests.support.split import S, ToyBack, ToyFront, settle, use, world
from tests.support.until import until

from xenbus.bus import Settings
from xenbus.errors import NoEntry

IDS = st.integers(0, 1)
VALUES = st.sampled_from(["0", "1", "2", "3", "4", "5", "6", "7", "8", "", "-1", "99", "4x"])
FLAPS = st.lists(VALUES, min_size=1, max_size=4)
HASTE = Settings(callback=1.0, detach=0.02, boot=1.0)


class Handshake(RuleBasedStateMachine):
    """Two devices between guest 1 and domain 0. Rules act as the toolstack, as a peer, or as a person."""

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def run(self, coroutine):
        async def limited():
            async with asyncio.timeout(20):  # not wait_for: before 3.12 that is a task of its own
                return await coroutine

        return self.loop.run_until_complete(limited())

    @initialize()
    def start(self):
        async def begin():
            self.context = world()
            self.w = w = await self.context.__aenter__()
            use(w, ToyFront, ToyBack)
            self.dom0, self.guest = await w.guest(0, HASTE), await w.guest(1, HASTE)
            self.before = self.held()
            await self.dom0.attach()
            await self.guest.attach()
            self.watches = self.watch_counts()

        self.run(begin())

    def held(self):
        return self.dom0.hv.held(), self.guest.hv.held()

    def watch_counts(self):
        return self.dom0.store.counts()["watches"], self.guest.store.counts()["watches"]

    def nodes(self, devid):
        return self.w.front_node("toy", devid), self.w.back_node("toy", devid)

    async def breathe(self, much):
        """Let things happen, a little or until nothing moves."""
        if much:
            await settle(self.dom0, self.guest)
        else:
            await self.w.tool.read("/")

    @rule(devid=IDS, much=st.booleans())
    def plug(self, devid, much):
        """Over whatever is there: both halves' nodes as new."""

        async def act():
            await self.w.plug(devid=devid)
            await self.breathe(much)

        self.run(act())

    @rule(devid=IDS, much=st.booleans())
    def unplug(self, devid, much):
        async def act():
            await self.w.unplug(devid=devid)
            await self.breathe(much)

        self.run(act())

    @rule(devid=IDS, half=st.integers(0, 1), much=st.booleans())
    def remove_a_half(self, devid, half, much):
        async def act():
            try:
                await self.w.tool.rm(self.nodes(devid)[half])
            except NoEntry:
                pass
            await self.breathe(much)

        self.run(act())

    @rule(
        devid=IDS, half=st.integers(0, 1), values=st.lists(VALUES, min_size=1, max_size=4), much=st.booleans()
    )
    def flap(self, devid, half, values, much):
        """Somebody writes states where a half stands."""

        async def act():
            node = self.nodes(devid)[half]
            for value in values:
                if await self.w.tool.exists(f"{node}/state"):
                    await self.w.tool.write(f"{node}/state", value)
            await self.breathe(much)

        self.run(act())

    @rule(devid=IDS)
    def orderly(self, devid):
        """As libxl: online 0, the back end's state Closing."""

        async def act():
            node = self.nodes(devid)[1]
            if await self.w.tool.exists(f"{node}/state"):
                await self.w.tool.write(f"{node}/online", "0")
                await self.w.tool.write(f"{node}/state", "5")
            await self.breathe(True)

        self.run(act())

    @rule(devid=IDS, front=st.booleans(), much=st.booleans())
    def request_detach(self, devid, front, much):
        async def act():
            devices = self.guest.front.devices if front else self.dom0.back.devices
            dev = devices.get(f"device/toy/{devid}" if front else f"backend/toy/1/{devid}")
            if dev is not None:
                dev.request_detach()
            await self.breathe(much)

        self.run(act())

    @rule(cancelled=st.booleans())
    def suspend_and_resume(self, cancelled):
        async def act():
            guest = self.guest
            for bus in guest.buses:
                await bus.suspend()
            if not cancelled:
                await self.lose_everything()
            for bus in guest.buses:
                await bus.resume(cancelled, store=guest.store, hv=guest.hv)
            await self.breathe(False)

        self.run(act())

    async def lose_everything(self):
        """What the machine does to a domain that is restored: what it held is gone, and so are its store
        link and the error nodes below its old path."""
        guest = self.guest
        with suppress(NoEntry):
            await self.w.tool.rm("/local/domain/1/error")
        for dev in guest.front.devices.values():
            if dev._owned is not None:
                for channel in dev._owned.channels.values():
                    await channel.close()
                for pages in dev._owned.grants.values():
                    await guest.hv.revoke(pages)
        await guest.store.close()
        guest.store = await guest.connect()

    @rule(devid=IDS)
    def a_fresh_device_connects(self, devid):
        self.run(self.fresh(devid))

    async def fresh(self, devid):
        await self.w.unplug(devid=devid)
        await self.w.plug(devid=devid)
        states = {}

        def up():
            states["front"] = self.guest.front.devices.get(f"device/toy/{devid}")
            states["back"] = self.dom0.back.devices.get(f"backend/toy/1/{devid}")
            return all(dev is not None and dev.state is S.CONNECTED for dev in states.values())

        await until(up, 10)
        front, back = self.nodes(devid)
        assert await self.w.state(front) == await self.w.state(back) == 4

    def teardown(self):
        if not hasattr(self, "w"):
            self.loop.close()
            return

        async def finish():
            await self.fresh(0)
            for devid in (0, 1):
                await self.w.unplug(devid=devid)
            await until(lambda: not self.guest.front.devices and not self.dom0.back.devices, 10)
            await settle(self.dom0, self.guest)
            assert self.held() == self.before
            assert self.watch_counts() == self.watches
            assert not self.guest.front._index._above and not self.dom0.back._index._above
            assert asyncio.all_tasks() == {asyncio.current_task()}
            for domid in (0, 1):
                # The directory itself is the domain builder's.
                errors = await self.w.tool.dump(f"/local/domain/{domid}")
                assert not [path for path in errors if "/error/" in path]
            await self.context.__aexit__(None, None, None)

        try:
            self.run(finish())
        finally:
            self.loop.close()


QUICKLY = settings(
    max_examples=5, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
)
LONGER = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_whatever_happens_a_fresh_device_connects():
    run_state_machine_as_test(Handshake, settings=QUICKLY)


@pytest.mark.slow
def test_whatever_happens_for_longer():
    run_state_machine_as_test(Handshake, settings=LONGER)
