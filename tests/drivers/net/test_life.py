"""A vif through its life: unplugged, begun anew by either side, suspended, scripted; all is given back."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.raw_vif import RawFront, with_raw_front
from tests.support.split import settle
from tests.support.until import until
from tests.support.vif import MAC, frame, rig, with_rig

from xenbus.bus import XenbusState
from xenbus.drivers.net import Packet, Xn, Xnb
from xenbus.errors import LinkDown, store_error

S = XenbusState


async def works(r):
    for back in (False, True):
        assert (await r.exchange(frame(60, 7), back=back)).data == frame(60, 7)


def with_working(check, **given):
    """Runs `check(rig)` once frames go both ways; how it ends is the check's own."""

    async def run():
        async with rig(**given) as r:
            await r.up()
            await works(r)
            await check(r)

    asyncio.run(run())


async def rearm(r, node):
    """The half's `state` is written anew, as a toolstack or a hotplug event does it."""
    await r.world.tool.write(f"{node}/state", "1")


def test_the_toolstack_unplugs_it():
    async def check(r):
        near, far = r.near, r.far
        await r.toolstack_close()
        await r.states(S.CLOSED, S.CLOSED)
        assert near.peer is None is far.peer
        await until(lambda: r.held() == r.before)
        assert not await r.world.tool.exists(f"{r.bnode}/hotplug-status")
        await r.gone()
        with pytest.raises(LinkDown):
            await near.get(1)

    with_working(check)


def test_both_nodes_vanish_at_once():
    async def check(r):
        await works(r)
        r.near.put_many([Packet(frame(60))] * 20)

    with_rig(check)


def test_plugged_again():
    async def run():
        async with rig() as r:
            for _ in range(3):
                await r.up()
                await works(r)
                await r.gone()

    asyncio.run(run())


def test_the_front_end_s_node_alone_vanishes():
    """A guest that died: xnb closes and gives everything back."""

    async def check(r):
        back = r.back_dev
        await r.world.tool.rm(r.fnode)
        await until(lambda: not r.guest.front.devices)
        await until(lambda: back.state is S.CLOSED)
        await until(lambda: r.held() == r.before)

    with_working(check)


def test_the_back_end_s_node_alone_vanishes():
    async def check(r):
        front = r.front_dev
        await r.world.tool.rm(r.bnode)
        await until(lambda: not r.dom0.back.devices)
        await until(lambda: front.state is S.CLOSED)
        await until(lambda: r.held() == r.before)

    with_working(check)


def test_a_detached_bus():
    """Each side's whole bus goes in order, the other is left Closed with nothing held."""

    async def run():
        for side in (0, 1):
            async with rig() as r:
                await r.up()
                await works(r)
                if side:
                    await r.guest.front.detach()
                else:
                    await r.dom0.back.detach()
                await until(lambda r=r: r.held() == r.before)

    asyncio.run(run())


def test_a_back_end_that_closes_is_asked_for_a_new_connection():
    """Its state alone goes to Closing, `online` stays 1: it is to go on serving."""

    async def check(r):
        await works(r)
        near = r.near
        await r.world.tool.write(f"{r.bnode}/state", "5")
        await until(lambda: near.peer is None)
        await r.connected()
        assert r.near is near
        await works(r)

    with_rig(check)


def test_a_back_end_that_always_closes_is_not_asked_for_ever():
    class Sulks(Xnb):
        tries = 0

        async def _connect(self):
            type(self).tries += 1
            await self.dev.set_state(S.CLOSING)

    async def run():
        async with rig(back=Sulks) as r:
            await r.plug()
            await until(lambda: Sulks.tries == 6)
            await r.states(S.CLOSED, S.CLOSED)
            await settle(r.guest, r.dom0)
            assert Sulks.tries == 6
            assert r.front_dev.state is S.CLOSED
            await r.gone()

    asyncio.run(run())


