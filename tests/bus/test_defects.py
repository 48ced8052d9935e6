"""The seed's eighteen defects (B1 to B18), each shown not to be here. Named by its number."""

from __future__ import annotations

import asyncio
import gc

import pytest
from tests.support.split import NODE, QUICK, Recorder, S, ToyBack, in_world, made, one, settle, use
from tests.support.tap import Tap
from tests.support.troubled import (
    Careful,
    ClosesItself,
    Contrary,
    FailsToDetach,
    Hesitates,
    NeverDetaches,
    Slow,
    Together,
    WaitsForPeer,
    replace,
)
from tests.support.until import until

from xenbus.bus import Settings, XenbusDevice, parse_state
from xenbus.errors import Conflict, NoEntry, PeerError, StoreError
from xenbus.newbus import Newbus
from xenbus.xenstore.wire.message import Op


def test_B1_a_state_event_alone_names_the_device():
    """devices_changed: an event deeper than the id is cut before the slash."""

    async def check(w):
        use(w, Recorder, Recorder)
        dom0, guest = await w.guest(0), await w.guest(1)
        await dom0.attach()
        await w.plug(state="6")
        await w.tool.write(f"{w.front_node('toy', 0)}/state", "6")
        await guest.attach()
        await settle(dom0, guest)
        assert not dom0.back.devices and not guest.front.devices
        await w.tool.write(f"{w.front_node('toy', 0)}/state", "1")
        await w.tool.write(f"{w.back_node('toy', 0)}/state", "1")
        await until(lambda: dom0.back.devices and guest.front.devices)
        assert list(guest.front.devices) == [NODE]
        assert list(dom0.back.devices) == ["backend/toy/1/0"]

    in_world(check)


def test_B2_a_transaction_that_never_started_is_not_aborted():
    """write_ivar: only what was started is ended."""

    async def check(w):
        tap = Tap()
        guest, dev = await one(w, wrap=tap)
        tap.fail(Op.TRANSACTION_START, "", "ENOSPC", times=2)
        tap.sent.clear()
        with pytest.raises(StoreError, match="ENOSPC"):
            await dev.set_state(S.CONNECTED)
        assert len(tap.ops(Op.TRANSACTION_START)) == 2  # Connected, then Closing
        assert tap.ops(Op.TRANSACTION_END) == []
        assert guest.store.counts()["transactions"] == 0

    in_world(check)


def test_B3_a_device_that_vanishes_gives_its_boot_hold_back():
    async def check(w):
        guest, _dev = await one(w)
        assert guest.tree.boot.holders == [NODE]
        await w.unplug()
        assert await guest.front.wait_boot(5) == []
        assert guest.tree.boot.clear

    in_world(check)


def test_B3_a_boot_hold_has_a_deadline():
    async def check(w):
        guest, dev = await one(w, settings=Settings(boot=0.05))
        assert await guest.front.wait_boot(5) == [NODE]
        await dev.set_state(S.CLOSED)  # its token is gone: nothing is released twice
        await w.plug(devid=1)  # and without anybody waiting
        await until(lambda: "device/toy/1" in guest.front.devices)
        await until(lambda: guest.tree.boot.clear)

    in_world(check)


def test_B3_no_driver_releases_its_own_hold_once():
    """probe_children, ENXIO: with another device still connecting, boot goes on being held."""

    async def check(w):
        guest, dev = await one(w)
        await w.plug("nobody", 1)
        await until(lambda: guest.front.counters["no_driver"])
        await settle(guest)
        assert guest.tree.boot.holders == [NODE]
        await dev.set_state(S.CONNECTED)
        assert guest.tree.boot.clear
        await dev.set_state(S.CLOSING)
        await dev.set_state(S.CLOSED)

    in_world(check)


