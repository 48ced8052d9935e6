"""xbd against back ends that lie, die or wait, and over suspends: callers get an answer or a clear error."""

from __future__ import annotations

import array
import asyncio
import random

import pytest
from tests.support.raw_vbd import RawBack
from tests.support.until import until
from tests.support.vbd import SETTINGS, rig

from xenbus.bus import Settings, XenbusState
from xenbus.drivers.block import DiskError, Xbd, blkif, xbd
from xenbus.drivers.block.blkif import Op
from xenbus.errors import DeadlineError, Denied, HypervisorError, LinkDown, PeerError, UsageError

OKAY, ERROR, UNSUPPORTED = blkif.BLKIF_RSP_OKAY, blkif.BLKIF_RSP_ERROR, blkif.BLKIF_RSP_EOPNOTSUPP


def back_with(**attributes):
    return type("RawBack", (RawBack,), attributes)


def with_raw_back(check, *, back=RawBack, settings=SETTINGS):
    async def run():
        async with rig(back=back, settings=settings) as r:
            await r.plug("unused")
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            front_dev, back_dev = r.front_dev, r.back_dev
            await until(lambda: front_dev.state is back_dev.state is XenbusState.CONNECTED)
            await check(r, r.back)
            await r.gone()

    asyncio.run(run())


def ident_of(back, raw: bytes) -> int:
    return back.abi.head.unpack_from(raw)[2]


def test_the_unit_comes_from_virtual_device():
    class Dev:
        id = ""

    for vdev, unit in ((51712, 0), (51728, 1), ((1 << 28) | (20 << 8), 20), (768, None), (2048, None)):
        Dev.id = str(vdev)
        assert Xbd.unit(Dev) == unit
    for strange in ("x", "-1", "99999999999"):
        Dev.id = strange
        assert Xbd.unit(Dev) is None


def test_requests_as_blkif_h_has_them():
    async def check(r, back):
        read = asyncio.ensure_future(r.disk.read(4096, 1536))
        (raw,) = await back.asked(1)
        op, count, handle, ident, sector = back.abi.rw.unpack_from(raw)
        assert (op, count, handle, sector) == (Op.READ, 1, 51712, 8)
        gref, first, last = blkif.SEGMENT.unpack_from(raw, back.abi.segments_at)
        assert (first, last) == (0, 2)
        mapped = await r.back_dev.map_ring([gref])
        mapped.view[:1536] = b"D" * 1536
        back.answer(ident, op, OKAY)
        assert await read == b"D" * 1536
        await r.back_dev.unmap(mapped)
        flush = asyncio.ensure_future(r.disk.flush())
        raw = (await back.asked(2))[1]
        assert raw[0] == Op.FLUSH_DISKCACHE and raw[1] == 0
        back.answer(ident_of(back, raw), Op.FLUSH_DISKCACHE, OKAY)
        await flush

    with_raw_back(check)


def test_barriers_stand_in_for_flushes():
    async def check(r, back):
        flush = asyncio.ensure_future(r.disk.flush())
        (raw,) = await back.asked(1)
        assert raw[0] == Op.WRITE_BARRIER and raw[1] == 0
        back.answer(ident_of(back, raw), Op.WRITE_BARRIER, OKAY)
        await flush

    with_raw_back(check, back=back_with(offers={"feature-barrier": 1}))


def test_a_back_end_without_features_is_still_a_disk():
    async def check(r, back):
        await r.disk.flush()  # it keeps no cache: nothing to do
        assert not back.requests
        for call in (r.disk.discard(0, 4096), r.disk.write_barrier(0, b"x" * 512)):
            with pytest.raises(DiskError, match="EOPNOTSUPP"):
                await call
        assert r.front._links[0].ring_pages == 1  # max-ring-page-order is silent
        read = asyncio.ensure_future(r.disk.read(0, 12 * 4096))
        await back.asked(2)  # 11 segments and 1: no indirect requests
        assert [raw[1] for raw in back.requests] == [11, 1]
        for raw in list(back.requests):
            back.answer(ident_of(back, raw), Op.READ, OKAY)
        assert len(await read) == 12 * 4096

    with_raw_back(check, back=back_with(offers={}))


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (ERROR, "EIO"),
        (UNSUPPORTED, "EOPNOTSUPP"),
        pytest.param(-77, "EIO", marks=pytest.mark.slow),
        pytest.param(5, "EIO", marks=pytest.mark.slow),
    ],
)
def test_errors_reach_the_caller_and_only_him(status, name):
    async def check(r, back):
        bad = asyncio.ensure_future(r.disk.write(512, b"x" * 512))
        good = asyncio.ensure_future(r.disk.write(1024, b"x" * 512))
        first, second = await back.asked(2)
        back.answer(ident_of(back, second), Op.WRITE, OKAY)
        back.answer(ident_of(back, first), Op.WRITE, status)
        await good
        with pytest.raises(DiskError, match="write of 512 bytes at 512") as caught:
            await bad
        assert caught.value.name == name
        assert r.front.queue.errors == 1
        assert r.front_dev.state is XenbusState.CONNECTED

    with_raw_back(check)