def test_a_front_end_that_begins_anew():
    """As a guest that was reset: its node goes back to Initialising while xnb is Connected."""

    async def check(r):
        await works(r)
        far, front = r.far, r.front
        await rearm(r, r.fnode)
        await until(lambda: r.guest.front.devices and r.front not in (front, None))
        await r.connected()
        assert r.far is far
        await works(r)

    with_rig(check)


def test_a_back_end_that_begins_anew():
    """Its driver was started again, and its node armed: xn gives the old rings up."""

    async def check(r):
        await works(r)
        near = r.near
        await rearm(r, r.bnode)
        await until(lambda: near.peer is None)
        await r.connected()
        assert r.near is near
        await works(r)

    with_rig(check)


def test_a_state_that_is_written_once_more_means_nothing():
    async def check(r):
        links = r.front._links[0], r.back._links[0]
        for node in (r.fnode, r.bnode):
            await r.world.tool.write(f"{node}/state", "4")
            await settle(r.guest, r.dom0)
        assert (r.front._links[0], r.back._links[0]) == links
        await works(r)

    with_rig(check)


def test_a_back_end_that_comes_back_later():
    """It closed with `online` 0, so that nobody waits for it; then a toolstack arms it again."""

    async def check(r):
        near = r.near
        await r.toolstack_close()
        await r.states(S.CLOSED, S.CLOSED)
        await settle(r.guest, r.dom0)
        assert r.front_dev.state is S.CLOSED
        await r.world.tool.write(f"{r.bnode}/online", "1")
        await rearm(r, r.bnode)
        await until(lambda: near.peer is not None)
        await r.connected()
        assert r.near is near
        await works(r)

    with_rig(check)


def test_a_front_end_that_goes_back_and_stays_there():
    """Its rings are let go of at once, not only when it comes again."""

    class Once(RawFront):
        begun = 0

        async def initialise(self):
            type(self).begun += 1
            if self.begun == 1:
                await super().initialise()

    async def check(r, front):
        await rearm(r, r.fnode)
        await until(lambda: Once.begun >= 2)
        await until(lambda: r.back_dev.state is S.INIT_WAIT)
        await until(lambda: not r.dom0.hv.held().mapped_pages)
        assert r.far.peer is None

    with_raw_front(check, front=Once)


def test_other_rings_so_soon_that_xnb_saw_no_state_between():
    """It is reset and Connected again before its Initialising is looked at: the new rings are served."""

    async def check(r, front):
        links = r.back._links
        await front.initialise()
        await until(lambda: r.back._links not in ([], links) and r.back.cable.connected)
        await r.states(S.CONNECTED, S.CONNECTED)
        front.data.view[:60] = frame()
        front.put()
        front.push()
        assert await front.answered(1) == [(0, 0)]

    with_raw_front(check)


class Hasty(RawFront):
    """As mini-os's netfront: it waits for no offer, needs one port, and closes in its own order."""

    lies = dict.fromkeys(
        (
            "feature-rx-notify",
            "feature-sg",
            "feature-gso-tcpv4",
            "feature-gso-tcpv6",
            "feature-ipv6-csum-offload",
        )
    )

    async def attach(self):
        self.seen = []
        await self.initialise()

    async def otherend_changed(self, state):
        self.seen.append(state)

    async def waits(self, state):
        await until(lambda: state in self.seen)
        self.seen.clear()


def test_a_front_end_that_does_not_wait_for_the_offer():
    async def check(r, front):
        for _ in range(3):
            await front.waits(S.CONNECTED)
            await r.far.linked(5)
            front.post(0)
            front.put(60, page=1)
            front.push()
            assert len((await r.far.get(5)).data) == 60
            await until(lambda: r.back._links[0].rx._posted)
            await r.far.put(frame(60))
            await until(lambda: front.received)
            front.received.clear()
            for mine, its in ((S.CLOSING, S.CLOSING), (S.CLOSED, S.CLOSED), (S.INITIALISING, S.INIT_WAIT)):
                await front.dev.set_state(mine)
                await front.waits(its)
            assert not r.dom0.hv.held().mapped_pages
            await front.initialise()

    with_raw_front(check, front=Hasty)


