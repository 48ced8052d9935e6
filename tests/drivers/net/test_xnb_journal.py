"""xnb and its journal: when there is one, when not, and what the next process makes of it."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from tests.support.raw_vif import RawFront
from tests.support.until import until
from tests.support.vif import SETTINGS, frame, rig

from xenbus.bus import XenbusState
from xenbus.drivers.net import Xn
from xenbus.drivers.net.ports import PortError, open_port
from xenbus.drivers.net.xnb_journal import NetJournal
from xenbus.ring.answers import AnswerRing

S = XenbusState
NAME = "backend.vif.1.0.rings"
GROUP = bytes.fromhex("01005e000001")


@pytest.fixture
def kept(tmp_path):
    """Settings with a place for journals."""
    path = tmp_path / "journals"
    path.mkdir(mode=0o700)
    return replace(SETTINGS, journals=path)


def names(settings):
    return [entry.name for entry in settings.journals.iterdir()]


def said(r):
    return r.back.sysctl()["journal"]()


class Several(Xn):
    num_queues = 2
    multicast_control = True


@asynccontextmanager
async def connected(settings):
    async with rig(Several, settings=settings) as r:
        yield await r.up()


async def works(r):
    await r.connected()
    for back in (False, True):
        assert (await r.exchange(frame(60, 7), back=back)).data == frame(60, 7)


def test_there_is_one_while_a_front_is_connected(kept):
    async def main():
        async with connected(kept) as r:
            assert names(kept) == [NAME] and said(r) == "kept"
            before = (kept.journals / NAME).read_bytes()
            assert len(before) == NetJournal.layout(2).size
            await works(r)
            await r.world.tool.write(f"{r.bnode}/state", "5")  # both begin anew
            await until(lambda: r.front_dev.state is not S.CONNECTED)
            await works(r)
            assert (kept.journals / NAME).read_bytes() != before
            await r.toolstack_close()
            await until(lambda: r.back_dev.state is S.CLOSED)
            assert names(kept) == []
            await r.gone()

    asyncio.run(main())


@pytest.mark.parametrize("why", ["No such file", "No space left"])
def test_without_a_place_for_it_the_guest_is_served_all_the_same(kept, monkeypatch, caplog, why):
    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    if why == "No such file":
        kept.journals.rmdir()
    else:
        monkeypatch.setattr(os, "posix_fallocate", full)

    async def main():
        async with connected(kept) as r:
            await works(r)
            assert "none: " in said(r) and why in said(r)
            await r.gone()

    asyncio.run(main())
    assert any("its guest will not survive" in record.message for record in caplog.records)


def test_the_next_process_goes_on(kept):
    async def main():
        async with connected(kept) as r:
            await r.front.join(GROUP)
            await until(lambda: r.back.multicast.groups == {GROUP})
            seen = []
            r.guest.front.observe(lambda dev, what: seen.append((what, dev.state, dev.otherend_state)))
            for _ in range(2):
                assert await r.leave() == {} and names(kept) == [NAME]
                await r.inherit(kept)
                await works(r)
                assert said(r) == "kept" and await r.error_of(r.bnode) == ""
                assert r.back.multicast.on and r.back.multicast.groups == {GROUP}
            assert seen == []
            await r.gone()
            assert names(kept) == []

    asyncio.run(main())


def test_a_port_that_a_dying_process_still_has_is_waited_for(kept, monkeypatch):
    """The kernel closes what that one had open in no order that we know."""
    opened = []

    async def busy(target):
        opened.append(target)
        if len(opened) < 3:
            raise PortError("EBUSY", target, "it is open elsewhere")
        return await open_port(target)

    async def main():
        async with connected(kept) as r:
            await r.leave()
            monkeypatch.setattr("xenbus.drivers.net.xnb.open_port", busy)
            await r.inherit(kept)
            await works(r)
            assert len(opened) == 3 and await r.error_of(r.bnode) == ""
            await r.gone()

    asyncio.run(main())


@pytest.mark.parametrize("what", ["device", "front"])
def test_what_went_while_no_process_was_there_leaves_no_journal(kept, what):
    async def main():
        async with connected(kept) as r:
            await r.leave()
            assert names(kept) == [NAME]
            if what == "device":
                await r.world.unplug("vif", r.devid)
                await until(lambda: not r.guest.front.devices)
            else:
                await r.world.tool.write(f"{r.bnode}/online", "0")
                await r.front_dev.set_state(S.CLOSED)
            await r.inherit(kept)
            await until(lambda: names(kept) == [])
            if what == "front":
                assert await r.world.tool.wait_for(f"{r.bnode}/state", lambda raw: raw == b"6", 5) == b"6"

    asyncio.run(main())


def test_a_driver_domain_that_comes_back_elsewhere_begins_anew(kept):
    """A real resume: the rings of the old life are nobody's, and so is their journal."""

    async def main():
        async with connected(kept) as r:
            before = (kept.journals / NAME).read_bytes()
            seen = []
            r.dom0.back.observe(lambda dev, what: seen.append((dev.state, names(kept))))
            await r.back.resume(cancelled=False)
            assert seen[0] == (S.INIT_WAIT, [])
            await works(r)
            assert (kept.journals / NAME).read_bytes() != before

    asyncio.run(main())


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("nowhere", "no journal to go on with"),
        ("removed", "No such file"),
        ("version", "no journal of version 1"),
        ("truncated", "bytes, not"),
        ("no space", "bytes, not"),
        ("another", "another connection's"),
        ("queues", "sizes of"),
        ("answers", "does not fit"),
        ("refs", "another connection's"),
    ],
)
def test_with_none_that_fits_both_begin_anew(kept, what, text):
    """And say why."""

    async def main():
        async with connected(kept) as r:
            await r.leave()
            path = kept.journals / NAME
            whole = bytearray(path.read_bytes())
            match what:
                case "version":
                    whole[8] += 1
                case "truncated":
                    del whole[-1:]
                case "no space":
                    whole.clear()
                case "another":
                    whole[30] ^= 1
                case "queues":
                    whole[12] = 3
                case "answers":  # of the first queue's transmit ring, far from where that stands
                    at = NetJournal.layout(0).size
                    struct.pack_into("<Q", whole, at, 1000 << 32 | 1001)
                case "refs":
                    ref, port = f"{r.fnode}/queue-0/tx-ring-ref", f"{r.fnode}/queue-1/tx-ring-ref"
                    one, other = await r.world.tool.read(ref), await r.world.tool.read(port)
                    await r.world.tool.write(ref, other)
                    await r.world.tool.write(port, one)
            path.write_bytes(whole)
            if what == "removed":
                path.unlink()
            await r.inherit(SETTINGS if what == "nowhere" else kept)
            await until(lambda: r.front_dev.state is not S.CONNECTED)
            assert text in await r.error_of(r.bnode)
            await works(r)
            assert what == "nowhere" or said(r) == "kept"
            await r.gone()
            assert what == "nowhere" or names(kept) == []

    asyncio.run(main())


