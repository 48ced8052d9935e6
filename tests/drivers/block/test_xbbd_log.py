"""What dom0's log says of a front that lies, and how much of it a front can cause."""

from __future__ import annotations

import asyncio
import logging

import pytest
from tests.support.raw_vbd import RawFront
from tests.support.until import until
from tests.support.vbd import rig

from xenbus.bus import XenbusState
from xenbus.bus.device_log import BURST
from xenbus.drivers.block import blkif
from xenbus.drivers.block.blkif import Op

pytestmark = pytest.mark.usefixtures("info")


@pytest.fixture
def info(caplog):
    with caplog.at_level(logging.INFO, "xenbus.bus"):
        yield


def lines_of(caplog, name="xbbd"):
    return [text for text in caplog.messages if text.startswith(name)]


async def connected(r):
    await r.plug("memory:1M")
    await until(lambda: r.guest.front.devices and r.dom0.back.devices)
    front_dev, back_dev = r.front_dev, r.back_dev
    await until(lambda: front_dev.state is back_dev.state is XenbusState.CONNECTED)
    return r.front, back_dev


def test_a_refused_request_is_named(caplog):
    async def run():
        async with rig(front=RawFront) as r:
            front, _ = await connected(r)
            front.put(Op.READ, 77, 0, blkif.segment_word(54321))
            front.put(99, 78, 0)
            front.push()
            await front.answered(2)

    asyncio.run(run())
    said = lines_of(caplog)
    assert any("xbbd0 (domain 1): request 77, READ: " in line and "54321" in line for line in said)
    assert any("xbbd0 (domain 1): request 78, operation 99: unknown operation 99" in line for line in said)


def test_a_thousand_refused_requests_fill_no_disk(caplog):
    async def run():
        async with rig(front=RawFront) as r:
            front, back_dev = await connected(r)
            for n in range(1000):
                front.put(Op.WRITE, n, 0, count=12)
                if not front.ring.free():
                    front.push()
                    await front.answered(n + 1)
            front.push()
            await front.answered(1000)
            assert back_dev.driver.sysctl()["errors"]() == 1000

    asyncio.run(run())
    said = lines_of(caplog)
    assert sum("12 segments" in line for line in said) == BURST
    assert "the last of many" in said[BURST - 1]


def test_states_that_are_none_fill_no_disk(caplog):
    async def run():
        async with rig(front=RawFront) as r:
            _, back_dev = await connected(r)
            for n in range(300):
                await r.guest.store.write(f"{r.fnode}/state", f"{n}" * 300)
                await until(lambda n=n: back_dev.counters.get("peer_garbage", 0) > n)

    asyncio.run(run())
    said = [line for line in lines_of(caplog) if "not a XenbusState" in line]
    assert len(said) == BURST and max(map(len, said)) < 300


def test_a_front_that_comes_back_and_lies_again_is_closed_again():
    """It was once fatal; the new connection may be so, too."""
    lies: list[object] = [4711, 4712]

    class Twice(RawFront):
        async def initialise(self):
            self.lies = {"ring-ref": lies.pop(0)} if lies else {}
            await super().initialise()

    async def run():
        async with rig(front=Twice) as r:
            await r.plug("memory:1M")
            await until(lambda: r.dom0.back.devices)
            back_dev = r.back_dev
            for ref in ("4711", "4712"):
                async with asyncio.timeout(5):
                    while ref not in await r.error_of(r.bnode):  # noqa: ASYNC110
                        await asyncio.sleep(0.002)
                await until(lambda: back_dev.state is XenbusState.CLOSED)
                assert not any(back_dev.counts().values())
                await r.guest.store.write(f"{r.fnode}/state", "1")
            await until(lambda: back_dev.state is XenbusState.CONNECTED)
            assert r.dom0.tree.sysctl.read("dev.xbbd.0.held") == "1 channels, 1 mapped_pages"

    asyncio.run(run())
