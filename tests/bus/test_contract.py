"""The seed's contract, row by row: each test's docstring begins with the function of xenbusb.c that it
shows."""

from __future__ import annotations

import asyncio

import pytest
from tests.support import split
from tests.support.split import NODE, QUICK, Recorder, S, one, settle, use, world
from tests.support.tap import Tap
from tests.support.until import until

from xenbus.bus import (
    DeviceGone,
)
from xenbus.newbus import NoMatch, NoSuchName
from xenbus.xenstore.wire.message import Op


def test_free_child_ivars():
    """xenbusb_free_child_ivars: both watches and everything taken go with the device, even twice."""

    async def run():
        async with world() as w:
            guest, dev = await one(w)
            assert guest.store.counts()["watches"] == 4
            await dev.grant_ring(2)
            await dev.alloc_evtchn(lambda: None)
            await dev.watch("some/where", lambda path: None)
            dev.spawn(asyncio.Event().wait())
            assert dev.counts() == {
                "tasks": 1, "watches": 1, "channels": 1, "mapped_pages": 0, "granted_pages": 2,
            }  # fmt: skip
            await w.unplug()
            await until(lambda: not guest.front.devices)
            assert guest.store.counts()["watches"] == 2
            assert dev.counts() == dict.fromkeys(dev.counts(), 0)
            await dev.give_back()
            with pytest.raises(DeviceGone):
                await dev.grant_ring(1)

    asyncio.run(run())


def test_otherend_watch_cb():
    """xenbusb_otherend_watch_cb: fires right after attach; the state is read anew; a node that is gone is
    Closed."""

    async def run():
        async with world() as w:
            guest, dev = await one(w)
            assert dev.driver.heard[:2] == [("attach",), ("otherend", S.INITIALISING)]
            back = w.back_node("toy", 0)
            await w.tool.write(f"{back}/state", "2")
            await until(lambda: ("otherend", S.INIT_WAIT) in dev.driver.heard)
            await w.tool.rm(f"{back}/state")
            await until(lambda: ("otherend", S.CLOSED) in dev.driver.heard)
            assert dev.otherend_state is S.CLOSED and guest.front.devices[NODE] is dev

    asyncio.run(run())


class Pausing(Recorder):
    gate: asyncio.Event

    async def otherend_changed(self, state):
        await super().otherend_changed(state)
        await self.gate.wait()


def test_add_device_one_pending_event():
    """xenbusb_add_device: at most one event of the peer is pending, and the last state is not lost."""

    async def run():
        async with world() as w:
            Pausing.gate = asyncio.Event()
            use(w, Pausing, None)
            guest = await w.guest(1)
            await guest.attach()
            await w.plug()
            await until(lambda: guest.front.devices)
            dev = guest.front.devices[NODE]
            await until(lambda: dev.driver is not None and dev.driver.count("otherend") == 1)
            back = w.back_node("toy", 0)
            for _ in range(50):
                await w.tool.write(f"{back}/state", "4")
                await w.tool.write(f"{back}/state", "5")
            await w.tool.write(f"{back}/state", "6")
            assert [event for event in dev.mailbox._pending if event == "otherend"] == ["otherend"]
            Pausing.gate.set()
            await until(lambda: dev.driver.heard[-1] == ("otherend", S.CLOSED))
            assert dev.driver.count("otherend") == 2

    asyncio.run(run())


def test_local_watch_cb():
    """xenbusb_local_watch_cb: what follows the node in the path; "" for the first event."""

    async def run():
        async with world() as w:
            _guest, dev = await one(w)
            assert ("localend", "") in dev.driver.heard
            front = w.front_node("toy", 0)
            await w.tool.write(f"{front}/online", "0")
            await w.tool.write(f"{front}/deep/er", "0")
            await until(lambda: ("localend", "/deep/er") in dev.driver.heard)
            assert ("localend", "/online") in dev.driver.heard

    asyncio.run(run())


def test_device_exists():
    """xenbusb_device_exists: a node that is known exactly is not added again; toy/1 is not toy/11."""

    async def run():
        async with world() as w:
            guest, dev = await one(w)
            await dev.set_state(S.CONNECTED)
            await w.plug(devid=1)
            await w.plug(devid=11)
            await until(lambda: len(guest.front.devices) == 3)
            await w.tool.mkdir(w.front_node("toy", 0))
            guest.front._root_event(NODE)
            await settle(guest)
            assert guest.front.devices[NODE] is dev and len(guest.front.devices) == 3

    asyncio.run(run())


class Attentive(Recorder):
    async def detach(self):
        """A peer event while it detaches would be heard here."""
        await super().detach()
        await self.world.tool.write(f"{self.dev.otherend_path}/state", "3")
        await asyncio.sleep(0.02)
        self.after = self.heard[-1]


def test_delete_child_after_the_node_vanished():
    """xenbusb_delete_child: watches off before detach: no peer event reaches a driver that detaches."""

    async def run():
        async with world() as w:
            Attentive.world = w
            _guest, dev = await one(w, Attentive)
            driver = dev.driver
            await w.tool.rm(w.front_node("toy", 0))
            await until(lambda: hasattr(driver, "after"))
            assert driver.after == ("detach",) and dev.gone

    asyncio.run(run())


