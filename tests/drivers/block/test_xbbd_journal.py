"""xbbd and its journals in the life of one process: when there is one, when not, and what is said of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from tests.support.until import until
from tests.support.vbd import SETTINGS, RawFront, rig

from xenbus.bus import XenbusState
from xenbus.drivers.block import blkif
from xenbus.drivers.block.xbbd_queue import QueueLink
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