def test_a_rate_is_not_kept_to_and_that_is_said(caplog):
    with_rig(works, rate="1000000,50000")
    assert "rate 1000000,50000 is not kept to" in caplog.text


def test_nothing_is_left_in_the_store_of_an_earlier_connection():
    async def check(r):
        old = {"queue-0", "queue-1", "multi-queue-num-queues"}
        assert old <= set(await r.world.tool.directory(r.fnode))
        r.front._wanted_queues = 1
        near = r.near
        await r.world.tool.write(f"{r.bnode}/state", "5")
        await until(lambda: near.peer is None)
        await r.connected()
        assert not old & set(await r.world.tool.directory(r.fnode))
        await works(r)

    with_rig(check, xn_max_queues="2")


def test_suspend_that_is_cancelled():
    async def check(r):
        for buses in ([r.guest.front], [r.dom0.back]):
            for bus in buses:
                assert not any((await bus.suspend()).values())
            assert r.near.put_many([Packet(frame(60))]) in (0, 1)
            for bus in buses:
                assert not any((await bus.resume(True)).values())
            await until(lambda: not r.front.cable._held and not r.back.cable._held)
        while r.far._received:
            await r.far.get(1)
        await works(r)

    with_rig(check)


def test_hotplug_script():
    """xnb is Connected once the script has said so, not before; a front sees no carrier till then."""

    async def run():
        async with rig() as r:
            await r.plug(script="/etc/xen/scripts/vif-bridge")
            await r.states(S.CONNECTED, S.INIT_WAIT)
            await until(lambda: r.back._links)
            await asyncio.sleep(0.02)
            assert r.back_dev.state is S.INIT_WAIT
            assert r.near.peer is None
            await r.world.tool.write(f"{r.bnode}/hotplug-status", "connected")
            await r.connected()
            await works(r)
            await r.gone()

    asyncio.run(run())


def test_hotplug_script_that_fails():
    async def run():
        async with rig() as r:
            await r.plug(script="/etc/xen/scripts/vif-bridge")
            await r.states(S.CONNECTED, S.INIT_WAIT)
            await r.world.tool.write(f"{r.bnode}/hotplug-error", "no bridge xenbr7")
            await r.world.tool.write(f"{r.bnode}/hotplug-status", "error")
            await until(lambda: r.back_dev.counters.get("errors"))
            assert "no bridge xenbr7" in await r.error_of(r.bnode)
            assert r.back_dev.state is S.INIT_WAIT
            await r.gone()

    asyncio.run(run())


def test_hotplug_script_that_was_faster():
    async def check(r):
        await works(r)

    with_rig(check, script="vif-bridge", hotplug_status="connected")


def test_nodes_of_both_halves():
    """What netif.h names, as Linux's drivers write it."""

    async def check(r):
        read = r.world.tool.read_str
        ours = ("sg", "gso-tcpv4", "gso-tcpv6", "ipv6-csum-offload", "rx-copy", "multicast-control",
                "dynamic-multicast-control", "split-event-channels")  # fmt: skip
        for key in ours:
            assert await read(f"{r.bnode}/feature-{key}") == "1"
        # Nothing else: a front makes use of what there is (control rings, XDP's headroom).
        offered = {key for key in await r.world.tool.directory(r.bnode) if key.startswith("feature-")}
        assert offered == {f"feature-{key}" for key in (*ours, "rx-flip", "no-csum-offload")}
        assert await read(f"{r.bnode}/feature-rx-flip") == "0"
        assert await read(f"{r.bnode}/multi-queue-max-queues") == "4"
        for key in ("request-rx-copy", "feature-rx-notify", "feature-sg", "feature-gso-tcpv4",
                    "feature-gso-tcpv6", "feature-ipv6-csum-offload"):  # fmt: skip
            assert await read(f"{r.fnode}/{key}") == "1"
        assert await read(f"{r.fnode}/feature-no-csum-offload") == "0"
        assert not await r.world.tool.exists(f"{r.fnode}/multi-queue-num-queues")
        assert r.front_dev.features is not None

    with_rig(check)


