"""Suspend and resume of a bus (xenbusb_resume), cancelled and for real, on a store and a machine that
change."""

from __future__ import annotations

import asyncio

from tests.support.split import NODE, Recorder, S, ToyBack, ToyFront, one, settle, use, world
from tests.support.tap import Tap
from tests.support.until import until

from xenbus.xenstore.wire.message import Op


class Resumes(ToyFront):
    """Forgets its ring when the domain is another one: the handshake starts over."""

    async def resume(self, cancelled):
        await super().resume(cancelled)
        if not cancelled:
            self.pages = self.port = None
            self.held = self.dev.counts()


async def connected(w, domids=(0, 1)):
    """Both halves Connected: (domain 0, guest, front device, back device)."""
    use(w, Resumes, ToyBack)
    dom0, guest = await w.guest(domids[0]), await w.guest(domids[1])
    await dom0.attach()
    await guest.attach()
    await w.plug()
    await until(lambda: guest.front.devices and dom0.back.devices)
    front, back = guest.front.devices[NODE], dom0.back.devices["backend/toy/1/0"]
    await until(lambda: front.state is back.state is S.CONNECTED)
    await settle(dom0, guest)
    return dom0, guest, front, back


def test_resume_cancelled():
    """xenbusb_resume, cancelled: only the driver's resume; no store access; events that waited are heard."""

    async def run():
        async with world() as w:
            tap = Tap()
            guest, dev = await one(w, wrap=tap)
            await dev.set_state(S.CONNECTED)
            await settle(guest)
            assert await guest.front.suspend() == {}
            tap.sent.clear()
            await w.tool.write(f"{dev.otherend_path}/state", "4")
            await w.tool.read("/")
            assert dev.driver.heard[-1] == ("suspend",)
            assert await guest.front.resume(True) == {}
            assert tap.sent == [] and ("resume", True) in dev.driver.heard
            await until(lambda: ("otherend", S.CONNECTED) in dev.driver.heard)
            assert dev.state is S.CONNECTED and guest.store.counts()["watches"] == 4

    asyncio.run(run())


def test_resume_skips_what_was_never_attached():
    """xenbusb_resume: children never attached are skipped."""

    class Gate(Recorder):
        async def attach(self):
            await super().attach()
            raise RuntimeError("not today")

    async def run():
        async with world() as w:
            use(w, Gate, None)
            guest = await w.guest(1)
            await guest.attach()
            await w.plug()
            await until(lambda: guest.front.counters["attach_failures"])
            await settle(guest)
            assert await guest.front.suspend() == {}
            assert await guest.front.resume(False, store=guest.store, hv=guest.hv) == {}
            await until(lambda: not guest.front.devices)

    asyncio.run(run())


def test_resume_for_real():
    """xenbusb_resume: Initialising, the peer read anew and watched at its new place; the handshake starts
    over.

    As after `xl restore`: what was granted is gone, the store connection is another one, the back end is now
    in another domain.
    """

    async def run():
        async with world() as w:
            dom0, guest, front, _back = await connected(w)
            other = await w.guest(2)
            await other.attach()
            await guest.front.suspend()
            await guest.back.suspend()
            driver = front.driver
            # The machine and the toolstack do what they do: everything the domain held is gone, new nodes.
            await guest.hv.revoke(driver.pages)
            await driver.port.close()
            await guest.store.close()
            await w.unplug()
            await until(lambda: not dom0.back.devices)
            await w.plug(back=2)
            tap = Tap()
            guest.store = await guest.connect(tap.around)
            for bus in guest.buses:
                assert await bus.resume(False, store=guest.store, hv=guest.hv) == {}
            assert front is guest.front.devices[NODE] and front.driver is driver
            assert driver.held == dict.fromkeys(driver.held, 0)
            assert front.otherend_id == 2 and front.otherend_path == w.back_node("toy", 0, back=2)
            await until(lambda: front.state is S.CONNECTED)
            new = other.back.devices["backend/toy/1/0"]
            assert new.state is S.CONNECTED and front.counts()["granted_pages"] == 1
            # Root first (B11); of the device, our own node, then (after the driver's resume) the new peer.
            watches = tap.paths(Op.WATCH)
            assert watches == ["device", NODE, f"{front.otherend_path}/state", "backend"]
            assert guest.front.counters["replaced"] == 0

    asyncio.run(run())


def test_a_device_that_the_restored_domain_has_no_more():
    async def run():
        async with world() as w:
            guest, dev = await one(w)
            await w.plug(devid=1)
            await until(lambda: "device/toy/1" in guest.front.devices)
            await settle(guest)
            driver = dev.driver
            await guest.front.suspend()
            await w.unplug(devid=0)
            failures = await guest.front.resume(False, store=guest.store, hv=guest.hv)
            assert list(failures) == [NODE]
            await until(lambda: list(guest.front.devices) == ["device/toy/1"])
            assert driver.heard[-1] == ("detach",)

    asyncio.run(run())


def test_a_device_that_comes_while_suspended_is_found():
    async def run():
        async with world() as w:
            guest, _dev = await one(w)
            await guest.front.suspend()
            await w.plug(devid=3)
            await w.tool.read("/")
            assert len(guest.front.devices) == 1
            await guest.front.resume(True)
            await until(lambda: "device/toy/3" in guest.front.devices)

    asyncio.run(run())


def test_suspend_failures_and_hangs_are_reported_and_stop_nobody():
    class Bad(Recorder):
        deadline = 0.05

        async def suspend(self):
            await super().suspend()
            if self.dev.id == "0":
                raise RuntimeError("busy")
            if self.dev.id == "1":
                await asyncio.Event().wait()

    async def run():
        async with world() as w:
            use(w, Bad, None)
            guest = await w.guest(1)
            await guest.attach()
            for devid in range(3):
                await w.plug(devid=devid)
            await until(lambda: sum(d.device.attached for d in guest.front.devices.values()) == 3)
            failures = await guest.front.suspend()
            assert sorted(failures) == ["device/toy/0", "device/toy/1"]
            assert "0.05 s" in str(failures["device/toy/1"])
            await guest.front.resume(True)

    asyncio.run(run())


def test_suspend_does_not_wait_for_a_device_that_goes():
    """Its order is dropped with its mailbox."""

    class Stuck(Recorder):
        async def otherend_changed(self, state):
            await asyncio.Event().wait()

    async def run():
        async with world() as w:
            use(w, Stuck, None)
            guest = await w.guest(1)
            await guest.attach()
            await w.plug()
            await until(lambda: guest.front.devices and guest.front.devices[NODE].device.attached)
            dev = guest.front.devices[NODE]
            await until(lambda: not dev.mailbox.idle)
            order = asyncio.ensure_future(guest.front.suspend())
            await asyncio.sleep(0)
            dev.mailbox.cancel()
            async with asyncio.timeout(1):
                assert await order == {}
            dev.mailbox.go_on()
            guest.front._mailbox.go_on()

    asyncio.run(run())