def test_B4_a_failing_state_write_is_reported_on_the_device_outside_lock_and_transaction():
    async def check(w):
        tap = Tap()
        guest, dev = await one(w, wrap=tap)
        tap.fail(Op.WRITE, "state\0" + "4", "EIO")
        with pytest.raises(StoreError, match="EIO"):
            await dev.set_state(S.CONNECTED)
        assert guest.store.counts()["transactions"] == 0
        text = await w.tool.read_str(f"/local/domain/1/error/{NODE}/error")
        assert text.startswith("5 writing state Connected") and "EIO" in text
        with pytest.raises(NoEntry):
            await w.tool.read("/local/domain/1/error/device/error")
        assert dev.state is S.CLOSING and await w.state(w.front_node("toy", 0)) == 5
        assert dev.counters["errors"] == 1
        tap.fail(Op.WRITE, "state\0" + "6", "EIO")
        with pytest.raises(StoreError):
            await dev.set_state(S.CLOSED)
        assert dev.counters["errors"] == 1  # once
        assert await dev.set_state(S.CLOSED)

    in_world(check)


def test_B5_only_a_conflict_is_tried_again_and_not_for_ever():
    async def check(w):
        tap = Tap()
        _guest, dev = await one(w, wrap=tap, settings=Settings(attempts=4))
        tap.fail(Op.TRANSACTION_END, "T", "EIO")
        tap.sent.clear()
        with pytest.raises(StoreError, match="EIO"):
            await dev.set_state(S.INIT_WAIT)
        assert [m.payload for m in tap.ops(Op.TRANSACTION_END)] == [b"T\0", b"T\0"]  # the second: Closing
        dev.renew()
        rule = tap.fail(Op.TRANSACTION_END, "T", "EAGAIN", times=1000)
        tap.sent.clear()
        with pytest.raises(Conflict):
            await dev.set_state(S.CLOSED)
        rule.times = 0
        assert len(tap.ops(Op.TRANSACTION_END)) == 4
        tap.fail(Op.TRANSACTION_END, "T", "EAGAIN", times=2)
        assert await dev.set_state(S.CLOSED)

    in_world(check)


def test_B6_a_write_of_state_alone_refreshes_the_cached_state():
    """localend_changed: refresh on /state."""

    async def check(w):
        _guest, dev = await one(w)
        await w.tool.write(f"{w.front_node('toy', 0)}/state", "5")
        await until(lambda: dev.state is S.CLOSING)
        await until(lambda: ("localend", "/state") in dev.driver.heard)

    in_world(check)


def test_B7_early_exits_of_add_device_leave_nothing():
    """A node whose state is not new, and one without a peer: no instance variables, child or watch stay."""

    async def check(w):
        use(w, Recorder, None)
        guest = await w.guest(1)
        await guest.attach()
        before = guest.store.counts()["watches"]
        for devid in range(8):
            node = w.front_node("toy", devid)
            await w.tool.write(f"{node}/state", "1" if devid % 2 else "4")
        await settle(guest)
        gc.collect()
        left = [o for o in gc.get_objects() if isinstance(o, XenbusDevice) and o.bus is guest.front]
        assert left == [] and not guest.front.devices
        assert list(guest.front.device.children) == []
        assert guest.store.counts()["watches"] == before
        assert guest.front.counters["ignored"] and guest.front.counters["no_otherend"]
        assert guest.tree.boot.clear

    in_world(check)


def test_B8_a_detach_may_wait_for_its_peer():
    """delete_child: in an orderly detach the peer's events go on."""

    async def check(w):
        use(w, WaitsForPeer, ToyBack)
        dom0, guest = await w.guest(0, Settings(detach=3)), await w.guest(1, Settings(detach=3))
        await dom0.attach()
        await guest.attach()
        await w.plug()
        await until(lambda: guest.front.devices and dom0.back.devices)
        dev = guest.front.devices[NODE]
        await until(lambda: dev.state is S.CONNECTED)
        driver = dev.driver
        dev.request_detach()
        await until(lambda: dev.detaching)
        back = dom0.back.devices["backend/toy/1/0"]
        await until(lambda: back.state in (S.CLOSING, S.CLOSED))  # the front answers Closing with Closed
        await w.tool.write(f"{w.back_node('toy', 0)}/state", "6")
        await until(lambda: not guest.front.devices)
        assert driver.answer is S.CLOSED and driver.ds == "DETACHING"
        assert "detach_failures" not in dev.counters
        assert await w.state(w.front_node("toy", 0)) == 6

    in_world(check)


