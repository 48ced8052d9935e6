"""One suite for every storage: a file, memory, and a disk behind an NBD server."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.drivers.block.nbd import NbdServer
from xenbus.drivers.block.storage import StorageError, open_storage, scheme_names, storage_scheme
from xenbus.drivers.block.storage.registry import parse_target
from xenbus.errors import UsageError

SIZE = 1 << 20
KINDS = ["file", "tmpfs", "memory", "nbd"]


def view(data) -> memoryview:
    return memoryview(bytearray(data))


@asynccontextmanager
async def opened(kind, tmp_path, **options):
    """A disk of SIZE zeroes of that kind."""
    server = below = path = None
    if kind in ("file", "tmpfs"):
        if kind == "tmpfs":
            tmp_path = type(tmp_path)("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
        path = tmp_path / f"xenbus-test-{os.getpid()}.img"
        with path.open("wb") as out:
            out.truncate(SIZE)
        target = str(path)
    elif kind == "memory":
        target = f"memory:{SIZE}"
    else:
        below = await open_storage(f"memory:{SIZE}")
        server = NbdServer(below)
        await server.serve_unix(tmp_path / "nbd")
        target = f"nbd+unix:///?socket={tmp_path / 'nbd'}"
    try:
        disk = await open_storage(target, **options)
        try:
            yield disk
        finally:
            await disk.close()
    finally:
        if server is not None:
            await server.close()
            await below.close()
        if path is not None:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_scattered_buffers_make_one_run_of_bytes(kind, tmp_path):
    async def main():
        async with opened(kind, tmp_path) as disk:
            assert (disk.size, disk.sector_size, disk.readonly) == (SIZE, 512, False)
            data = os.urandom(12 * 1024)
            await disk.writev(4096, [view(data[:512]), view(data[512:8192]), view(data[8192:])])
            parts = [view(4096), view(7168), view(1024)]
            await disk.readv(4096, parts)
            assert b"".join(parts) == data
            await disk.flush()
            one = view(512)
            await disk.read_into(4096 + 512, one)
            assert one == data[512:1024]

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_without_waiting_is_whole_or_refused(kind, tmp_path):
    async def main():
        async with opened(kind, tmp_path) as disk:
            data = os.urandom(8192)
            done = disk.try_writev(4096, [view(data[:512]), view(data[512:])])
            assert done or kind in ("file", "nbd")
            if not done:
                await disk.writev(4096, [view(data)])
            got = view(8192)
            await disk.readv(4096, [got])
            assert got == data
        async with opened(kind, tmp_path) as disk:
            if kind != "nbd":
                with pytest.raises(StorageError, match=f"{SIZE} bytes"):
                    disk.try_writev(SIZE - 512, [view(bytes(1024))])

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_more_buffers_than_an_iovec_takes(kind, tmp_path):
    async def main():
        async with opened(kind, tmp_path) as disk:
            data = os.urandom(1500 * 512)
            await disk.writev(0, [view(data[at : at + 512]) for at in range(0, len(data), 512)])
            parts = [view(512) for _ in range(1500)]
            await disk.readv(0, parts)
            assert b"".join(parts) == data

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["discard", "write_zeroes"])
def test_what_is_discarded_or_zeroed_reads_as_zeroes_and_its_neighbours_stay(kind, call, tmp_path):
    async def main():
        async with opened(kind, tmp_path) as disk:
            assert disk.discards
            await disk.write(0, view(b"x" * 65536))
            await getattr(disk, call)(512, 32768 - 512)
            got = view(65536)
            await disk.read_into(0, got)
            assert got == b"x" * 512 + bytes(32768 - 512) + b"x" * 32768

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_inside_the_disk_is_refused_and_named(kind, tmp_path):
    async def main():
        async with opened(kind, tmp_path) as disk:
            for offset, length in ((SIZE - 512, 1024), (SIZE, 512), (-512, 512), (1 << 62, 512)):
                for work in (disk.read_into, disk.write):
                    with pytest.raises(StorageError, match=f"{SIZE} bytes") as caught:
                        await work(offset, view(length))
                    assert (caught.value.name, caught.value.offset) == ("EINVAL", offset)
                with pytest.raises(StorageError):
                    await disk.discard(offset, length)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_readonly_disk_reads_and_refuses_the_rest(kind, tmp_path):
    async def main():
        async with opened(kind, tmp_path, readonly=True) as disk:
            assert disk.readonly
            await disk.read_into(0, view(512))
            await disk.flush()
            for work in (disk.write(0, view(512)), disk.discard(0, 512), disk.write_zeroes(0, 512)):
                with pytest.raises(StorageError, match="EROFS"):
                    await work

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_disk_says_so_and_closes_twice(kind, tmp_path):
    async def main():
        async with opened(kind, tmp_path) as disk:
            await disk.close()
            with pytest.raises(Exception, match="closed"):
                await disk.read_into(0, view(512))

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_the_sector_size_is_the_askers_choice(kind, tmp_path):
    async def main():
        async with opened(kind, tmp_path, sector_size=4096) as disk:
            assert disk.sector_size == 4096

    asyncio.run(main())


steps = st.lists(
    st.tuples(st.sampled_from(["write", "discard", "zero"]), st.integers(0, 63), st.integers(1, 16)),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(steps=steps)
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_any_sequence_leaves_what_a_plain_buffer_has(kind, steps, tmp_path_factory):
    async def main():
        async with opened(kind, tmp_path_factory.mktemp("any")) as disk:
            model = bytearray(64 * 1024)
            for number, (what, start, count) in enumerate(steps):
                start, length = start * 512, count * 512
                if what == "write":
                    model[start : start + length] = bytes([number + 1]) * length
                    await disk.write(start, view(bytes([number + 1]) * length))
                else:
                    model[start : start + length] = bytes(length)
                    await (disk.discard if what == "discard" else disk.write_zeroes)(start, length)
            got = view(len(model))
            await disk.read_into(0, got)
            assert got == model

    asyncio.run(main())


def test_targets_are_taken_apart():
    assert parse_target("/a:b?c").rest == "/a:b?c"
    assert parse_target("./x").scheme == "file"
    assert parse_target("disk.img").scheme == "file"
    assert parse_target("file:/a?sector-size=4096").sector_size == 4096
    assert parse_target("memory:16M?sector-size=4096", sector_size=512).sector_size == 512
    assert parse_target("nbd://h:1/e?x=1").options == {"x": "1"}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("", "not a storage target"),
        ("a\0b", "not a storage target"),
        ("gopher:hole", "no storage scheme gopher .*file, memory, nbd"),
        ("memory:lots", "not a size"),
        ("memory:100", "less than one sector"),
        ("memory:1M?sector-size=500", "not a power of two"),
        ("memory:1M?sector-size=x", "not a number"),
        ("memory:1M?sektor=1", "unknown option sektor"),
        ("memory:1M?sektor", "options are written"),
        ("nbd://", "written nbd://"),
        ("nbd://host:port/", "nbd://host:port/"),
        ("nbd+unix:///x", "socket=PATH"),
    ],
)
def test_a_target_that_makes_no_sense_is_named(target, says):
    with pytest.raises(UsageError, match=says):
        asyncio.run(open_storage(target))


def test_one_decorator_adds_a_scheme():
    @storage_scheme("twice")
    async def open_twice(target):
        return await open_storage(f"memory:{target.rest}{target.rest}")

    async def main():
        disk = await open_storage("twice:512")
        assert disk.size == 512512
        await disk.close()

    asyncio.run(main())
    assert {"file", "memory", "nbd", "nbd+unix", "twice"} <= set(scheme_names())
    with pytest.raises(UsageError, match="twice"):
        storage_scheme("twice")(open_twice)