def test_verify_device():
    """xenbusb_verify_device: `state` gone: the child goes, though the rest of the node stays."""

    async def run():
        async with world() as w:
            guest, dev = await one(w)
            await w.tool.rm(f"{w.front_node('toy', 0)}/state")
            await until(lambda: not guest.front.devices)
            assert split.made[-1].count("detach") == 1 and dev.gone

    asyncio.run(run())


def test_enumerate_bus():
    """xenbusb_enumerate_bus, xenbusb_front/back_enumerate_type: what was there before the bus is found, a
    failed type or device does not stop the rest."""

    async def run():
        async with world() as w:
            use(w, Recorder, Recorder)
            tap = Tap()
            dom0, guest = await w.guest(0), await w.guest(1, QUICK, tap.around)
            for devid in range(3):
                await w.plug(devid=devid)
            await w.plug("broken", 0)
            await w.tool.rm(f"{w.front_node('toy', 1)}/backend-id")
            tap.fail(Op.DIRECTORY, "device/broken", "EIO")
            await dom0.attach()
            await guest.attach()
            assert sorted(guest.front.devices) == ["device/toy/0", "device/toy/2"]
            assert sorted(dom0.back.devices) == [f"backend/toy/1/{n}" for n in range(3)]

    asyncio.run(run())


def test_sysctl_init():
    """xenbusb_device_sysctl_init, _handler: five read-only leaves, made after a successful attach."""

    async def run():
        async with world() as w:
            guest, dev = await one(w)
            read = guest.tree.sysctl.read
            assert read("dev.rec.0.xenstore_path") == NODE
            assert read("dev.rec.0.xenbus_dev_type") == "toy"
            assert read("dev.rec.0.xenbus_connection_state") == "Initialising"
            assert read("dev.rec.0.xenbus_peer_domid") == 0
            assert read("dev.rec.0.xenstore_peer_path") == w.back_node("toy", 0)
            assert read("dev.rec.0.%parent") == "xenbusb_front0"
            assert "dev.rec.0.%pnpinfo: type=toy" in list(guest.tree.sysctl.show("dev.rec"))
            with pytest.raises(NoSuchName):
                read("dev.rec.0.what")
            await dev.set_state(S.CONNECTED)
            assert read("dev.rec.0.xenbus_connection_state") == "Connected"
            assert read("dev.xenbusb_front.0.devices") == 1

    asyncio.run(run())


class AttachGate(Recorder):
    gate: asyncio.Event

    async def attach(self):
        await super().attach()
        await self.gate.wait()


def test_sysctl_only_after_attach():
    """xenbusb_probe_children: the leaves are made after attach, then the peer watch, then the local one."""

    async def run():
        async with world() as w:
            AttachGate.gate = asyncio.Event()
            use(w, AttachGate, None)
            tap = Tap()
            guest = await w.guest(1, QUICK, tap.around)
            await guest.attach()
            await w.plug()
            await until(lambda: guest.tree.find("rec0") and guest.tree.find("rec0").state.name == "ATTACHING")
            tap.sent.clear()
            with pytest.raises(NoSuchName):
                guest.tree.sysctl.read("dev.rec.0.xenstore_path")
            AttachGate.gate.set()
            await until(lambda: guest.tree.find("rec0").attached)
            await settle(guest)
            assert tap.paths(Op.WATCH) == [f"{w.back_node('toy', 0)}/state", NODE]

    asyncio.run(run())


def test_release_confighook():
    """xenbusb_release_confighook: boot goes on when the last device is Connected or Closed."""

    async def run():
        async with world() as w:
            guest, dev = await one(w)
            await w.plug(devid=1)
            await until(lambda: len(guest.tree.boot.holders) == 2)
            other = guest.front.devices["device/toy/1"]
            await dev.set_state(S.CONNECTED)
            assert guest.tree.boot.holders == ["device/toy/1"]
            await other.set_state(S.CLOSED)
            assert await guest.front.wait_boot(1) == []

    asyncio.run(run())


class NotMine(Recorder):
    @classmethod
    def probe(cls, dev):
        raise NoMatch("no")


def test_probe_children_no_driver():
    """xenbusb_probe_children, ENXIO: forgotten, the store untouched, its hold released; found again later."""

    async def run():
        async with world() as w:
            use(w, NotMine, None)
            guest = await w.guest(1)
            await guest.attach()
            await w.plug()
            await until(lambda: guest.front.counters["no_driver"])
            await settle(guest)
            assert not guest.front.devices and guest.tree.boot.clear
            assert await w.state(w.front_node("toy", 0)) == 1
            use(w, Recorder, None)
            await w.tool.write(f"{w.front_node('toy', 0)}/state", "1")
            await until(lambda: guest.front.devices)

    asyncio.run(run())


class ProbeRaises(Recorder):
    @classmethod
    def probe(cls, dev):
        raise RuntimeError("bad probe")


class AttachRaises(Recorder):
    async def attach(self):
        await self.dev.grant_ring(3)
        raise RuntimeError("bad attach")