@pytest.mark.parametrize("driver", [NeverDetaches, FailsToDetach])
def test_B8_a_detach_that_fails_or_hangs_ends_and_gives_everything_back(driver):
    async def check(w):
        use(w, driver, ToyBack)
        dom0, guest = await w.guest(0), await w.guest(1, Settings(detach=0.05))
        before = guest.hv.held()
        await dom0.attach()
        await guest.attach()
        await w.plug()
        await until(lambda: guest.front.devices)
        dev = guest.front.devices[NODE]
        await until(lambda: dev.state is S.CONNECTED)
        dev.request_detach()
        await until(lambda: not guest.front.devices)
        assert dev.counters["detach_failures"] == 1
        assert guest.hv.held() == before
        assert dev.counts() == dict.fromkeys(dev.counts(), 0)

    in_world(check)


def test_B9_a_passing_error_is_not_the_end_of_a_device():
    """verify_device and device_exists: ENOENT alone means gone."""

    async def check(w):
        tap = Tap()
        guest, dev = await one(w, wrap=tap)
        await dev.set_state(S.CONNECTED)
        await settle(guest)
        for error in ("EIO", "EACCES", "ENOMEM", "EQUOTA"):
            rule = tap.fail(Op.READ, f"{NODE}/state", error, times=2)  # the verdict and the refresh
            await w.tool.set_perms(w.front_node("toy", 0), ["n1", "r0"])  # an event at the node itself
            await until(lambda rule=rule: not rule.times)
            await settle(guest)
        assert guest.front.devices[NODE] is dev and dev.device.attached and not dev.gone
        assert dev.state is S.CONNECTED and await w.state(w.front_node("toy", 0)) == 4
        assert guest.front.counters["unreadable"] >= 1 <= dev.counters["unreadable"]
        assert dev.driver.count("detach") == 0

    in_world(check)


def test_B9_a_new_device_that_cannot_be_read_at_once_is_looked_at_again():
    async def check(w):
        tap = Tap()
        tap.fail(Op.READ, f"{NODE}/state", "EIO")
        guest, dev = await one(w, wrap=tap)
        assert dev.device.attached and guest.front.counters["unreadable"] == 1

    in_world(check)


def test_B9_an_unreadable_peer_is_not_closed():
    async def check(w):
        tap = Tap()
        _guest, dev = await one(w, wrap=tap)
        back = w.back_node("toy", 0)
        rule = tap.fail(Op.READ, f"{back}/state", "EIO", times=2)
        await w.tool.write(f"{back}/state", "2")
        await until(lambda: dev.otherend_state is S.INIT_WAIT)
        assert rule.times == 0 and dev.counters["unreadable"] == 2
        assert ("otherend", S.CLOSED) not in dev.driver.heard

    in_world(check)


@pytest.mark.parametrize("path", ["backend/toy/1", "backend/toy", "backend"])
def test_B10_removing_a_parent_removes_what_is_below(path):
    async def check(w):
        use(w, None, Recorder)
        dom0 = await w.guest(0)
        await dom0.attach()
        for devid in range(3):
            await w.plug(devid=devid)
        await until(lambda: len(dom0.back.devices) == 3)
        await w.tool.rm(f"/local/domain/0/{path}")
        await until(lambda: not dom0.back.devices)
        assert dom0.store.counts()["watches"] == 2

    in_world(check)


