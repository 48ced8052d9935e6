"""xbd and xbbd against each other: every operation, layout and feature, on the real store and hypervisor."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.until import until
from tests.support.vbd import rig

from xenbus.bus import XenbusState
from xenbus.drivers.block import DiskError, Xbbd, Xbd, blkif
from xenbus.errors import LinkDown, UsageError

MIB = 1 << 20


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def image(tmp_path, length: int = 4 * MIB):
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(length))
    return path


def front_with(**offer):
    return type("Xbd", (Xbd,), offer)


def back_with(**offer):
    return type("Xbbd", (Xbbd,), offer)


def test_read_write_flush(tmp_path):
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            disk = r.disk
            assert (disk.size, disk.sector_size, disk.readonly) == (4 * MIB, 512, False)
            assert await disk.read(0, 4096) == path.read_bytes()[:4096]
            buffer = bytearray(4 * MIB)
            await disk.read_into(0, buffer)
            assert buffer == path.read_bytes()
            await disk.write(8192, b"x" * 5120)
            await disk.flush()
            assert path.read_bytes()[8192 : 8192 + 5120] == b"x" * 5120
            assert await disk.read(7168, 8192) == path.read_bytes()[7168 : 7168 + 8192]
            assert r.front_dev.nameunit == "xbd0"
            assert r.back_dev.nameunit == "xbbd0"
            await r.gone()

    asyncio.run(run())


MATRIX = list(
    itertools.product((blkif.X86_64, blkif.X86_32), (0, 2), (True, False), (0, 32, 256), (512, 4096))
)
# Each value with each other value of the rest at least once; all of them are for `make test`.
QUICK = [
    (blkif.X86_64, 0, True, 256, 512),
    (blkif.X86_64, 2, False, 32, 512),
    (blkif.X86_64, 2, True, 0, 4096),
    (blkif.X86_32, 2, True, 256, 4096),
    (blkif.X86_32, 0, False, 256, 4096),
    (blkif.X86_32, 0, True, 32, 4096),
    (blkif.X86_32, 2, False, 0, 512),
    (blkif.X86_64, 0, False, 0, 4096),
]
MARKED = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX]


@pytest.mark.parametrize(
    ("abi", "order", "persistent", "indirect", "sector"),
    MARKED,
    ids=lambda value: value.name if isinstance(value, blkif.Abi) else str(value),
)
def test_every_layout_and_feature(tmp_path, abi, order, persistent, indirect, sector):
    path = image(tmp_path, 2 * MIB)
    offer = {"abi": abi, "ring_page_order": order, "persistent": persistent, "indirect_segments": indirect}

    async def run():
        async with rig(front=front_with(**offer)) as r:
            await r.plug(str(path), sector_size_wanted=str(sector))
            await r.connected()
            disk = r.disk
            assert disk.sector_size == sector
            assert r.front._links[0].ring_pages == 1 << order
            assert r.back_dev.counts()["mapped_pages"] == 1 << order
            agreed = r.front_dev.features
            assert (agreed["persistent"], agreed["indirect-segments"]) == (persistent, indirect)
            content = bytearray(path.read_bytes())
            dice = random.Random(order * 7 + indirect + sector)
            for n in range(12):
                length = dice.choice([1, 3, 8, 88, 89, 512, 2000]) * sector
                length = min(length, MIB)
                offset = dice.randrange((2 * MIB - length) // sector + 1) * sector
                if n % 2:
                    data = dice.randbytes(length)
                    await disk.write(offset, data)
                    content[offset : offset + length] = data
                assert await disk.read(offset, length) == content[offset : offset + length]
            await asyncio.gather(*(disk.read(n * sector, sector) for n in range(150)))
            await disk.flush()
            assert path.read_bytes() == content
            used = r.back.counters.requests[blkif.Op.INDIRECT]
            assert (used > 0) == (indirect > 11)
            kept = r.back._grants.pages
            assert (kept > 0) == persistent
            assert r.dom0.hv.held().mapped_pages == (1 << order) + kept
            await r.gone()

    asyncio.run(run())


def test_the_quick_cases_pair_each_value_with_each_other():
    for a, b in itertools.combinations(range(5), 2):
        assert {(str(c[a]), str(c[b])) for c in QUICK} == {(str(c[a]), str(c[b])) for c in MATRIX}


def test_read_only(tmp_path):
    path = image(tmp_path)
    before = path.read_bytes()

    async def run():
        async with rig() as r:
            await r.plug(str(path), mode="r")
            await r.connected()
            disk = r.disk
            assert disk.readonly
            assert await r.world.tool.read_str(f"{r.bnode}/info") == str(blkif.VDISK_READONLY)
            assert not await r.world.tool.exists(f"{r.bnode}/feature-discard")
            assert await disk.read(4096, 4096) == before[4096:8192]
            for write in (disk.write(0, b"x" * 512), disk.write_barrier(0, b"x" * 512), disk.discard(0, 512)):
                with pytest.raises(UsageError, match="read-only"):
                    await write
            await disk.flush()
            async with disk.open() as file:
                assert await file.read(10) == before[:10]
                with pytest.raises(UsageError, match="read-only"):
                    await file.write(b"abc")
            await r.gone()
        assert path.read_bytes() == before

    asyncio.run(run())


def test_discard_punches_the_file(tmp_path):
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            assert r.disk.discards
            before = path.stat().st_blocks
            await r.disk.discard(MIB, MIB)
            assert await r.disk.read(MIB, MIB) == bytes(MIB)
            assert path.stat().st_blocks < before
            assert await r.disk.read(2 * MIB, 4096) == pattern(4 * MIB)[2 * MIB : 2 * MIB + 4096]
            await r.gone()

    asyncio.run(run())


def test_discard_can_be_forbidden_by_the_toolstack(tmp_path):
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path), discard_enable="0")
            await r.connected()
            assert not r.disk.discards
            with pytest.raises(DiskError, match="feature-discard") as caught:
                await r.disk.discard(0, 4096)
            assert caught.value.name == "EOPNOTSUPP"

    asyncio.run(run())


def test_barrier_comes_after_what_was_before_it_and_before_what_comes_after(tmp_path):
    """A storage that takes its time, and writes down in which order it was asked."""
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            storage, order, gate = r.back._storage, [], asyncio.Event()
            real_writev, real_flush = storage.writev, storage.flush

            async def writev(offset, buffers):
                order.append(("start", offset))
                if offset < 4 * 4096:
                    await gate.wait()
                await real_writev(offset, buffers)
                order.append(("end", offset))

            async def flush():
                order.append(("flush", None))
                await real_flush()

            r.back._links[0].queue._storage = _Wrapped(storage, writev=writev, flush=flush)
            early = [asyncio.ensure_future(r.disk.write(n * 4096, b"e" * 4096)) for n in range(4)]
            await until(lambda: len(order) == 4)
            barrier = asyncio.ensure_future(r.disk.write_barrier(8 * 4096, b"b" * 4096))
            late = asyncio.ensure_future(r.disk.write(9 * 4096, b"l" * 4096))
            await until(lambda: r.back._links[0].queue._barrier)
            await asyncio.sleep(0.02)
            assert len(order) == 4 and not barrier.done() and not late.done()
            gate.set()
            await asyncio.gather(*early, barrier, late)
            assert {what for what, _ in order[4:8]} == {"end"}
            assert order[8:] == [
                ("start", 8 * 4096),
                ("end", 8 * 4096),
                ("flush", None),
                ("start", 9 * 4096),
                ("end", 9 * 4096),
            ]
            assert r.back.counters.requests[blkif.Op.WRITE_BARRIER] == 1
            await r.gone()

    asyncio.run(run())


def test_flush_waits_for_the_writes_before_it(tmp_path):
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            storage, order, gate = r.back._storage, [], asyncio.Event()
            real_writev = storage.writev

            async def writev(offset, buffers):
                await (gate.wait() if offset == 0 else asyncio.sleep(0))
                await real_writev(offset, buffers)
                order.append(offset)

            async def flush():
                order.append("flush")

            r.back._links[0].queue._storage = _Wrapped(storage, writev=writev, flush=flush)
            write = asyncio.ensure_future(r.disk.write(0, b"x" * 4096))
            await until(lambda: r.back._links[0].queue.inflight)
            flush_ = asyncio.ensure_future(r.disk.flush())
            await until(lambda: r.back._links[0].queue.inflight == 2)
            await r.disk.write(4096, b"y" * 4096)  # a later one need not wait for the flush
            assert order == [4096] and not flush_.done()
            gate.set()
            await asyncio.gather(write, flush_)
            assert order == [4096, 0, "flush"]

    asyncio.run(run())


class _Wrapped:
    """A real storage with a few of its methods seen from outside."""

    def __init__(self, storage, **methods):
        self._storage = storage
        self.__dict__.update(methods)

    def __getattr__(self, name):
        return getattr(self._storage, name)


def test_memory_storage_and_4096_byte_units():
    """`sectors` stays in 512 bytes with a sector size of 4096 (blkif.h, Backend Device Properties)."""

    async def run():
        async with rig() as r:
            await r.plug("memory:8M?sector-size=4096")
            await r.connected()
            assert await r.world.tool.read_str(f"{r.bnode}/sectors") == str(8 * MIB // 512)
            assert await r.world.tool.read_str(f"{r.bnode}/sector-size") == "4096"
            data = pattern(12288)
            await r.disk.write(8 * MIB - 12288, data)
            assert await r.disk.read(8 * MIB - 12288, 12288) == data
            with pytest.raises(UsageError, match="whole sectors of 4096"):
                await r.disk.read(512, 512)
            assert not await r.world.tool.exists(f"{r.fnode}/feature-large-sector-size")
            await r.gone()

    asyncio.run(run())


def test_the_file_like_view(tmp_path):
    path = image(tmp_path, MIB)

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, MIB), st.integers(0, 9000)), max_size=12))
    def check(steps):
        path.write_bytes(pattern(MIB))

        async def run():
            async with rig() as r:
                await r.plug(str(path))
                await r.connected()
                model = bytearray(pattern(MIB))
                async with r.disk.open() as file:
                    for is_write, offset, length in steps:
                        assert file.seek(offset) == offset
                        length = min(length, MIB - offset)
                        if is_write:
                            data = pattern(length, offset)
                            assert await file.write(data) == length
                            model[offset : offset + length] = data
                        else:
                            assert await file.read(length) == model[offset : offset + length]
                        assert file.tell() == offset + length
                assert path.read_bytes() == model

        asyncio.run(run())

    check()


def test_edges_of_the_file_like_view(tmp_path):
    path = image(tmp_path, MIB)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            file = r.disk.open()
            assert await file.read() == pattern(MIB)
            assert await file.read(5) == b""
            assert file.seek(-3, 2) == MIB - 3
            assert await file.read(100) == pattern(MIB)[-3:]
            buffer = bytearray(b"....")
            file.seek(-2, 2)
            assert await file.readinto(buffer) == 2
            assert buffer == pattern(MIB)[-2:] + b".."
            with pytest.raises(UsageError, match="the disk has"):
                await file.write(b"x")
            for bad in ((-1, 0), (0, 7)):
                with pytest.raises(UsageError):
                    file.seek(*bad)
            await file.close()
            await file.close()
            with pytest.raises(UsageError, match="closed"):
                await file.read(1)

    asyncio.run(run())


def test_requests_that_make_no_sense(tmp_path):
    path = image(tmp_path, MIB)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            disk = r.disk
            for call in (
                disk.read(1, 512), disk.read(0, 511), disk.read(MIB, 512), disk.read(-512, 512),
                disk.write(MIB - 512, bytes(1024)), disk.read(0, 2 * MIB), disk.discard(3, 512),
                disk.read_into(0, memoryview(bytes(512))), disk.read_into(256, bytearray(512)),
            ):  # fmt: skip
                with pytest.raises(UsageError):
                    await call
            assert await disk.read(512, 0) == b""
            await disk.write(0, b"")
            assert r.front.queue.inflight == r.front.queue.waiting == 0

    asyncio.run(run())


def test_many_at_once_and_more_than_fit(tmp_path):
    """Far more I/O than slots and pages: it waits its turn, and all of it is right."""
    path = image(tmp_path)

    async def run():
        async with rig(front=front_with(ring_page_order=0)) as r:
            await r.plug(str(path))
            await r.connected()
            content = pattern(4 * MIB)
            parts = await asyncio.gather(*(r.disk.read(n * 4096, 4096) for n in range(1024)))
            assert b"".join(parts) == content
            parts = await asyncio.gather(*(r.disk.read(n * 65536, 65536) for n in range(64)))
            assert b"".join(parts) == content
            parts = await asyncio.gather(*(r.disk.read(0, 4 * MIB) for n in range(8)))
            assert all(part == content for part in parts)
            await asyncio.gather(*(r.disk.write(n * 8192, bytes([n % 251]) * 8192) for n in range(512)))
            assert path.read_bytes() == b"".join(bytes([n % 251]) * 8192 for n in range(512))
            pool = r.front.queue.connections[0].pool
            assert pool.pages <= 4096
            assert r.front.queue.inflight == r.front.queue.waiting == 0
            await r.gone()

    asyncio.run(run())


def test_a_small_cache_of_grants_still_serves_everything(tmp_path):
    """Persistent grants beyond the back end's limit: the least used go, and no request fails."""
    path = image(tmp_path)

    async def run():
        async with rig(back=back_with(max_persistent_grants=20)) as r:
            await r.plug(str(path))
            await r.connected()
            content = pattern(4 * MIB)
            for _ in range(3):
                parts = await asyncio.gather(*(r.disk.read(n * 49152, 49152) for n in range(80)))
                assert b"".join(parts) == content[: 80 * 49152]
                parts = await asyncio.gather(*(r.disk.read(n * 4096, 4096) for n in range(64)))
                assert b"".join(parts) == content[: 64 * 4096]
                assert r.back._grants.pages <= 20
                await until(lambda: not r.back._grants.temporary)
            assert r.disk.size and r.front.queue.errors == 0
            await until(lambda: r.dom0.hv.held().mapped_pages == 2 + r.back._grants.pages)
            await r.gone()

    asyncio.run(run())


