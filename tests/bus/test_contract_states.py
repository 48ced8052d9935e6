"""The seed's contract, continued: instance variables, state changes, the overrides of both buses, helpers."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.split import NODE, Recorder, S, ToyBack, ToyFront, one, settle, use, world
from tests.support.tap import Tap
from tests.support.until import until

from xenbus.bus import (
    Ivar,
    Settings,
    describe,
    read_driver_state,
    read_ivar,
    strstate,
    write_ivar,
)
from xenbus.errors import NoEntry, PeerError, StoreError, UsageError
from xenbus.xenstore.wire.message import Op


async def one_back(w, driver=Recorder, **keys):
    """Domain 0 with one attached back end; the test is its front end."""
    use(w, None, driver)
    dom0 = await w.guest(0)
    await dom0.attach()
    await w.plug(**keys)
    node = "backend/toy/1/0"
    await until(lambda: node in dom0.back.devices and dom0.back.devices[node].device.attached)
    await settle(dom0)
    return dom0, dom0.back.devices[node]


def test_print_child():
    """xenbusb_print_child"""

    async def run():
        async with world() as w:
            _guest, dev = await one(w)
            assert str(dev.device) == "rec0: <Recorder> at device/toy/0 on xenbusb_front0"

    asyncio.run(run())


def test_read_ivar():
    """xenbusb_read_ivar: five of them, anything else ENOENT."""

    async def run():
        async with world() as w:
            _guest, dev = await one(w)
            assert [read_ivar(dev, ivar) for ivar in Ivar] == [
                NODE, "toy", S.INITIALISING, 0, w.back_node("toy", 0),
            ]  # fmt: skip
            with pytest.raises(NoEntry):
                read_ivar(dev, 5)

    asyncio.run(run())


def test_write_ivar():
    """xenbusb_write_ivar: the state only; the same one costs no store access; a removed node is not made
    again."""

    async def run():
        async with world() as w:
            tap = Tap()
            guest, dev = await one(w, wrap=tap)
            for ivar in (Ivar.NODE, Ivar.TYPE, Ivar.OTHEREND_ID, Ivar.OTHEREND_PATH):
                with pytest.raises(UsageError):
                    await write_ivar(dev, ivar, 1)
            with pytest.raises(NoEntry):
                await write_ivar(dev, 17, 1)
            await write_ivar(dev, Ivar.STATE, 4)
            assert await w.state(w.front_node("toy", 0)) == 4 and guest.tree.boot.clear
            await settle(guest)
            tap.sent.clear()
            await write_ivar(dev, Ivar.STATE, 4)
            assert tap.sent == []
            await w.tool.rm(w.front_node("toy", 0))
            await write_ivar(dev, Ivar.STATE, 6)  # no error
            assert dev.state is S.CONNECTED
            assert not await w.tool.exists(w.front_node("toy", 0))

    asyncio.run(run())


def test_write_ivar_conflict():
    """xenbusb_write_ivar: EAGAIN at the end is tried again."""

    async def run():
        async with world() as w:
            tap = Tap()
            _guest, dev = await one(w, wrap=tap)
            front = w.front_node("toy", 0)
            tap.after(Op.READ, f"{NODE}/state", lambda: w.tool.write(f"{front}/state", "2"))
            assert await dev.set_state(S.CONNECTED)
            assert await w.state(front) == 4 and len(tap.ops(Op.TRANSACTION_END)) == 2

    asyncio.run(run())


@pytest.mark.parametrize("late", [False, True], ids=["before", "inside"])
def test_a_toolstacks_closing_is_not_overwritten(late):
    """xenbusb_write_ivar, but: a detach that comes in the middle of the handshake is not undone by its next
    step; whichever was first, and although its event has not been seen."""

    async def run():
        async with world() as w:
            tap = Tap()
            _guest, dev = await one(w, wrap=tap)
            front = w.front_node("toy", 0)
            ask = w.tool.write(f"{front}/state", "5")
            if late:
                tap.after(Op.READ, f"{NODE}/state", lambda: ask)
            else:
                await ask
            assert not await dev.set_state(S.CONNECTED, {"sectors": 8})
            assert dev.state is S.CLOSING and await w.state(front) == 5
            assert not await w.tool.exists(f"{front}/sectors")
            assert await dev.set_state(S.CLOSED) and await w.state(front) == 6

    asyncio.run(run())


def test_other_errors_reach_the_driver():
    """xenbusb_write_ivar: other errors reach the caller, the cache is unchanged."""

    async def run():
        async with world() as w:
            tap = Tap()
            _guest, dev = await one(w, wrap=tap)
            dev._fatal = True  # leave out the Closing that follows
            tap.fail(Op.WRITE, "state\0" + "4", "ENOSPC")
            with pytest.raises(StoreError, match="ENOSPC"):
                await dev.set_state(S.CONNECTED)
            assert dev.state is S.INITIALISING

    asyncio.run(run())


class Offers(Recorder):
    """Closes with its front end; does not offer anything itself."""

    async def otherend_changed(self, state):
        await super().otherend_changed(state)
        if state is S.CLOSED:
            await self.dev.set_state(S.CLOSED)


@pytest.mark.parametrize("online", ["1", "0", None])
def test_back_otherend_changed(online):
    """xenbusb_back_otherend_changed: driver first; then an online device in Closed offers to reconnect."""

    async def run():
        async with world() as w:
            dom0, dev = await one_back(w, Offers)
            front, back = w.front_node("toy", 0), w.back_node("toy", 0)
            await w.tool.write(f"{front}/state", "6")
            await until(lambda: dev.state is S.CLOSED)
            if online is None:
                await w.tool.rm(f"{back}/online")
            else:
                await w.tool.write(f"{back}/online", online)
            heard = dev.driver.heard[:]
            await w.tool.write(f"{front}/state", "1")
            await until(lambda: ("otherend", S.INITIALISING) in dev.driver.heard[len(heard) :])
            await settle(dom0)
            assert dev.state is (S.INIT_WAIT if online == "1" else S.CLOSED)

    asyncio.run(run())


def test_front_otherend_changed():
    """xenbusb_otherend_changed: a front end makes no offers."""

    async def run():
        async with world() as w:
            guest, dev = await one(w)
            await dev.set_state(S.CLOSED)
            await w.tool.write(f"{w.back_node('toy', 0)}/state", "1")
            await settle(guest)
            assert dev.state is S.CLOSED

    asyncio.run(run())


def test_back_localend_changed():
    """xenbusb_back_localend_changed: Closed and offline: hotplug-status goes, whichever came last."""

    async def run():
        async with world() as w:
            dom0, dev = await one_back(w)
            back = w.back_node("toy", 0)
            await w.tool.write(f"{back}/hotplug-status", "connected")
            await w.tool.write(f"{back}/online", "0")
            await settle(dom0)
            assert await w.tool.exists(f"{back}/hotplug-status")
            await dev.set_state(S.CLOSED)
            await settle(dom0)
            assert not await w.tool.exists(f"{back}/hotplug-status")
            await w.tool.write(f"{back}/online", "1")
            await w.tool.write(f"{back}/hotplug-status", "connected")
            await settle(dom0)
            assert await w.tool.exists(f"{back}/hotplug-status")
            await w.tool.write(f"{back}/online", "0")
            await settle(dom0)
            assert not await w.tool.exists(f"{back}/hotplug-status")

    asyncio.run(run())


def test_localend_changed():
    """xenbusb_localend_changed: refreshes the state as needed, then always forwards."""

    async def run():
        async with world() as w:
            guest, dev = await one(w)
            front = w.front_node("toy", 0)
            await w.tool.write(f"{front}/state", "5")
            await until(lambda: ("localend", "/state") in dev.driver.heard)
            assert dev.state is S.CLOSING
            await w.tool.write(f"{front}/state", "rubbish")
            await until(lambda: dev.counters.get("garbage"))
            await settle(guest)
            assert dev.state is S.CLOSING and dev.driver.heard[-1] == ("localend", "/state")

    asyncio.run(run())


def test_get_otherend_node():
    """xenbusb_front/back_get_otherend_node: backend-id, backend; frontend-id, frontend."""

    async def run():
        async with world() as w:
            use(w, Recorder, None)
            guest = await w.guest(1)
            dom0, back = await one_back(w)
            assert (back.otherend_id, back.otherend_path) == (1, w.front_node("toy", 0))
            await guest.attach()
            front = guest.front.devices[NODE]
            assert (front.otherend_id, front.otherend_path) == (0, w.back_node("toy", 0))
            assert dom0.tree.find("rec0") is back.device

    asyncio.run(run())


class AsksForUnit(Recorder):
    @classmethod
    def unit(cls, dev):
        return int(dev.id) if dev.id.isdecimal() and int(dev.id) > 1 else None


def test_units():
    """device_add_child(DEVICE_UNIT_ANY): lowest free unit, unless the driver asks for one."""

    async def run():
        async with world() as w:
            use(w, AsksForUnit, None)
            guest = await w.guest(1)
            await guest.attach()
            for devid in (0, 7, 1):
                await w.plug(devid=devid)
                await until(lambda devid=devid: f"device/toy/{devid}" in guest.front.devices)
            units = {node: dev.nameunit for node, dev in guest.front.devices.items()}
            assert units == {"device/toy/0": "rec0", "device/toy/7": "rec7", "device/toy/1": "rec1"}
            await w.unplug(devid=0)
            await until(lambda: "device/toy/0" not in guest.front.devices)
            await w.plug(devid=0)
            await until(lambda: "device/toy/0" in guest.front.devices)
            assert guest.front.devices["device/toy/0"].nameunit == "rec0"

    asyncio.run(run())


def test_helpers():
    """xenbus_read_driver_state, xenbus_strstate, xenbus_dev_is_online, xenbus_dev_error."""

    async def run():
        async with world() as w:
            dom0, dev = await one_back(w)
            tool = w.tool
            assert await read_driver_state(tool, "/no/such") is S.CLOSED
            await tool.write("/x/state", "4")
            assert await read_driver_state(tool, "/x") is S.CONNECTED
            await tool.write("/x/state", "44")
            with pytest.raises(PeerError):
                await read_driver_state(tool, "/x")
            assert [strstate(n) for n in (0, 2, 8, 9)] == ["Unknown", "InitWait", "Reconfigured", "INVALID"]
            assert await dev.online()
            for text in ("0", "", "no"):
                await dev.write("online", text)
                assert not await dev.online()
            await dev.error("it broke")
            text = await dom0.store.read_str(f"error/{dev.node}/error")
            assert text == "5 it broke"
            await dev.fatal(PeerError("nonsense"))
            await dev.fatal("again")
            assert dev.state is S.CLOSING
            assert (await dom0.store.read_str(f"error/{dev.node}/error")) == "71 nonsense"
            assert await dev.read_opt("absent") is None and await dev.otherend_read("backend-id") == "0"
            assert await dev.otherend_read_opt("absent") is None
            with pytest.raises(NoEntry):
                await dev.read("absent")

    asyncio.run(run())


def test_describe_tells_why_a_device_hangs():
    async def run():
        async with world() as w:
            dom0, dev = await one_back(w)
            await dev.set_state(S.INIT_WAIT)
            front = w.front_node("toy", 0)
            [entry] = describe(dom0.back.device)["children"]
            assert entry["waits"] == (
                f"waits for frontend {front} (domain 1, INITIALISING) to reach INITIALISED"
            )
            await w.tool.write(f"{front}/state", "3")
            await until(lambda: dev.otherend_state is S.INITIALISED)
            [entry] = describe(dom0.back.device)["children"]
            assert entry["waits"] == "waits for its own driver: frontend is INITIALISED"

    asyncio.run(run())


def test_tree_of_the_seeds_header():
    """xenbusb.c's header comment: xenstore0 with xenbusb_front0 and xenbusb_back0, children below."""

    async def run():
        async with world() as w:
            use(w, ToyFront, ToyBack)
            guest = await w.guest(1, Settings(detach=0.05))
            await guest.attach()
            await w.plug(devid=0)
            await w.plug(devid=1)
            await w.plug(devid=0, front=2, back=1)
            await until(lambda: len(guest.front.devices) == 2 and len(guest.back.devices) == 1)
            names = [f"{depth} {dev.nameunit}" for depth, dev in guest.tree.root.walk() if depth]
            assert names == [
                "1 xenstore0", "2 xenbusb_front0", "3 toy0", "3 toy1", "2 xenbusb_back0", "3 toyb0",
            ]  # fmt: skip

    asyncio.run(run())