def test_B11_what_arrives_during_enumeration_is_found():
    """attach: watch first."""

    async def check(w):
        use(w, Recorder, None)
        tap = Tap()
        guest = await w.guest(1, QUICK, tap.around)
        await w.plug(devid=7)
        # Everything that the bus lists of the root is listed before this device exists.
        rule = tap.after(Op.DIRECTORY, "device\0", lambda: w.plug(devid=0), times=1)
        await guest.attach()
        assert rule.times == 0
        await until(lambda: NODE in guest.front.devices)
        assert tap.paths(Op.WATCH, Op.DIRECTORY)[0] == "device"
        assert tap.ops(Op.WATCH, Op.DIRECTORY)[0].op == Op.WATCH

    in_world(check)


def test_B11_after_a_migration_too():
    async def check(w):
        guest, _dev = await one(w)
        await guest.front.suspend()
        old = guest.store
        tap = Tap()
        guest.store = await guest.connect(tap.around)
        await old.close()
        tap.after(Op.DIRECTORY, "device\0", lambda: w.plug(devid=5), times=1)
        await guest.front.resume(False, store=guest.store, hv=guest.hv)
        guest.back.store = guest.store
        await until(lambda: "device/toy/5" in guest.front.devices)
        ops = tap.ops(Op.WATCH, Op.DIRECTORY)
        assert (ops[0].op, ops[0].payload.split(b"\0")[0]) == (Op.WATCH, b"device")

    in_world(check)


def test_B12_a_property_concerns_its_own_device_alone():
    """probe_children on every event would look at every child."""

    async def check(w):
        use(w, Recorder, None)
        tap = Tap()
        guest = await w.guest(1, QUICK, tap.around)
        await guest.attach()
        for devid in range(20):
            await w.plug(devid=devid)
        await until(lambda: sum(d.device.attached for d in guest.front.devices.values()) == 20)
        await settle(guest)
        tap.sent.clear()
        heard = {dev.node: len(dev.driver.heard) for dev in guest.front.devices.values()}
        await w.tool.write(f"{w.front_node('toy', 7)}/some-property", "x")
        dev = guest.front.devices["device/toy/7"]
        await until(lambda: ("localend", "/some-property") in dev.driver.heard)
        await settle(guest)
        assert tap.paths(*Op) == [path for path in tap.paths(*Op) if path == "/"]
        others = {n: c for n, c in heard.items() if len(guest.front.devices[n].driver.heard) != c}
        assert list(others) == ["device/toy/7"]
        await w.tool.write(f"{w.front_node('toy', 7)}/state", "2")
        await until(lambda: dev.state is S.INIT_WAIT)
        await settle(guest)
        asked = [path for path in tap.paths(*Op) if path != "/"]
        assert asked and all(path.startswith("device/toy/7/") for path in asked)

    in_world(check)


@pytest.mark.parametrize("cancelled", [True, False])
def test_B13_resume_is_together_and_one_failure_stops_no_other(cancelled):
    async def check(w):
        use(w, Together, None)
        Together.barrier = asyncio.Barrier(3)
        guest = await w.guest(1)
        await guest.attach()
        for devid in range(3):
            await w.plug(devid=devid)
        await until(lambda: sum(d.device.attached for d in guest.front.devices.values()) == 3)
        devs = dict(guest.front.devices)
        assert await guest.front.suspend() == {}
        if not cancelled:
            await guest.store.close()
            guest.store = await guest.connect()
        failures = await guest.front.resume(cancelled, store=guest.store, hv=guest.hv)
        assert list(failures) == ["device/toy/1"] and "no resume" in str(failures["device/toy/1"])
        assert all(("resume", cancelled) in dev.driver.heard for dev in devs.values())
        assert await w.state(w.front_node("toy", 1)) == 5
        assert "no resume" in await w.tool.read_str("/local/domain/1/error/device/toy/1/error")
        await w.tool.write(f"{w.back_node('toy', 2)}/state", "2")
        await until(lambda: devs["device/toy/2"].otherend_state is S.INIT_WAIT)
        # The one that failed is Closing: it hears its peer, or it could never close.
        await w.tool.write(f"{w.back_node('toy', 1)}/state", "6")
        await until(lambda: ("otherend", S.CLOSED) in devs["device/toy/1"].driver.heard)

    in_world(check)