def test_unplugged_by_the_toolstack(tmp_path):
    """libxl's way: offline and Closing. What is in flight ends well, what comes later fails."""
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path), hotplug_status="connected")
            await r.connected()
            disk, front, back = r.disk, r.front_dev, r.back_dev
            reads = [asyncio.ensure_future(disk.read(n * 4096, 4096)) for n in range(100)]
            await asyncio.sleep(0)
            await r.toolstack_close()
            await until(lambda: front.state is back.state is XenbusState.CLOSED)
            for read in await asyncio.gather(*reads, return_exceptions=True):
                assert isinstance(read, bytes | LinkDown)
            with pytest.raises(LinkDown, match="closed"):
                await disk.read(0, 4096)
            # Its pages are given back when the other end has let go of them.
            await until(lambda: not any(front.counts().values()))
            assert not any(back.counts().values())
            assert r.held() == r.before
            await r.world.tool.wait_for(f"{r.bnode}/hotplug-status", lambda value: value is None, 3)
            await r.gone()

    asyncio.run(run())


def test_detached_by_its_own_domain(tmp_path):
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            disk, back = r.disk, r.back_dev
            await disk.write(0, b"z" * 4096)
            r.front_dev.request_detach()
            await until(lambda: back.state is XenbusState.CLOSED)
            with pytest.raises(LinkDown):
                await disk.read(0, 512)
            await until(lambda: r.held() == r.before)
            assert path.read_bytes()[:4096] == b"z" * 4096

    asyncio.run(run())