def test_sysctl():
    async def check(r):
        await works(r)
        for driver in (r.front, r.back):
            leaves = {name: leaf() for name, leaf in driver.sysctl().items()}
            assert leaves["mac"] == MAC
            assert (leaves["mtu"], leaves["carrier"], leaves["queues"]) == (1500, 1, 1)
            assert (leaves["rx_packets"], leaves["tx_packets"], leaves["rx_errors"]) == (1, 1, 0)
            assert leaves["port"].startswith("packet")

    with_rig(check)


@pytest.mark.parametrize("mac", ["", "x", "01:00:00:00:00:00", "00:16:3e:01:02"])
def test_a_mac_that_is_none(mac):
    async def run():
        async with rig() as r:
            await r.plug(mac=mac)
            for node in (r.fnode, r.bnode) if mac else (r.fnode,):
                await r.world.tool.wait_for(f"{node}/state", lambda value: value == b"6", 5)
                assert "/mac: " in await r.error_of(node)

    asyncio.run(run())


async def restored(r, guest, domid):
    """A domain is saved and restored under another number; the toolstack makes its device anew."""
    world, old = r.world, guest.domid
    for bus in guest.buses:
        assert not any((await bus.suspend()).values())
    parked = asyncio.ensure_future(guest.hv.suspend())
    await world.machine.suspended(old)
    world.machine.resume(old, new_domid=domid)
    await parked
    assert not guest.hv.held().mapped_pages
    await world.unplug("vif", r.devid, r.guest.domid, r.dom0.domid)
    other = r.dom0.back if guest is r.guest else r.guest.front
    await until(lambda: not other.devices)
    await world.tool.rm(f"/local/domain/{old}")
    await world.tool.mkdir(f"/local/domain/{domid}")
    await world.tool.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
    guest.domid = domid
    await r.plug()
    store, guest.store = guest.store, await guest.connect()
    await store.close()
    for bus in guest.buses:
        assert await bus.resume(cancelled=False, store=guest.store, hv=guest.hv) == {}
    await r.connected()
    await works(r)


def test_a_guest_that_is_restored():
    async def check(r):
        near, dev = r.near, r.front_dev
        near.put_many([Packet(frame(60))] * 20)  # lost with the rings
        await restored(r, r.guest, 5)
        assert r.near is near
        assert r.front_dev is dev
        await r.world.unplug("vif", r.devid, 5)
        await until(lambda: not r.guest.front.devices and not r.dom0.back.devices)
        await until(lambda: r.held() == r.before)

    with_working(check)


def test_a_driver_domain_that_is_restored():
    async def check(r):
        far, dev = r.far, r.back_dev
        await restored(r, r.dom0, 7)
        assert r.far is far
        assert r.back_dev is dev
        await r.gone()

    with_working(check, home=2)


def test_a_guest_that_may_have_no_more_watches():
    """It has its link all the same; when that goes down it hears nothing of it, and all else works."""

    class Poor(Xn):
        async def _connect(self):
            refused = store_error("E2BIG", "WATCH", "carrier")

            async def watch(path, callback):
                raise refused

            self.dev.store.watch, real = watch, self.dev.store.watch
            try:
                await super()._connect()
            finally:
                self.dev.store.watch = real

    async def check(r):
        assert r.front_dev.counts()["watches"] == 0
        await works(r)

    with_rig(check, front=Poor)


def test_the_store_goes_away():
    """What was taken of the hypervisor is given back though the store can be told nothing."""

    async def check(r):
        await r.guest.store.close()
        await r.guest.front.detach()
        assert r.guest.hv.held() == r.before[1]
        await r.dom0.store.close()
        await r.dom0.back.detach()
        assert r.dom0.hv.held() == r.before[0]

    with_working(check)