GARBAGE = {
    "an id far away": lambda b, i: b.answer(2**40, Op.READ, OKAY),
    "an id not in flight": lambda b, i: b.answer(i ^ 8, Op.READ, OKAY),
    "an answer twice": lambda b, i: (b.answer(i, Op.READ, OKAY), b.answer(i, Op.READ, OKAY)),
    "another operation": lambda b, i: b.answer(i, Op.WRITE, OKAY),
    "rsp_prod beyond the requests": lambda b, i: (b.ring.words.__setitem__(2, 9), b.channel.notify()),
    "rsp_prod far away": lambda b, i: (b.ring.words.__setitem__(2, 2**31), b.channel.notify()),
}


SLOW = {"an id not in flight", "rsp_prod far away", "a negative size", "no sector"}  # the same check again


def marked(cases):
    return [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in cases]


@pytest.mark.parametrize("what", marked(GARBAGE))
def test_garbage_on_the_ring_ends_the_device_with_a_word_on_it(what):
    async def check(r, back):
        disk, front_dev = r.disk, r.front_dev
        reads = [asyncio.ensure_future(disk.read(n * 512, 512)) for n in range(2)]
        raw = (await back.asked(2))[0]
        GARBAGE[what](back, ident_of(back, raw))
        ends = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 5)
        assert any(isinstance(end, PeerError) for end in ends)
        with pytest.raises(PeerError):
            await disk.read(0, 512)
        await until(lambda: front_dev.state is XenbusState.CLOSED)
        assert "response" in await r.error_of(r.fnode) or "rsp_prod" in await r.error_of(r.fnode)
        await until(
            lambda: not any(front_dev.counts().values())
        )  # the pages once the back end is Closed, too

    with_raw_back(check)


def test_what_was_answered_before_the_nonsense_is_answered():
    async def check(r, back):
        disk = r.disk
        reads = [asyncio.ensure_future(disk.read(n * 512, 512)) for n in range(3)]
        idents = [ident_of(back, raw) for raw in await back.asked(3)]
        back.ring.put_response(back.abi.response.pack(idents[0], Op.READ, OKAY))
        back.answer(idents[1], Op.WRITE, OKAY)
        ends = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 5)
        assert isinstance(ends[0], bytes)
        assert isinstance(ends[1], PeerError) and isinstance(ends[2], PeerError)

    with_raw_back(check)


PROPERTIES = {
    "no size": ({"sector-size": 512, "info": 0}, "sectors"),
    "a size that is none": ({"sectors": "lots"}, "sectors"),
    "a negative size": ({"sectors": "-5"}, "sectors"),
    "a size beyond any offset": ({"sectors": 1 << 54}, f"sectors {1 << 54}"),
    "a number beyond 64 bits": ({"sectors": 1 << 64}, "more than 64 bits"),
    "a sector size that is none": ({"sectors": 8, "sector-size": 513}, "sector-size 513"),
    "no sector": ({"sectors": 8, "sector-size": 0}, "sector-size 0"),
    "a sector longer than a page": ({"sectors": 800, "sector-size": 8192}, "sector-size 8192"),
}


@pytest.mark.parametrize("what", marked(PROPERTIES))
def test_properties_that_make_no_sense(what):
    properties, words = PROPERTIES[what]

    async def run():
        async with rig(back=back_with(properties=properties)) as r:
            await r.plug("unused")
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            front_dev, disk = r.front_dev, None
            await until(lambda: front_dev.driver is not None)
            disk = front_dev.driver.disk
            await until(lambda: front_dev.state is XenbusState.CLOSED)
            assert words in await r.error_of(r.fnode)
            with pytest.raises(LinkDown):
                await disk.read(0, 512)
            await r.gone()

    asyncio.run(run())