def test_a_front_that_comes_back(tmp_path):
    """Closed and online: the toolstack arms the front again, and the same back end serves it."""
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            back = r.back_dev
            r.front_dev.request_detach()
            await until(lambda: back.state is XenbusState.CLOSED and not r.guest.front.devices)
            assert r.back.sysctl()["target"]() == ""  # the file is let go meanwhile
            await r.world.tool.write(f"{r.fnode}/state", "1")
            await until(lambda: r.guest.front.devices)
            await r.connected()
            assert r.back_dev is back
            assert await r.disk.read(0, 4096) == pattern(4 * MIB)[:4096]
            await r.gone()

    asyncio.run(run())


def test_sysctl_leaves(tmp_path):
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            await r.disk.read(0, 8192)
            await r.disk.write(0, bytes(4096))
            await r.disk.flush()
            front, back = r.front.sysctl(), r.back.sysctl()
            assert (back["sectors_read"](), back["sectors_written"]()) == (16, 8)
            assert (back["ring_pages"](), back["errors"](), back["inflight"]()) == (2, 0, 0)
            assert back["requests_flush_diskcache"]() == front["requests_flush"]() == 1
            assert front["requests_read"]() == 1
            assert front["data_pages"]() == 11 + 4 and front["ring_pages"]() == 2
            assert back["persistent_grants"]() > 0
            assert back["target"]().endswith("disk.img")
            for leaf in (*front.values(), *back.values()):
                assert isinstance(leaf(), int | str)

    asyncio.run(run())


def test_operations_reach_the_disk(tmp_path):
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            assert "digest" in r.front.operations()

    asyncio.run(run())