@pytest.mark.parametrize(
    "text", ["", "-1", "99", "4x", " 4", "4\n", "4\0", "04", "+4", "9", "٤", "Connected"]
)
def test_B14_what_is_no_state_is_no_state(text):
    with pytest.raises(PeerError):
        parse_state(text)
    with pytest.raises(PeerError):
        parse_state(text.encode())


def test_B14_garbage_of_a_peer_is_recorded_and_its_last_state_kept():
    async def check(w):
        _guest, dev = await one(w)
        back = w.back_node("toy", 0)
        await w.tool.write(f"{back}/state", "2")
        await until(lambda: dev.otherend_state is S.INIT_WAIT)
        for n, text in enumerate(("", "-1", "99", "4x"), 1):
            heard = len(dev.driver.heard)
            await w.tool.write(f"{back}/state", text)
            await until(lambda n=n: dev.counters.get("peer_garbage") == n)
            assert dev.otherend_state is S.INIT_WAIT and len(dev.driver.heard) == heard
        await w.tool.write(f"{back}/state", "3")
        await until(lambda: dev.otherend_state is S.INITIALISED)

    in_world(check)


def test_B15_prefixes_are_whole_components():
    """otherend_watch_cb, local_watch_cb: .../5 is not a prefix of .../51."""

    async def check(w):
        use(w, Recorder, None)
        guest = await w.guest(1)
        await guest.attach()
        await w.plug(devid=5)
        await until(lambda: "device/toy/5" in guest.front.devices)
        dev = guest.front.devices["device/toy/5"]
        await until(lambda: dev.device.attached)
        await settle(guest)
        dev.peer_event(f"{dev.otherend_path}1/state")
        dev.local_event(f"{dev.node}1/state")
        dev.peer_event("/local/domain/9/backend/toy/1/5/state")  # stale, after a migration
        assert dev.mailbox.idle
        dev.peer_event(f"{dev.otherend_path}/state")
        assert not dev.mailbox.idle
        await settle(guest)
        dev.local_event(dev.node)
        assert not dev.mailbox.idle

    in_world(check)


def test_B16_a_slow_driver_stalls_nobody_else():
    async def check(w):
        use(w, Slow, ToyBack)
        Slow.gate = asyncio.Event()
        dom0, guest = await w.guest(0), await w.guest(1)
        await dom0.attach()
        await guest.attach()
        for devid in range(3):
            await w.plug(devid=devid)
        await until(lambda: len(guest.front.devices) == 3)
        first, *rest = (guest.front.devices[f"device/toy/{n}"] for n in range(3))
        await until(lambda: all(dev.state is S.CONNECTED for dev in rest))
        assert first.state is S.INITIALISING
        Slow.gate.set()
        await until(lambda: first.state is S.CONNECTED)

    in_world(check)


def test_B16_a_driver_hears_of_its_failing_state_write():
    async def check(w):
        tap = Tap()
        _guest, dev = await one(w, Careful, wrap=tap)
        tap.fail(Op.WRITE, "state\0" + "3", "ENOSPC")
        await w.tool.write(f"{w.back_node('toy', 0)}/state", "2")
        await until(lambda: ("raised", "ENOSPC") in dev.driver.heard)

    in_world(check)


