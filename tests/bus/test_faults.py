"""Drivers that raise or hang, and peers that do: each costs its own device, and nothing is left of it."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest
from tests.support.split import NODE, QUICK, Recorder, S, ToyBack, ToyFront, made, one, settle, use, world
from tests.support.until import until

from xenbus.bus import DeviceGone, Settings, describe
from xenbus.errors import DeadlineError, HypervisorError, PeerError
from xenbus.newbus.runtime import runaways


class Hangs(ToyFront):
    deadline = 0.05

    async def otherend_changed(self, state):
        if state is S.INIT_WAIT:
            await self.dev.grant_ring(2)
            await asyncio.Event().wait()


def test_a_callback_that_hangs_fails_its_device_and_no_other():
    """Cancelled, error node, Closing then Closed, marked failed, everything given back; armed again, it is
    new."""

    async def run():
        async with world() as w:
            use(w, Hangs, ToyBack)
            dom0, guest = await w.guest(0), await w.guest(1)
            held = guest.hv.held()
            await dom0.attach()
            await guest.attach()
            seen = []
            guest.front.observe(lambda dev, what: seen.append((what, dev.state)))
            await w.plug()
            await until(lambda: guest.front.devices and guest.front.devices[NODE].failed)
            dev = guest.front.devices[NODE]
            await until(lambda: dev.state is S.CLOSED and dev.mailbox.idle)
            assert [state for what, state in seen if what == "state"] == [S.CLOSING, S.CLOSED]
            assert "0.05 s" in await w.tool.read_str(f"/local/domain/1/error/{NODE}/error")
            [entry] = describe(guest.front.device)["children"]
            assert "otherend_changed()" in entry["failed"] and entry["waits"].startswith("failed: ")
            assert guest.hv.held() == held and dev.device.softc is None
            back = dom0.back.devices["backend/toy/1/0"]
            await until(lambda: back.state is S.CLOSED)
            await w.tool.write(f"{w.front_node('toy', 0)}/state", "1")
            await until(lambda: guest.front.devices.get(NODE) not in (None, dev))
            await w.unplug()
            await until(lambda: not guest.front.devices)
            assert guest.hv.held() == held

    asyncio.run(run())


class Deaf(Recorder):
    """Swallows its cancellation."""

    deadline = 0.02
    gate: asyncio.Event

    async def otherend_changed(self, state):
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                pass


def test_a_callback_that_will_not_be_cancelled_holds_up_nobody(monkeypatch):
    monkeypatch.setattr("xenbus.newbus.runtime.CANCEL_GRACE", 0.01)

    async def run():
        async with world() as w:
            Deaf.gate = asyncio.Event()
            guest, dev = await one(w, Deaf)
            assert dev.failed and dev.state is S.CLOSED and runaways() == 1
            await w.unplug()
            await until(lambda: not guest.front.devices)
            Deaf.gate.set()
            await until(lambda: runaways() == 0)

    asyncio.run(run())


class Loops(Recorder):
    @classmethod
    def probe(cls, dev):
        while True:
            pass


class Sleeps(Recorder):
    @classmethod
    def probe(cls, dev):
        time.sleep(20)


@pytest.mark.timeout(20, method="thread")  # or SIGALRM is the test runner's
@pytest.mark.parametrize("driver", [Loops, Sleeps])
def test_a_probe_that_hangs_is_ended_and_its_device_closed(driver):
    """It blocks the loop, so it has a second at most; another driver may still take the device."""

    async def run():
        async with world() as w:
            use(w, driver, None)
            guest = await w.guest(1, Settings(probe=0.05, detach=0.05))
            await guest.attach()
            await w.plug()
            await until(lambda: guest.front.counters["attach_failures"])
            await until(lambda: not guest.front.devices)
            assert await w.state(w.front_node("toy", 0)) == 6
            text = await w.tool.read_str(f"/local/domain/1/error/{NODE}/error")
            assert "probe of rec" in text and "waited 0.05 s" in text
            use(w, Recorder, None)
            await w.tool.write(f"{w.front_node('toy', 0)}/state", "1")
            await until(lambda: guest.front.devices and guest.front.devices[NODE].device.attached)
            assert type(guest.front.devices[NODE].driver) is Recorder
            assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL

    asyncio.run(run())


class Raises(ToyFront):
    async def otherend_changed(self, state):
        if state is S.INIT_WAIT:
            raise PeerError("its ring-ref is nonsense")
        await super().otherend_changed(state)


def test_a_callback_that_raises_closes_its_device():
    async def run():
        async with world() as w:
            use(w, Raises, ToyBack)
            dom0, guest = await w.guest(0), await w.guest(1)
            await dom0.attach()
            await guest.attach()
            await w.plug()
            await until(lambda: guest.front.devices and guest.front.devices[NODE].state is S.CLOSED)
            text = await w.tool.read_str(f"/local/domain/1/error/{NODE}/error")
            assert text == "71 otherend_changed: its ring-ref is nonsense"
            assert guest.front.devices[NODE].device.attached  # it may be re-armed, or removed

    asyncio.run(run())


class Spawns(Recorder):
    async def attach(self):
        await super().attach()

        async def work():
            raise RuntimeError("the pump broke")

        self.dev.spawn(work(), name="pump")
        self.forever = self.dev.spawn(asyncio.Event().wait())


def test_a_task_that_raises_closes_its_device_and_tasks_end_with_it():
    async def run():
        async with world() as w:
            guest, dev = await one(w, Spawns)
            driver = dev.driver
            await until(lambda: dev.state is S.CLOSING)
            assert "the pump broke" in await w.tool.read_str(f"/local/domain/1/error/{NODE}/error")
            assert dev.counts()["tasks"] == 1
            await w.unplug()
            await until(lambda: not guest.front.devices)
            assert driver.forever.cancelled()
            with pytest.raises(DeviceGone):
                dev.spawn(asyncio.sleep(0))

    asyncio.run(run())


class TakesLate(Recorder):
    """Is cancelled while it takes pages."""

    gate: asyncio.Event

    async def attach(self):
        self.dev.spawn(self.take())

    async def take(self):
        await self.gate.wait()
        await asyncio.gather(*(self.dev.grant_ring(1) for _ in range(5)))


def test_what_a_cancelled_driver_took_is_given_back():
    """A grant that arrives after its taker was cancelled belongs to nobody, so it is revoked."""

    async def run():
        async with world() as w:
            TakesLate.gate = asyncio.Event()
            guest, dev = await one(w, TakesLate)
            held, alloc, slow = guest.hv.held(), guest.hv.alloc, asyncio.Event()

            async def slow_alloc(*args, **kwargs):
                await slow.wait()
                return await alloc(*args, **kwargs)

            guest.hv.alloc = slow_alloc
            TakesLate.gate.set()
            await until(lambda: dev._owned is not None)
            await asyncio.sleep(0)
            await w.unplug()
            await until(lambda: not guest.front.devices)
            slow.set()
            await settle(guest)
            await until(lambda: len(asyncio.all_tasks()) == 1)
            assert guest.hv.held() == held

    asyncio.run(run())


def test_the_hypervisors_refusals_reach_the_driver():
    async def run():
        async with world() as w:
            _guest, dev = await one(w)
            with pytest.raises(HypervisorError):
                await dev.map_ring([4711])
            with pytest.raises(HypervisorError):
                await dev.bind_evtchn(999, lambda: None)
            assert dev.counts() == dict.fromkeys(dev.counts(), 0)
            pages = await dev.grant_ring(2)
            await dev.revoke(pages)
            await dev.revoke(pages)
            channel = await dev.alloc_evtchn(lambda: None)
            await dev.close_evtchn(channel)
            watch = await dev.watch("x", lambda path: None)
            await dev.unwatch(watch)
            assert dev.counts() == dict.fromkeys(dev.counts(), 0)

    asyncio.run(run())


def test_waiting_for_a_peer_ends_by_deadline_and_says_who_owed():
    async def run():
        async with world() as w:
            _guest, dev = await one(w)
            with pytest.raises(DeadlineError, match=r"backend state Connected; domain 0, /local/domain/0/"):
                await dev.wait_otherend(S.CONNECTED, timeout=0.02)
            waiting = asyncio.ensure_future(dev.wait_otherend(S.CONNECTED, timeout=5))
            await asyncio.sleep(0)
            await w.unplug()
            assert await waiting is S.CLOSED

    asyncio.run(run())


class Patient(Recorder):
    """Has less time than its write waits for a turn."""

    deadline = 0.1

    async def attach(self):
        await self.dev.set_state(S.INIT_WAIT)


def test_waiting_for_a_transactions_turn_is_not_the_drivers_time():
    """With thousands of devices the turn may come late: nobody is failed for that."""

    async def run():
        async with world() as w:
            use(w, Patient, None)
            guest = await w.guest(1, QUICK)
            await guest.attach()
            for _ in range(4):
                await guest.front.slots.acquire()
            await w.plug()
            await until(lambda: guest.front.devices)
            dev = guest.front.devices[NODE]
            await until(lambda: dev.queueing() > 0.2)
            for _ in range(4):
                guest.front.slots.release()
            await until(lambda: dev.device.attached)
            assert dev.state is S.INIT_WAIT and not dev.failed

    asyncio.run(run())


def test_a_dead_store_ends_everything_without_hanging():
    async def run():
        async with world() as w:
            use(w, ToyFront, ToyBack)
            dom0, guest = await w.guest(0), await w.guest(1, Settings(detach=5))
            await dom0.attach()
            await guest.attach()
            before = guest.hv.held()
            await w.plug()
            await until(lambda: guest.front.devices and guest.front.devices[NODE].state is S.CONNECTED)
            await guest.store.close()
            async with asyncio.timeout(2):
                for bus in guest.buses:
                    await bus.detach()
            assert not guest.front.devices and guest.hv.held() == before

    asyncio.run(run())


class SlowToGo(Recorder):
    """Hangs in a callback, and takes its time to detach."""

    deadline = 0.03

    async def otherend_changed(self, state):
        await asyncio.Event().wait()

    async def detach(self):
        await super().detach()
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("how", ["vanish", "detach"])
def test_a_device_that_fails_while_it_goes_is_detached_once(how):
    async def run():
        async with world() as w:
            use(w, SlowToGo, None)
            guest = await w.guest(1, Settings(detach=1))
            await guest.attach()
            await w.plug()
            await until(lambda: made and made[-1].count("detach"))
            dev = guest.front.devices[NODE]
            assert dev.failed
            if how == "vanish":
                await w.unplug()
            else:
                dev.request_detach()
            await until(lambda: not guest.front.devices)
            assert made[-1].count("detach") == 1

    made.clear()
    asyncio.run(run())
