"""xbbd and its journals in the life of one process: when there is one, when not, and what is said of it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from tests.support.raw_vbd import RawFront
from tests.support.until import until
from tests.support.vbd import SETTINGS, rig

from xenbus.bus import XenbusState
from xenbus.bus import journals as journals_
from xenbus.bus.journals import JournalBusy
from xenbus.drivers.block import blkif
from xenbus.drivers.block.storage.schemes.file import FileStorage
from xenbus.drivers.block.xbbd_queue import QueueLink, _locked
from xenbus.ring.journal import Journal
from xenbus.ring.shared import RingError

S = XenbusState
NAME = "backend.vbd.1.51712.q0"


@pytest.fixture
def journals(tmp_path):
    path = tmp_path / "journals"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return str(path)


def names(path):
    return [entry.name for entry in path.iterdir()]


def said(driver, leaf):
    return driver.sysctl()[leaf]()


def test_there_is_one_while_a_front_is_connected(journals, image):
    async def main():
        async with rig(settings=replace(SETTINGS, journals=journals)) as r:
            await r.plug(image)
            await r.connected()
            assert names(journals) == [NAME] and said(r.back, "journal") == "kept"
            await asyncio.gather(*(r.disk.write(n * 4096, bytes([n]) * 4096) for n in range(64)))
            assert await r.disk.read(5 * 4096, 4096) == b"\5" * 4096
            assert said(r.back, "requests_again") == 0
            await r.toolstack_close()
            await until(lambda: r.back_dev.state is S.CLOSED)
            assert names(journals) == []
            await r.gone()

    asyncio.run(main())


def test_a_front_that_begins_anew_gets_a_new_one(journals, image):
    async def main():
        async with rig(front=RawFront, settings=replace(SETTINGS, journals=journals)) as r:
            await r.plug(image)
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            await until(lambda: r.front_dev.state is S.CONNECTED)
            before = (journals / NAME).read_bytes()
            seen = []
            r.dom0.back.observe(lambda dev, what: seen.append((dev.state, names(journals))))
            await r.front_dev.set_state(S.INITIALISING)
            await until(lambda: (S.INIT_WAIT, []) in seen)
            await until(lambda: seen[-1] == (S.CONNECTED, [NAME]))
            assert (journals / NAME).read_bytes() != before

    asyncio.run(main())


def test_without_a_place_for_it_the_disk_is_served_all_the_same(tmp_path, image, caplog):
    async def main():
        async with rig(settings=replace(SETTINGS, journals=tmp_path / "none")) as r:
            await r.plug(image)
            await r.connected()
            await r.disk.write(0, b"x" * 512)
            assert "none: " in said(r.back, "journal") and "No such file" in said(r.back, "journal")
            await r.gone()

    asyncio.run(main())
    assert any("its guest will not survive" in record.message for record in caplog.records)


@pytest.mark.parametrize(("target", "why"), [("memory:1M", "does not outlive"), ("", "none")])
def test_none_is_kept_where_it_is_of_no_use(journals, image, target, why):
    async def main():
        settings = replace(SETTINGS, journals=journals) if target else SETTINGS
        async with rig(settings=settings) as r:
            await r.plug(target or image)
            await r.connected()
            assert names(journals) == [] and why in said(r.back, "journal")

    asyncio.run(main())


def test_a_driver_domain_that_comes_back_elsewhere_begins_anew(journals, image):
    """A real resume: the rings of the old life are nobody's, and so are their journals."""

    async def main():
        async with rig(settings=replace(SETTINGS, journals=journals)) as r:
            await r.plug(image)
            await r.connected()
            link: QueueLink = r.back._links[0]
            await link.pause(1)
            await link.abandon()
            assert names(journals) == []

    asyncio.run(main())


def test_responses_that_were_written_over_end_the_device(journals, image, monkeypatch):
    """Only between two of our own stores could a guest do that: its hand is played."""

    async def main():
        async with rig(front=RawFront, settings=replace(SETTINGS, journals=journals)) as r:
            await r.plug(image)
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            await until(lambda: r.front_dev.state is S.CONNECTED)

            def push(ring):
                raise RingError("response 0: the front wrote over it")

            monkeypatch.setattr("xenbus.ring.journal.JournalledRing.push_responses", push)
            r.front.put(blkif.Op.WRITE, 1, 0, r.front.word(0))
            r.front.push()
            await until(lambda: r.back_dev.state in (S.CLOSING, S.CLOSED))
            assert "wrote over" in await r.error_of(r.bnode)
            await until(lambda: r.back_dev.state is S.CLOSED)
            assert names(journals) == []

    asyncio.run(main())