def test_a_disk_that_is_never_connected_says_who_owes():
    async def run():
        async with rig(back=back_with(connects=False)) as r:
            await r.plug("unused")
            await until(lambda: r.guest.front.devices and r.front is not None)
            with pytest.raises(UsageError, match="never connected"):
                _ = r.disk.size
            with pytest.raises(
                DeadlineError, match=r"Connected; domain 0, /local/domain/0/backend/vbd/1/51712 owed"
            ):
                await r.disk.connected(0.05)
            r.disk.timeout = 0.05
            with pytest.raises(DeadlineError):
                await r.disk.read(0, 512)
            await r.gone()

    asyncio.run(run())


def test_an_answer_that_never_comes():
    async def check(r, back):
        r.disk.timeout = 0.1
        with pytest.raises(DeadlineError, match="read of 512 bytes at 1024; domain 0") as caught:
            await r.disk.read(1024, 512)
        assert caught.value.seconds == 0.1
        assert r.front.queue.inflight == 1
        # It comes after all: nobody waits, nothing breaks, the slot is free again.
        back.answer(ident_of(back, back.requests[0]), Op.READ, OKAY)
        await until(lambda: r.front.queue.inflight == 0)
        assert r.front.queue.waiting == 0

    with_raw_back(check)


def test_a_cancelled_read_leaves_the_buffer_alone():
    async def check(r, back):
        buffer = bytearray(b"." * 512)
        read = asyncio.ensure_future(r.disk.read_into(0, buffer))
        (raw,) = await back.asked(1)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        buffer.extend(b"free to grow")
        back.answer(ident_of(back, raw), Op.READ, OKAY)
        await until(lambda: r.front.queue.inflight == 0)
        assert buffer.startswith(b"." * 512)

    with_raw_back(check)


def test_the_nodes_vanish_under_load():
    async def check(r, back):
        disk, front_dev = r.disk, r.front_dev
        reads = [asyncio.ensure_future(disk.read(n * 512, 512)) for n in range(200)]
        await back.asked(32)
        await r.world.unplug("vbd", r.devid)
        for end in await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 5):
            assert isinstance(end, LinkDown) and "is gone" in str(end)
        await until(lambda: not r.guest.front.devices)
        assert not any(front_dev.counts().values())

    with_raw_back(check)


def test_the_back_ends_node_alone_is_removed():
    """The guest may not read its parent, so the store says EACCES of it, not ENOENT: gone all the same."""

    async def check(r, back):
        disk, front_dev = r.disk, r.front_dev
        with pytest.raises(Denied):
            await r.guest.store.read(f"/local/domain/0/backend/vbd/1/{r.devid + 16}/state")
        read = asyncio.ensure_future(disk.read(0, 512))
        await back.asked(1)
        await r.world.tool.rm(r.bnode)
        with pytest.raises(LinkDown, match="is gone"):
            await asyncio.wait_for(read, 5)
        with pytest.raises(LinkDown):
            await asyncio.wait_for(disk.write(0, bytes(512)), 5)
        await until(lambda: front_dev.state is XenbusState.CLOSED and not any(front_dev.counts().values()))

    with_raw_back(check)


@pytest.mark.parametrize("answers", [True, False])
def test_a_back_end_that_closes_under_load(answers):
    """What it still answers ends well; what it never does is waited for, and then fails."""

    async def check(r, back):
        disk, front_dev = r.disk, r.front_dev
        reads = [asyncio.ensure_future(disk.read(n * 512, 512)) for n in range(100)]
        asked = list(await back.asked(32))
        await r.toolstack_close()
        await until(lambda: front_dev.state is XenbusState.CLOSING)
        if answers:
            for raw in asked:
                back.answer(ident_of(back, raw), Op.READ, OKAY)
        ends = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 5)
        assert sum(isinstance(end, bytes) for end in ends) == (len(asked) if answers else 0)
        assert all("closed it" in str(end) for end in ends if not isinstance(end, bytes))
        await until(lambda: front_dev.state is XenbusState.CLOSED and not any(front_dev.counts().values()))

    with_drain(0.2 if answers else 0.05, lambda: with_raw_back(check))