def test_B16_a_watch_that_is_refused_fails_the_attach():
    async def check(w):
        use(w, Recorder, None)
        tap = Tap()
        guest = await w.guest(1, QUICK, tap.around)
        await guest.attach()
        tap.fail(Op.WATCH, w.back_node("toy", 0), "E2BIG")
        await w.plug()
        await until(lambda: guest.front.counters["attach_failures"] == 1)
        await until(lambda: not guest.front.devices)
        assert await w.state(w.front_node("toy", 0)) == 6
        assert "E2BIG" in await w.tool.read_str(f"/local/domain/1/error/{NODE}/error")
        assert made[-1].heard == [("attach",), ("detach",)]

    in_world(check)


def test_B17_one_task_changes_the_tree(monkeypatch):
    """Children come, fail and go while others are walked: all of it in the bus's own task."""
    tasks = set()

    def spied(method):
        def spy(self, *args, **kwargs):
            task = asyncio.current_task()
            tasks.add((method.__name__, task.get_name() if task else None))
            return method(self, *args, **kwargs)

        return spy

    async def check(w):
        use(w, Contrary, None)
        guest = await w.guest(1)
        await guest.attach()
        for name in ("add_child", "name", "delete"):
            monkeypatch.setattr(Newbus, name, spied(getattr(Newbus, name)))
        for devid in range(12):
            await w.plug(devid=devid)
        await until(lambda: guest.front.counters["attach_failures"] == 6)
        await w.tool.rm("/local/domain/1/device/toy/0")
        await w.tool.rm("/local/domain/1/device/toy")
        await until(lambda: not guest.front.devices)
        monkeypatch.undo()

    in_world(check)
    assert tasks == {(name, "xenbusb_front") for name in ("add_child", "name", "delete")}


@pytest.mark.parametrize("state", [S.INITIALISING, S.INITIALISED, S.CONNECTED, S.CLOSED])
def test_B18_a_node_made_again_is_another_device(state):
    """verify_device: the old one is detached, the new one attached, and untouched by the old one's end."""

    async def check(w):
        guest, dev = await one(w, ClosesItself)
        states = []
        await dev.set_state(state)
        await settle(guest)
        old = dev.driver
        watch = await w.tool.watch(w.front_node("toy", 0) + "/state", states.append)
        await replace(w)
        await until(lambda: guest.front.devices.get(NODE) not in (None, dev))
        new = guest.front.devices[NODE]
        await until(lambda: new.device.attached)
        assert old.heard[-2:] == [("detach",), ("closed", False)]
        await settle(guest)
        assert new.state is S.INITIALISING and await w.state(w.front_node("toy", 0)) == 1
        assert guest.front.counters["replaced"] == 1
        await until(lambda: len(states) == 2)  # the watch's first event, and the replacement: no other
        await watch.close()

    in_world(check)


@pytest.mark.parametrize("gone", [True, False])
def test_B18_a_state_is_never_written_into_another_device(gone):
    """write_ivar: neither into a node that was made again, nor is a removed one made again."""

    async def check(w):
        use(w, Hesitates, None)
        guest = await w.guest(1)
        await guest.attach()
        await w.plug()
        await until(lambda: NODE in guest.front.devices)
        old = guest.front.devices[NODE]
        await until(lambda: old.driver is not None)
        driver, front = old.driver, w.front_node("toy", 0)

        async def between():
            # The bus is busy elsewhere: its look at the node comes after the write.
            guest.front._mailbox.pause()
            await (w.tool.rm(front) if gone else replace(w))

        Hesitates.between = staticmethod(between)
        await w.tool.write(f"{w.back_node('toy', 0)}/state", "2")
        await until(lambda: driver.count("wrote"))
        assert ("wrote", False) in driver.heard
        assert await w.state(front) == (0 if gone else 1)
        assert not await w.tool.exists(f"{front}/ring-ref")
        guest.front._mailbox.go_on()
        await until(lambda: guest.front.devices.get(NODE) is not old)

    in_world(check)


def test_every_defect_has_a_test():
    names = "\n".join(name for name in globals() if name.startswith("test_B"))
    assert [n for n in range(1, 19) if f"test_B{n}_" not in names] == []
