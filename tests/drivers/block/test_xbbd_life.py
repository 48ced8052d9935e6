"""xbbd's connections: wrong transport parameters and images, fronts that die, begin anew or flood."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.raw_front import OKAY, content, lying, marked, with_raw_front
from tests.support.raw_vbd import RawFront
from tests.support.tap import Tap
from tests.support.until import descriptors, until
from tests.support.vbd import rig

from xenbus.bus import XenbusState
from xenbus.drivers.block import Xbbd
from xenbus.drivers.block.blkif import Op
from xenbus.errors import LinkDown
from xenbus.xenstore.wire import Op as StoreOp


@pytest.fixture
def path(tmp_path):
    return tmp_path / "disk.img"


@pytest.mark.parametrize(
    "jump", [33, pytest.param(2**31, marks=pytest.mark.slow), pytest.param(2**32 - 1, marks=pytest.mark.slow)]
)
def test_ring_indices_that_jump_end_this_device_alone(path, jump):
    path.write_bytes(content())

    async def run():
        async with rig(front=RawFront) as r:
            await r.plug(str(path))
            r.devid += 16
            await r.plug("memory:1M")
            await until(lambda: len(r.guest.front.devices) == len(r.dom0.back.devices) == 2)
            other, good_back = r.front_dev, r.back_dev
            r.devid -= 16
            front_dev, back_dev = r.front_dev, r.back_dev
            await until(
                lambda: all(d.state is XenbusState.CONNECTED for d in (other, good_back, front_dev, back_dev))
            )
            front = r.front
            front.ring.words[0] = jump
            front.channel.notify()
            await until(lambda: back_dev.state is XenbusState.CLOSED)
            assert "req_prod jumped" in await r.error_of(r.bnode)
            # Closed is written by the callback; the task that gave up, which counts too, may end after it.
            await until(lambda: not any(back_dev.counts().values()))
            other.driver.put(Op.READ, 3, 0, other.driver.word(0))
            other.driver.push()
            assert await other.driver.answered(1) == [(3, Op.READ, OKAY)]
            assert good_back.state is XenbusState.CONNECTED

    asyncio.run(run())


LIES = {
    "a ring-ref never granted": ({"ring-ref": 4711}, "4711"),
    "a ring-ref that is none": ({"ring-ref": "4x"}, "ring-ref"),
    "a ring-ref of 40 bits": ({"ring-ref": 2**40}, "no grant reference"),
    "no ring-ref": ({"ring-ref": None}, "ring-ref is missing"),
    "no event channel": ({"event-channel": None}, "event-channel"),
    "a port that is not ours": ({"event-channel": 9999}, "9999"),
    "an ABI nobody knows": ({"protocol": "ia64-abi"}, "ia64-abi"),
    "a ring too large": ({"ring-page-order": 5}, "at most 4"),
    "an order that is none": ({"ring-page-order": "-1"}, "ring-page-order"),
    "too few ring-refs": ({"ring-page-order": 1}, "ring-ref0"),
}


@pytest.mark.parametrize("lie", marked(LIES))
def test_transport_parameters_that_lie(path, lie):
    lies, words = LIES[lie]
    path.write_bytes(content())

    async def run():
        async with rig(front=lying(lies=lies)) as r:
            await r.plug(str(path))
            await until(lambda: r.dom0.back.devices)
            back_dev = r.back_dev
            await until(lambda: back_dev.state is XenbusState.CLOSED)
            assert words in await r.error_of(r.bnode)
            assert not any(back_dev.counts().values())
            await r.gone()

    asyncio.run(run())


def test_a_ring_that_is_nonsense_from_the_start(path):
    path.write_bytes(content())

    class Wild(RawFront):
        async def initialise(self):
            real = self.dev.set_state

            async def set_state(state, values=None):
                self.ring.words[0] = 1000
                await real(state, values)

            self.dev = _Wrapped(self.dev, set_state=set_state)
            await super().initialise()

    async def run():
        async with rig(front=Wild) as r:
            await r.plug(str(path))
            await until(lambda: r.dom0.back.devices)
            back_dev = r.back_dev
            await until(lambda: back_dev.state in (XenbusState.CLOSING, XenbusState.CLOSED))
            assert "req_prod jumped" in await r.error_of(r.bnode)
            await until(lambda: not any(back_dev.counts().values()))

    asyncio.run(run())


class _Wrapped:
    def __init__(self, thing, **methods):
        self._thing = thing
        self.__dict__.update(methods)

    def __getattr__(self, name):
        return getattr(self._thing, name)


TARGETS = {
    "missing": ({"params": "/nowhere/disk.img"}, "/nowhere/disk.img"),
    "none named": ({"params": ""}, "params"),
    "a scheme nobody knows": ({"params": "ftp://x/y"}, "ftp"),
    "a mode nobody knows": ({"params": "memory:1M", "mode": "x"}, "mode"),
    "a size that is none": ({"params": "memory:lots"}, "lots"),
    "sectors longer than a page": ({"params": "memory:1M?sector-size=65536"}, "65536"),
}


@pytest.mark.parametrize("target", marked(TARGETS))
def test_an_image_that_cannot_be_opened(target):
    keys, words = TARGETS[target]

    async def run():
        async with rig() as r:
            await r.plug(**keys)
            async with asyncio.timeout(5):
                while words not in await r.error_of(r.bnode) or await r.world.state(r.bnode) != 6:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            await r.gone()

    asyncio.run(run())


def test_an_image_of_less_than_a_sector_is_no_disk(path):
    path.write_bytes(b"x" * 511)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            async with asyncio.timeout(5):
                while "not one sector" not in await r.error_of(r.bnode):  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            await until(lambda: path not in open_files())

    asyncio.run(run())


def test_an_attach_that_fails_closes_the_image(path):
    """Its state cannot be written. The image is open by then; the device was never attached, so nobody
    detaches it."""
    path.write_bytes(content())
    tap = Tap()

    class Failing(Xbbd):
        opened: ClassVar[list[object]] = []

        async def _open(self):
            storage = await super()._open()
            if not self.opened:
                self.opened.append(storage)
                tap.fail(StoreOp.TRANSACTION_START, "", "EIO", times=1)
            return storage

    async def run():
        async with rig(back=Failing, wrap=tap.around) as r:
            await r.plug(str(path))
            async with asyncio.timeout(5):
                while "EIO" not in await r.error_of(r.bnode):  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            # The error node is written while the failure is still on its way to attach's clean-up.
            await until(lambda: Failing.opened[0]._closing and path not in open_files())
            await until(lambda: r.dom0.hv.held() == r.before[0])

    asyncio.run(run())


def open_files():
    links = (Path("/proc/self/fd", number) for number in descriptors())
    return [link.readlink() for link in links if link.is_symlink()]


@pytest.mark.slow
def test_a_front_that_never_closes_is_forced(path):
    """A guest that does not answer: an orderly detach ends all the same, and gives everything back."""

    async def check(r, front):
        back_dev = r.back_dev
        front.closes = False
        storage = r.back._storage
        back_dev.request_detach()
        await until(lambda: not r.dom0.back.devices, 8)
        assert storage._closing
        assert not any(back_dev.counts().values())

    with_raw_front(path, check)


def test_a_guest_that_dies(path):
    async def check(r, front):
        back_dev = r.back_dev
        front.put(Op.READ, 1, 0, front.word(0))
        front.push()
        r.world.machine.kill(1)
        await r.world.tool.rm("/local/domain/1")
        await until(lambda: back_dev.state is XenbusState.CLOSED)
        assert not any(back_dev.counts().values())
        assert back_dev.hv.held().mapped_pages == back_dev.hv.held().ports == 0
        await r.guest.store.close()

    path.write_bytes(content())

    async def run():
        async with rig(front=RawFront) as r:
            await r.plug(str(path))
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            front_dev, back_dev = r.front_dev, r.back_dev
            await until(lambda: front_dev.state is back_dev.state is XenbusState.CONNECTED)
            await check(r, r.front)

    asyncio.run(run())


def test_a_front_that_begins_anew_without_closing(path):
    """A guest that was reset: Initialising again, a new ring; the old one is given back."""

    async def check(r, front):
        dev, back_dev = r.front_dev, r.back_dev
        front.put(Op.READ, 1, 0, front.word(0))
        front.push()
        await front.answered(1)
        front.ring.release()
        await dev.revoke(front.pages)
        await dev.revoke(front.data)
        await dev.close_evtchn(front.channel)
        await dev.set_state(XenbusState.INITIALISING)
        await front.initialise()
        await until(lambda: dev.state is back_dev.state is XenbusState.CONNECTED)
        assert back_dev.counts()["mapped_pages"] == 1
        front.put(Op.READ, 2, 0, front.word(0))
        front.push()
        assert (await front.answered(2))[1] == (2, Op.READ, OKAY)

    with_raw_front(path, check)


def test_work_in_one_wake_up_is_bounded(path):
    """More requests than that leave the loop a turn in between, and are all answered."""

    async def check(r, front):
        turns = []
        r.back._links[0].queue._again, real = lambda: (turns.append(1), real()), r.back._links[0].queue._again
        for round_ in range(4):
            for n in range(128):
                front.put(Op.READ, n, n * 8 % 2000, front.word(n % 16))
            front.push()
            await front.answered(128 * (round_ + 1))
        assert len(turns) >= 4
        assert all(status == OKAY for _, _, status in front.answers)

    with_raw_front(path, check, front=lying(order=2))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.binary(min_size=112, max_size=112), min_size=1, max_size=20), st.data())
def test_random_bytes_on_the_ring(tmp_path_factory, slots, data):
    """Whatever a slot holds: one answer each, with its id, and the disk keeps what no valid write touched."""
    path = tmp_path_factory.mktemp("disk") / "disk.img"
    ops = data.draw(st.lists(st.sampled_from([0, 1, 3, 5, 6]), min_size=len(slots), max_size=len(slots)))

    async def check(r, front):
        wanted = []
        for slot, op in zip(slots, ops, strict=True):
            raw = bytes([op, slot[1] % 14]) + slot[2:]
            front.put_raw(raw)
            wanted.append(struct.unpack_from("<Q", raw, 8)[0])
        front.push()
        answers = await front.answered(len(slots))
        assert sorted(ident for ident, _, _ in answers) == sorted(wanted)
        assert r.back_dev.state is XenbusState.CONNECTED

    with_raw_front(path, check)


def test_a_driver_domain_whose_suspend_is_cancelled(path):
    """What is in flight is answered first, what comes meanwhile waits, and then it goes on as it was."""

    async def check(r, front):
        for n in range(8):
            front.put(Op.WRITE, n, n * 8, front.word(n))
        front.push()
        await r.dom0.back.suspend()
        assert len(await front.answered(8)) == 8 and r.back._links[0].queue.inflight == 0
        held = r.held()
        front.put(Op.READ, 9, 0, front.word(0))
        front.push()
        await asyncio.sleep(0.02)
        assert len(front.answers) == 8
        await r.dom0.back.resume(cancelled=True)
        assert (await front.answered(9))[8] == (9, Op.READ, OKAY)
        assert r.held() == held
        assert r.back_dev.state is XenbusState.CONNECTED

    with_raw_front(path, check)


def test_a_driver_domain_that_is_restored(path):
    """It has a new number and no page or port of the old life: it offers the disk anew, and a front comes."""
    path.write_bytes(content())

    async def run():
        async with rig(home=2) as r:
            world, dom0 = r.world, r.dom0
            await r.plug(str(path))
            await r.connected()
            back, dev, old_disk = r.back, r.back_dev, r.disk
            await old_disk.write(0, b"w" * 8192)
            assert await old_disk.read(4096, 65536) == b"w" * 4096 + content()[8192:69632]
            assert back._grants.pages
            storage = back._storage
            for bus in dom0.buses:
                assert await bus.suspend() == {}
            late = asyncio.ensure_future(old_disk.read(0, 512))
            parked = asyncio.ensure_future(dom0.hv.suspend())
            await world.machine.suspended(2)
            world.machine.resume(2, new_domid=7)
            await parked
            assert dom0.hv.held().mapped_pages == 0
            # The toolstack moves the disk: the guest's old one goes, with what was in flight.
            await world.unplug("vbd", r.devid, 1, 2)
            with pytest.raises(LinkDown):
                await asyncio.wait_for(late, 5)
            await until(lambda: not r.guest.front.devices)
            await world.tool.rm("/local/domain/2")
            await world.tool.mkdir("/local/domain/7")
            await world.tool.set_perms("/local/domain/7", ["n7"])
            dom0.domid = 7
            await r.plug(str(path))
            old, dom0.store = dom0.store, await dom0.connect()
            await old.close()
            for bus in dom0.buses:
                assert await bus.resume(cancelled=False, store=dom0.store, hv=dom0.hv) == {}
            await r.connected()
            assert r.back_dev is dev and r.back is back and back._storage is storage
            assert await r.disk.read(0, 69632) == b"w" * 8192 + content()[8192:69632]
            await r.disk.write(4096, b"v" * 4096)
            await r.disk.flush()
            assert path.read_bytes()[:8192] == b"w" * 4096 + b"v" * 4096
            assert dom0.hv.held().mapped_pages == 2 + back._grants.pages
            await r.gone()

    asyncio.run(run())