def test_a_detach_that_runs_out_of_time_leaves_no_caller():
    async def check(r, back):
        disk = r.disk
        read = asyncio.ensure_future(disk.read(0, 512))
        await back.asked(1)
        r.front_dev.request_detach()
        with pytest.raises(LinkDown):
            await asyncio.wait_for(read, 5)
        await until(lambda: r.held()[1] == r.before[1])

    with_drain(60, lambda: with_raw_back(check, settings=Settings(callback=5.0, detach=0.1, boot=2.0)))


def with_drain(seconds, run):
    real = xbd.DRAIN_TIMEOUT
    xbd.DRAIN_TIMEOUT = seconds
    try:
        run()
    finally:
        xbd.DRAIN_TIMEOUT = real


def test_no_pages_left_is_an_error_of_ours():
    """The pool cannot grow at all: callers hear it; with fewer pages than wished it makes do."""

    async def check(r, back):
        real, pages = r.front_dev.hv.grants.alloc, []

        async def alloc(domid, count, *, writable=True):
            pages.append(count)
            if len(pages) <= refusals:
                raise HypervisorError("ENOSPC", f"granting {count} pages")
            return await real(domid, count, writable=writable)

        r.guest.hv.alloc = alloc
        refusals = 1
        read = asyncio.ensure_future(r.disk.read(0, 65536))
        await until(lambda: len(pages) >= 2)
        await back.asked(1)
        assert pages[0] > pages[1]
        read.cancel()
        await asyncio.gather(read, return_exceptions=True)

    with_raw_back(check, back=back_with(offers={"feature-max-indirect-segments": 32}))


def test_a_new_size_is_noticed():
    async def check(r, back):
        assert r.disk.size == 2048 * 512
        await r.back_dev.set_state(XenbusState.CONNECTED, {"sectors": 4096})
        await until(lambda: r.disk.size == 4096 * 512)

    with_raw_back(check)


def content(length):
    return random.Random(3).randbytes(length)