class AttachHangs(Recorder):
    deadline = 0.05

    async def attach(self):
        await self.dev.grant_ring(3)
        await asyncio.Event().wait()


class InitRaises(Recorder):
    def __init__(self, dev):
        raise RuntimeError("bad init")


@pytest.mark.parametrize("driver", [ProbeRaises, AttachRaises, AttachHangs, InitRaises])
def test_probe_children_error(driver):
    """xenbusb_probe_children, any other error: Closed, forgotten, everything given back, the error
    written."""

    async def run():
        async with world() as w:
            use(w, driver, None)
            guest = await w.guest(1)
            before = guest.hv.held()
            await guest.attach()
            await w.plug()
            await until(lambda: guest.front.counters["attach_failures"])
            await until(lambda: not guest.front.devices)
            assert await w.state(w.front_node("toy", 0)) == 6
            assert await w.tool.read_str(f"/local/domain/1/error/{NODE}/error")
            assert guest.hv.held() == before and guest.tree.boot.clear
            assert guest.tree.find("rec0") is None
            await w.unplug()
            await until(lambda: not guest.front._errors._nodes)
            await settle(guest)
            assert not await w.tool.exists("/local/domain/1/error/device")  # nothing is left of it

    asyncio.run(run())


def test_probe_children_cb():
    """xenbusb_probe_children_cb: requests made while one waits coalesce into one look at a node."""

    async def run():
        async with world() as w:
            tap = Tap()
            guest, _dev = await one(w, wrap=tap)
            tap.sent.clear()
            for _ in range(100):
                guest.front._root_event(f"{NODE}/state")
            await settle(guest)
            assert tap.paths(Op.READ).count(f"{NODE}/state") == 1

    asyncio.run(run())


def test_devices_changed():
    """xenbusb_devices_changed: short data and `root/type` ignored; one id component in front, two in back."""

    async def run():
        async with world() as w:
            guest, dev = await one(w)
            await dev.set_state(S.CONNECTED)
            for path in ("", "x", "devices/toy/1/state", "/device/toy/1"):
                guest.front._root_event(path)
            assert guest.front.counters["short_events"] == 4
            guest.front._root_event("device/toy")
            guest.back._root_event("backend/toy/1")
            await settle(guest)
            assert list(guest.front.devices) == [NODE] and not guest.back.devices
            assert guest.front._index.split("device/toy/1/state") == ("device/toy/1", "state")
            assert guest.back._index.split("backend/toy/1/2/a/b") == ("backend/toy/1/2", "a/b")

    asyncio.run(run())


def test_identify():
    """xenbusb_identify, nop_confighook_cb: one instance of each bus, unit 0, always there, holding
    nothing."""

    async def run():
        async with world() as w:
            guest = await w.guest(1)
            assert [str(child) for child in guest.xenstore0.children] == [
                "xenbusb_front0: <Xen Frontend Devices> on xenstore0",
                "xenbusb_back0: <Xen Backend Devices> on xenstore0",
            ]
            assert guest.tree.boot.clear

    asyncio.run(run())


def test_add_device_ignores_what_is_not_new():
    """xenbusb_add_device: missing, without a peer, or not Initialising: nothing is added."""

    async def run():
        async with world() as w:
            use(w, Recorder, None)
            guest = await w.guest(1)
            await guest.attach()
            guest.front._root_event("device/toy/9")
            base = "/local/domain/1/device/toy"
            await w.tool.write(f"{base}/1/state", "1")
            await w.tool.write(f"{base}/2/state", "4")
            await w.tool.write(f"{base}/3/state", "wrong")
            for devid, back in ((4, "relative/path"), (5, "")):
                await w.tool.write(f"{base}/{devid}/backend", back)
                await w.tool.write(f"{base}/{devid}/backend-id", "0" if devid == 4 else "x")
                await w.tool.write(f"{base}/{devid}/state", "1")
            await settle(guest)
            assert not guest.front.devices
            assert not await w.tool.exists("/local/domain/1/error/device")
            # The peer's keys, written after the state: found then.
            await w.tool.write(f"{base}/1/backend-id", "0")
            await w.tool.write(f"{base}/1/backend", w.back_node("toy", 1))
            await until(lambda: list(guest.front.devices) == ["device/toy/1"])

    asyncio.run(run())


def test_attach_always_succeeds():
    """xenbusb_attach: the subtree may not exist yet; devices that come later are found."""

    async def run():
        async with world() as w:
            use(w, Recorder, Recorder)
            guest = await w.guest(1)
            await guest.attach()
            assert guest.tree.boot.clear
            await w.plug()
            await until(lambda: guest.front.devices)

    asyncio.run(run())


def test_attach_boot():
    """xenbusb_front_attach waits for its devices at boot, xenbusb_back_attach does not."""

    async def run():
        async with world() as w:
            use(w, Recorder, Recorder)
            dom0, guest = await w.guest(0), await w.guest(1)
            await w.plug()
            await dom0.attach()
            await guest.attach()
            assert dom0.back.devices and dom0.tree.boot.clear
            assert guest.tree.boot.holders == [NODE]

    asyncio.run(run())