@asynccontextmanager
async def connected_raw(journals, image, front=RawFront):
    async with rig(front=front, settings=replace(SETTINGS, journals=journals)) as r:
        await r.plug(image)
        await until(lambda: r.guest.front.devices and r.dom0.back.devices)
        await until(lambda: r.front_dev.state is S.CONNECTED)
        yield r


def test_a_front_that_began_anew_meanwhile_is_a_new_one(journals, image):
    async def main():
        async with connected_raw(journals, image) as r:
            await r.leave()
            await r.front_dev.set_state(S.INITIALISING)
            await r.inherit(replace(SETTINGS, journals=journals))
            await until(lambda: r.front_dev.state is r.back_dev.state is S.CONNECTED)
            assert said(r.back, "journal") == "kept" and await r.error_of(r.bnode) == ""
            r.front.put(blkif.Op.READ, 1, 0, r.front.word(0))
            r.front.push()
            assert await r.front.answered(1) == [(1, 0, 0)]

    asyncio.run(main())


def test_a_front_that_has_asked_for_nothing_needs_no_journal(journals, image):
    async def main():
        async with connected_raw(journals, image) as r:
            await r.leave()
            (journals / NAME).unlink()
            await r.front_dev.set_state(S.INITIALISED)
            await r.inherit(replace(SETTINGS, journals=journals))
            await until(lambda: said(r.back, "journal") == "kept")
            await until(lambda: r.front_dev.state is r.back_dev.state is S.CONNECTED)
            assert await r.error_of(r.bnode) == ""

    asyncio.run(main())


@pytest.mark.parametrize("abi", [blkif.X86_64, blkif.X86_32], ids=lambda abi: abi.name)
@pytest.mark.parametrize("order", [0, 2])
def test_requests_of_every_layout_are_done_again(journals, image, monkeypatch, abi, order):
    class Front(RawFront):
        pass

    Front.abi, Front.order = abi, order
    hang = asyncio.Event()

    async def writev(storage, offset, buffers):
        await hang.wait()

    async def main():
        async with connected_raw(journals, image, Front) as r:
            with monkeypatch.context() as patched:
                patched.setattr("xenbus.drivers.block.xbbd.DRAIN_TIMEOUT", 0.05)
                patched.setattr(FileStorage, "writev", writev)
                for n in range(3):
                    r.front.data.view[n * 4096] = n + 1
                    r.front.put(blkif.Op.WRITE, 100 + n, n * 8, r.front.word(n))
                r.front.put(blkif.Op.READ, 7, 64, r.front.word(9))
                r.front.push()
                assert await r.front.answered(1) == [(7, 0, 0)]
                [failure] = (await r.leave()).values()
                assert "in flight" in str(failure)
            with pytest.raises(JournalBusy):  # for as long as the process lives whose writes may come
                journals_.resume(journals, "backend/vbd/1/51712", "q0", journals_.Layout(0, Journal), b"")
            _locked.pop().close()
            await r.inherit(replace(SETTINGS, journals=journals))
            assert sorted(await r.front.answered(4)) == [(7, 0, 0), (100, 1, 0), (101, 1, 0), (102, 1, 0)]
            assert said(r.back, "requests_again") == 3
            r.front.put(blkif.Op.READ, 8, 8, r.front.word(10))
            r.front.push()
            assert (await r.front.answered(5))[4] == (8, 0, 0)
            assert r.front.data.view[10 * 4096] == 2

    asyncio.run(main())


def test_a_front_that_was_answered_and_not_told_is_told(journals, image):
    class Mute:
        def notify(self):
            pass

    async def main():
        async with connected_raw(journals, image) as r:
            queue = r.back._links[0].queue
            queue._channel = Mute()
            r.front.put(blkif.Op.READ, 7, 64, r.front.word(9))
            r.front.push()
            await until(lambda: queue._ring._published == 1)
            assert await r.leave() == {} and r.front.answers == []
            await r.inherit(replace(SETTINGS, journals=journals))
            assert await r.front.answered(1) == [(7, 0, 0)]
            assert said(r.back, "requests_again") == 0

    asyncio.run(main())
