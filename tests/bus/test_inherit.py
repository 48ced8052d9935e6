"""A bus that goes on with what a former process left: each state, and what it must leave alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from tests.support.split import QUICK, Recorder, S, ToyBack, ToyFront, settle, use, world
from tests.support.tap import Tap
from tests.support.until import until

from xenbus.hypervisor.interface import Held
from xenbus.xenstore.wire.message import Op

SETTINGS = replace(QUICK, detach=2.0)
BNODE = "backend/toy/1/0"
WRITES = (Op.WRITE, Op.RM, Op.MKDIR, Op.SET_PERMS)


class GoesOn(ToyBack):
    """Maps the ring and binds the port again, and writes nothing."""

    async def recover(self):
        self.heard.append(("recover", self.dev.state, self.dev.otherend_state))
        if self.dev.otherend_state is S.CONNECTED:
            keys = await self.dev.otherend_gather({"ring-ref": int, "event-channel": int})
            self.ring = await self.dev.map_ring([keys["ring-ref"]])
            self.port = await self.dev.bind_evtchn(keys["event-channel"], lambda: None)

    async def release(self):
        self.heard.append(("release",))


async def connected(w, back=GoesOn, front=ToyFront):
    """Domain 0 and a guest with one device, Connected."""
    use(w, front, back)
    dom0, guest = await w.guest(0, SETTINGS), await w.guest(1, SETTINGS)
    await dom0.attach()
    await guest.attach()
    await w.plug()
    await until(lambda: guest.front.devices and dom0.back.devices)
    dev = guest.front.devices["device/toy/0"]
    await until(lambda: dev.state is dom0.back.devices[BNODE].state is S.CONNECTED)
    await settle(dom0, guest)
    return dom0, guest, dev


async def end(dom0):
    """Of that process, its states as they are: what it held is given back, as a kernel does it."""
    assert await dom0.back.release() == {}
    await dom0.front.detach()
    await dom0.store.close()


async def heir(w, *, tap=None, inherits=True):
    """Another process of domain 0."""
    dom0 = await w.guest(0, SETTINGS, *([tap.around] if tap else [lambda t: t]), inherits)
    return await dom0.attach()


def run(test):
    async def main():
        async with world() as w:
            await asyncio.wait_for(test(w), 20)

    asyncio.run(main())


def test_a_connected_device_goes_on_and_nothing_is_written():
    async def test(w):
        dom0, _, front = await connected(w)
        old = dom0.back.devices[BNODE].driver
        await end(dom0)
        assert old.heard[-1] == ("release",) and dom0.hv.held() == Held(0, 0, 0)
        seen = []
        w.guests[1].front.observe(lambda dev, what: seen.append(what))
        tap = Tap()
        dom0 = await heir(w, tap=tap)
        dev = dom0.back.devices[BNODE]
        await settle(dom0, w.guests[1])
        assert dev.state is front.state is S.CONNECTED and dev.nameunit == "toyb0"
        assert dev.driver.heard[:2] == [("recover", S.CONNECTED, S.CONNECTED), ("otherend", S.CONNECTED)]
        assert tap.paths(*WRITES) == [] and seen == []
        assert dom0.hv.held().mapped_pages == 1 and dom0.back.counters["inherited"] == 1
        # It is a device like any other: B18 holds, and so does its end.
        await w.unplug()
        await until(lambda: not dom0.back.devices)
        await w.plug()
        await until(lambda: BNODE in dom0.back.devices and dom0.back.devices[BNODE].state is S.CONNECTED)
        assert ("attach",) in dom0.back.devices[BNODE].driver.heard

    run(test)


def test_by_default_it_is_left_alone():
    async def test(w):
        dom0, _, front = await connected(w)
        await end(dom0)
        dom0 = await heir(w, inherits=False)
        assert dom0.back.devices == {} and dom0.back.counters["ignored"] == 1
        assert await w.state(w.back_node("toy", 0)) == 4 and front.state is S.CONNECTED

    run(test)


def test_what_appears_later_is_not_inherited():
    async def test(w):
        use(w, None, GoesOn)
        dom0 = await w.guest(0, SETTINGS, inherits=True)
        await dom0.attach()
        await w.guest(1, SETTINGS)
        await w.plug(state="4")
        await settle(dom0)
        assert dom0.back.devices == {} and dom0.back.counters["ignored"] == 1

    run(test)


@pytest.mark.parametrize("left", [S.INIT_WAIT, S.INITIALISED])
def test_one_on_its_way_begins_anew(left):
    async def test(w):
        use(w, ToyFront, GoesOn)
        guest = await w.guest(1, SETTINGS)
        await guest.attach()
        await w.plug(state=str(int(left)))
        await until(lambda: guest.front.devices)
        await until(
            lambda: guest.front.devices["device/toy/0"].state is S.INITIALISED or left is S.INITIALISED
        )
        dom0 = await heir(w)
        await until(lambda: dom0.back.devices[BNODE].state is S.CONNECTED)
        assert dom0.back.devices[BNODE].driver.heard[0] == ("attach",)
        await until(lambda: guest.front.devices["device/toy/0"].state is S.CONNECTED)

    run(test)


@pytest.mark.parametrize("kind", ["no recover", "raises", "hangs"])
def test_a_driver_that_cannot_go_on_closes_in_order(kind):
    class Raises(ToyBack):
        async def recover(self):
            raise RuntimeError("nothing to go on with")

    class Hangs(ToyBack):
        deadline = 0.05

        async def recover(self):
            await asyncio.Event().wait()

    back = {"no recover": ToyBack, "raises": Raises, "hangs": Hangs}[kind]

    async def test(w):
        dom0, _, front = await connected(w, back)
        await end(dom0)
        dom0 = await heir(w)
        dev = dom0.back.devices[BNODE]
        await until(lambda: dev.state is front.state is S.CLOSED)
        said = await w.tool.read_str(f"/local/domain/0/error/{BNODE}/error")
        assert "going on for a process that ended" in said
        assert dev.counters["not_recovered"] == 1 and dom0.hv.held() == Held(0, 0, 0)
        assert w.guests[1].hv.held().granted_pages == 1  # the store's

    run(test)


def test_one_that_was_closing_goes_on_closing():
    async def test(w):
        dom0, _, front = await connected(w)
        await end(dom0)
        await w.tool.write(f"{w.back_node('toy', 0)}/state", "5")
        await until(lambda: front.state is S.CLOSED)
        assert await w.state(w.back_node("toy", 0)) == 5
        dom0 = await heir(w)
        await until(lambda: dom0.back.devices[BNODE].state is S.CLOSED)
        assert dom0.back.devices[BNODE].driver.heard[0] == ("recover", S.CLOSING, S.CLOSED)
        assert not await w.tool.exists(f"/local/domain/0/error/{BNODE}/error")

    run(test)


@pytest.mark.parametrize("when", ["before", "later"])
def test_a_closed_one_that_is_online_waits_for_its_front(when):
    async def test(w):
        use(w, None, GoesOn)
        fnode, bnode = w.front_node("toy", 0), w.back_node("toy", 0)
        await w.guest(1, SETTINGS)
        await w.plug(state="6")
        if when == "later":
            await w.tool.write(f"{fnode}/state", "6")
        dom0 = await heir(w)
        if when == "later":
            await settle(dom0)
            assert dom0.back.devices[BNODE].state is S.CLOSED and await w.state(bnode) == 6
            await w.tool.write(f"{fnode}/state", "1")
        await until(lambda: dom0.back.devices[BNODE].state is S.INIT_WAIT)
        assert await w.state(bnode) == 2

    run(test)


@pytest.mark.parametrize("online", ["0", "", "nonsense"])
def test_a_closed_one_that_is_not_online_is_left_alone(online):
    async def test(w):
        use(w, None, GoesOn)
        await w.guest(1, SETTINGS)
        await w.plug(state="6", online=online)
        tap = Tap()
        dom0 = await heir(w, tap=tap)
        assert dom0.back.devices == {} and tap.paths(*WRITES) == []

    run(test)


def test_a_node_that_cannot_be_read_at_first_is_inherited_all_the_same():
    async def test(w):
        dom0, _, front = await connected(w)
        await end(dom0)
        tap = Tap()
        tap.fail(Op.READ, f"{BNODE}/state", "EIO")
        dom0 = await heir(w, tap=tap)
        await until(lambda: BNODE in dom0.back.devices)
        await settle(dom0)
        assert dom0.back.devices[BNODE].driver.heard[0] == ("recover", S.CONNECTED, S.CONNECTED)
        assert front.state is S.CONNECTED

    run(test)


def test_a_type_without_a_driver_is_left_alone():
    async def test(w):
        await w.guest(1, SETTINGS)
        await w.plug("other", state="4")
        tap = Tap()
        dom0 = await heir(w, tap=tap)
        assert dom0.back.devices == {} and dom0.back.counters["no_driver"] == 1 and tap.paths(*WRITES) == []

    run(test)


def test_release_writes_nothing_and_gives_all_back():
    class Unfinished(GoesOn):
        async def release(self):
            raise RuntimeError("still busy")

    class Endless(GoesOn):
        async def localend_changed(self, path):
            if path == "/poke":
                await asyncio.Event().wait()

    async def test(w):
        use(w, ToyFront, Unfinished, "toy")
        use(w, ToyFront, Endless, "endless")
        tap = Tap()
        dom0, guest = (
            await w.guest(0, replace(SETTINGS, callback=0.2), tap.around),
            await w.guest(1, SETTINGS),
        )
        await dom0.attach()
        await guest.attach()
        for kind in ("toy", "endless"):
            await w.plug(kind)
            node = f"backend/{kind}/1/0"
            await until(lambda node=node: node in dom0.back.devices)
            await until(lambda node=node: dom0.back.devices[node].state is S.CONNECTED)
        await settle(dom0, guest)
        await w.tool.write("/local/domain/0/backend/endless/1/0/poke", "1")
        await until(lambda: not dom0.back.devices["backend/endless/1/0"].mailbox.idle)
        tap.sent.clear()
        failures = await dom0.back.release()
        assert [str(error) for error in failures.values()] == ["still busy"] and list(failures) == [BNODE]
        assert tap.paths(*WRITES) == [] and dom0.hv.held() == Held(0, 0, 0)
        assert dom0.back.devices == {} and dom0.store.counts()["watches"] == 1  # the front bus's
        for kind in ("toy", "endless"):
            assert await w.state(w.back_node(kind, 0)) == await w.state(w.front_node(kind, 0)) == 4
        await dom0.front.detach()
        await dom0.store.close()

    run(test)


def test_a_recorder_is_released_before_its_things_are_given_back():
    class Holds(Recorder):
        async def attach(self):
            self.task = self.dev.spawn(asyncio.Event().wait())

        async def release(self):
            self.heard.append(("release", self.task.done()))

    async def test(w):
        use(w, None, Holds)
        dom0 = await w.guest(0, SETTINGS)
        await w.guest(1, SETTINGS)
        await dom0.attach()
        await w.plug()
        await until(lambda: dom0.back.devices and dom0.back.devices[BNODE].device.attached)
        driver = dom0.back.devices[BNODE].driver
        await end(dom0)
        assert driver.heard[-1] == ("release", False) and driver.task.done()
        assert ("detach",) not in driver.heard

    run(test)