def test_a_cancelled_suspend_changes_nothing(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(content(1 << 20))

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            disk, connection = r.disk, r.front.queue.connections[0]
            await disk.read(0, 4096)
            reads = [asyncio.ensure_future(disk.read(n * 4096, 4096)) for n in range(200)]
            await asyncio.sleep(0)
            await r.guest.front.suspend()
            assert r.front.queue.inflight == 0
            held = r.held()
            late = asyncio.ensure_future(disk.read(0, 512))
            await asyncio.sleep(0.02)
            assert not late.done()
            assert r.held() == held
            await r.guest.front.resume(cancelled=True)
            assert b"".join(await asyncio.gather(*reads)) == content(1 << 20)[: 200 * 4096]
            assert await late == content(1 << 20)[:512]
            assert r.front.queue.connections[0] is connection
            await r.gone()

    asyncio.run(run())


def test_time_does_not_count_while_suspended(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(content(1 << 20))

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            disk = r.disk
            disk.timeout = 0.05
            await r.guest.front.suspend()
            late = asyncio.ensure_future(disk.read(0, 512))
            await asyncio.sleep(0.15)
            await r.guest.front.resume(cancelled=True)
            assert await late == content(1 << 20)[:512]

    asyncio.run(run())


def test_a_real_resume_sends_again_what_was_in_flight():
    """Requests that the old back end never answered go out on the new ring, oldest first, callers unaware."""

    async def run():
        async with rig(back=back_with(offers={"feature-flush-cache": 1})) as r:
            await r.plug("unused")
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            front_dev = r.front_dev
            await until(lambda: front_dev.state is r.back_dev.state is XenbusState.CONNECTED)
            disk, back = r.disk, r.back
            writes = [asyncio.ensure_future(disk.write(n * 512, bytes([n]) * 512)) for n in range(3)]
            read = asyncio.ensure_future(disk.read(4096, 1024))
            flush = asyncio.ensure_future(disk.flush())
            before = [raw[0] for raw in await back.asked(5)]
            await r.guest.front.suspend()
            late = asyncio.ensure_future(disk.read(0, 512))
            await back.detach()
            back.requests.clear()
            back.mapping = None
            # Everything of the old life is gone; the toolstack rewrites both halves.
            parked = asyncio.ensure_future(r.guest.hv.suspend())
            await r.world.machine.suspended(1)
            r.world.machine.resume(1, new_domid=5)
            await parked
            await r.world.unplug("vbd", r.devid, 1)
            await until(lambda: not r.dom0.back.devices)
            await r.world.tool.rm("/local/domain/1")
            await r.world.tool.mkdir("/local/domain/5")
            await r.world.tool.set_perms("/local/domain/5", ["n5"])
            r.guest.domid = 5
            await r.plug("unused")
            store = await r.guest.connect()
            old, r.guest.store = r.guest.store, store
            await old.close()
            await r.guest.front.resume(cancelled=False, store=store, hv=r.guest.hv)
            await until(lambda: r.dom0.back.devices and r.back is not None)
            await until(lambda: front_dev.state is XenbusState.CONNECTED)
            back = r.back
            requests = await back.asked(6)
            assert [raw[0] for raw in requests][:5] == before
            sectors = [back.abi.rw.unpack_from(raw)[4] for raw in requests]
            assert sectors[:4] == [0, 1, 2, 8]
            for raw in requests[:3]:
                gref, first, last = blkif.SEGMENT.unpack_from(raw, back.abi.segments_at)
                page = await r.back_dev.map_ring([gref])
                n = back.abi.rw.unpack_from(raw)[4]
                assert bytes(page.view[:512]) == bytes([n]) * 512
                assert (first, last) == (0, 0)
                await r.back_dev.unmap(page)
            for raw in list(requests):
                back.answer(ident_of(back, raw), raw[0], OKAY)
            await asyncio.gather(*writes, read, flush, late)
            assert len(await read) == 1024
            # The guest's buses still stand on the old domain's place in the world: take the disk away there.
            await r.world.unplug("vbd", r.devid, 5)
            await until(lambda: not r.guest.front.devices and not r.dom0.back.devices)
            await r.guest.back.resume(cancelled=False, store=store, hv=r.guest.hv)

    with_drain(0.05, lambda: asyncio.run(run()))


def test_a_buffer_released_in_flight_is_the_callers_own_fault():
    async def check(r, back):
        view = memoryview(bytearray(512))
        read = asyncio.ensure_future(r.disk.read_into(0, view))
        (raw,) = await back.asked(1)
        view.release()
        back.answer(ident_of(back, raw), Op.READ, OKAY)
        with pytest.raises(UsageError, match="released"):
            await read
        assert r.front_dev.state is XenbusState.CONNECTED

    with_raw_back(check)


def test_buffers_of_other_shapes():
    async def check(r, back):
        wide, square = array.array("I", bytes(512)), memoryview(bytearray(512)).cast("B", (2, 256))
        for buffer in (wide, square, bytearray(512)):
            read = asyncio.ensure_future(r.disk.read_into(0, buffer))
            await until(lambda: back.requests)
            raw = back.requests.pop()
            mapped = await r.back_dev.map_ring([blkif.SEGMENT.unpack_from(raw, back.abi.segments_at)[0]])
            mapped.view[:512] = bytes(range(256)) * 2
            back.answer(ident_of(back, raw), Op.READ, OKAY)
            await read
            assert memoryview(buffer).tobytes() == bytes(range(256)) * 2
            await r.back_dev.unmap(mapped)

    with_raw_back(check)


def test_a_read_only_disk_has_no_discard_whatever_its_back_end_says():
    """As Linux's blkback, which offers it whether or not the disk may be written."""

    async def check(r, back):
        assert r.disk.readonly and not r.disk.discards

    properties = {**RawBack.properties, "info": blkif.VDISK_READONLY}
    offers = {**RawBack.offers, "feature-discard": 1}
    with_raw_back(check, back=back_with(offers=offers, properties=properties))


def test_its_pages_are_revoked_when_the_back_end_has_let_go_of_them():
    """Whoever revokes what is mapped waits long for it on Linux (gnttab_handle_deferred)."""

    async def check(r, back):
        dev, revoked, alone = r.front_dev, [], r.guest.hv.revoke
        mapped = r.dom0.hv.held

        async def revoke(pages):
            revoked.append(mapped().mapped_pages)
            await alone(pages)

        r.guest.hv.revoke = revoke
        read = asyncio.ensure_future(r.disk.read(0, 4096))
        await back.asked(1)
        back.answer(ident_of(back, back.requests[0]), Op.READ, OKAY)
        await read
        assert mapped().mapped_pages and dev.counts()["granted_pages"]
        await asyncio.wait_for(r.guest.front.detach(), 10)
        assert revoked and not any(revoked)

    with_raw_back(check)