def test_answers_that_were_made_and_not_given_are_given(kept, monkeypatch):
    """As a kill leaves them, right after the one store that makes them good."""

    def push(ring):
        old, new = ring._published, ring.rsp_prod_pvt
        ring._span[0] = old << 32 | new
        return False

    async def main():
        async with rig(RawFront, settings=kept) as r:
            await r.plug()
            await r.states(S.CONNECTED, S.CONNECTED)
            await r.far.linked(5)
            front = r.front
            with monkeypatch.context() as patched:
                patched.setattr(AnswerRing, "push_responses", push)
                front.post(5)
                for ident in (9, 8):
                    front.put(60, page=ident, ident=ident)
                front.push()
                assert (await r.far.get(5)).data == bytes(60)
                await r.far.put(frame(60, 7))
                await until(lambda: front.data.view[5 * 4096 : 5 * 4096 + 60] == frame(60, 7))
                await r.leave()
            front.put(61, page=7, ident=7)
            front.tx.push_requests()
            assert front.answers == [] and front.received == []
            await r.inherit(kept)
            assert await front.answered(3) == [(9, 0), (8, 0), (7, 0)]
            await until(lambda: front.received == [(0, 0, 0, 60)])
            assert len((await r.far.get(5)).data) == 61  # the others had been taken

    asyncio.run(main())
