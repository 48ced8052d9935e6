"""Files and block devices: what can go wrong with an image, and where the threads are."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support.until import descriptors

from xenbus.drivers.block.storage import StorageError, open_storage
from xenbus.drivers.block.storage import fallocate as falloc
from xenbus.drivers.block.storage.schemes import file as scheme
from xenbus.drivers.block.storage.workers import Workers


def view(data) -> memoryview:
    return memoryview(bytearray(data))


def image(tmp_path, size=1 << 20):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(size))
    return path


def refused(path, **options) -> StorageError:
    with pytest.raises(StorageError) as caught:
        asyncio.run(open_storage(str(path), **options))
    assert str(path) in str(caught.value)
    return caught.value


def test_what_cannot_be_opened_is_named(tmp_path):
    assert refused(tmp_path / "missing").name == "ENOENT"
    assert refused(tmp_path, readonly=True).name == "EISDIR"
    assert refused(tmp_path).name == "EISDIR"
    os.mkfifo(tmp_path / "fifo")
    assert refused(tmp_path / "fifo", readonly=True).name == "EINVAL"
    assert refused("/dev/null").name == "EINVAL"


def test_a_read_at_once_stays_on_the_disk(tmp_path):
    """Also of the bytes that the file has and the disk has not; and none comes after close."""

    async def main():
        disk = await open_storage(str(image(tmp_path, 4096 + 100)), sector_size=512)
        assert disk.size == 4096
        await disk.read_into(0, view(bytes(4096)))
        assert disk.try_read_into(3584, view(b"x" * 512))
        for offset, length in ((4096, 100), (3584, 612), (-512, 512), (1 << 40, 512)):
            untouched = view(b"x" * length)
            with pytest.raises(StorageError) as caught:
                disk.try_read_into(offset, untouched)
            assert (caught.value.name, untouched) == ("EINVAL", b"x" * length)
        await disk.close()
        with (tmp_path / "disk.img").open("rb") as other:
            assert other.fileno() == disk._fd  # the number is somebody else's by now
            with pytest.raises(StorageError, match="closed"):
                disk.try_read_into(0, view(bytes(512)))

    asyncio.run(main())


def test_an_open_disk_holds_one_descriptor_and_gives_it_back(tmp_path):
    async def main():
        before = descriptors()
        disk = await open_storage(str(image(tmp_path)))
        await disk.flush()
        assert len(descriptors()) == len(before) + 1
        await disk.close()
        assert descriptors() == before
        assert not [t for t in threading.enumerate() if t.name.startswith("xenbus-disk")]

    asyncio.run(main())


def test_an_image_truncated_under_us_is_an_error_that_says_so(tmp_path):
    async def main():
        path = image(tmp_path)
        disk = await open_storage(str(path))
        os.truncate(path, 4096)
        with pytest.raises(StorageError, match="4096 bytes long now, it was 1048576") as caught:
            await disk.read_into(0, view(8192))
        assert caught.value.name == "EIO"
        await disk.read_into(0, view(4096))
        await disk.close()

    asyncio.run(main())


def test_bytes_after_the_last_whole_sector_are_not_the_disks(tmp_path):
    async def main():
        disk = await open_storage(str(image(tmp_path, 1000)))
        assert disk.size == 512
        await disk.close()

    asyncio.run(main())


def test_cached_reads_and_small_writes_need_no_thread(tmp_path):
    async def main():
        disk = await open_storage(str(image(tmp_path)))
        await disk.write(0, view(b"x" * 4096))
        got = view(4096)
        assert disk.try_readv(0, [got[:100], got[100:]])
        assert got == b"x" * 4096
        assert disk.try_read_into(512, got[:512])
        assert disk._workers._pool is None
        await disk.close()

    asyncio.run(main())


def test_a_very_long_read_does_not_hold_the_loop_up(tmp_path):
    async def main():
        disk = await open_storage(str(image(tmp_path, 4 << 20)))
        await disk.read_into(0, view(4 << 20))
        assert disk._workers._pool is not None
        with pytest.raises(StorageError, match="EINVAL"):
            await disk.read_into(512, view(4 << 20))
        await disk.close()

    asyncio.run(main())


def test_what_is_not_cached_is_read_by_a_thread(tmp_path):
    async def main():
        path = image(tmp_path)
        with path.open("r+b") as out:
            out.write(b"cold" * 1024)
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        disk = await open_storage(str(path), readonly=True)
        got = view(4096)
        if not disk.try_readv(0, [got]):  # on tmpfs all is memory
            await disk.readv(0, [got])
            assert disk._workers._pool is not None
        assert got == b"cold" * 1024
        await disk.close()

    asyncio.run(main())


def test_writes_go_to_threads_after_one_that_the_kernel_held_up(tmp_path, monkeypatch):
    async def main():
        disk = await open_storage(str(image(tmp_path)))
        disk._nowait_write = False
        monkeypatch.setattr(scheme, "SLOW_WRITE", -1.0)  # any write is slow now
        await disk.write(0, view(512))
        assert disk._workers._pool is None
        await disk.write(0, view(b"y" * 512))
        assert disk._workers._pool is not None
        assert disk.try_readv(0, [got := view(512)])
        assert got == b"y" * 512
        await disk.close()

    asyncio.run(main())


def full_filesystem(tmp_path):
    """A tmpfs of 64 KiB, where we may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True, timeout=10
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    return place


def test_a_full_disk_is_enospc_and_what_was_there_stays(tmp_path):
    place = full_filesystem(tmp_path)
    try:
        path = str(place / "disk.img")
        (place / "disk.img").write_bytes(b"")
        os.truncate(path, 1 << 20)

        async def main():
            disk = await open_storage(path)
            await disk.write(0, view(b"k" * 4096))
            with pytest.raises(StorageError) as caught:
                await disk.write(8192, view(b"x" * (256 << 10)))
            assert caught.value.name == "ENOSPC"
            assert path in str(caught.value)
            await disk.read_into(0, got := view(4096))
            assert got == b"k" * 4096
            await disk.close()

        asyncio.run(main())
    finally:
        subprocess.run(["umount", place], check=True, timeout=10)


def test_a_discard_gives_the_blocks_back_and_keeps_the_size(tmp_path):
    async def main():
        path = tmp_path / "disk.img"
        path.write_bytes(b"x" * (1 << 20))
        os.sync()
        disk = await open_storage(str(path))
        before = path.stat().st_blocks
        await disk.discard(0, 512 << 10)
        assert path.stat().st_blocks < before
        assert path.stat().st_size == 1 << 20
        await disk.close()

    asyncio.run(main())


def test_where_no_hole_can_be_punched_it_is_said_and_zeroes_are_written(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(95, "Operation not supported")

    async def main():
        path = tmp_path / "disk.img"
        path.write_bytes(b"x" * 8192)
        monkeypatch.setattr(falloc, "fallocate", none)
        disk = await open_storage(str(path))
        assert not disk.discards
        with pytest.raises(StorageError, match="EOPNOTSUPP"):
            await disk.discard(0, 4096)
        await disk.write_zeroes(512, 4096)
        await disk.close()
        assert path.read_bytes() == b"x" * 512 + bytes(4096) + b"x" * 3584

    asyncio.run(main())


def test_a_loop_device_is_a_disk(tmp_path):
    losetup = shutil.which("losetup", path="/usr/sbin:/sbin:" + os.environ.get("PATH", ""))
    if losetup is None:
        pytest.skip("losetup is not installed")
    made = subprocess.run(
        [losetup, "--find", "--show", str(image(tmp_path))], capture_output=True, text=True, timeout=10
    )
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:

        async def main():
            disk = await open_storage(device)
            assert disk.size == 1 << 20
            await disk.write(4096, view(b"z" * 4096))
            await disk.flush()
            await disk.read_into(4096, got := view(4096))
            assert got == b"z" * 4096
            await disk.close()

        asyncio.run(main())
    finally:
        subprocess.run([losetup, "--detach", device], check=True, timeout=10)
    assert (tmp_path / "disk.img").read_bytes()[4096:8192] == b"z" * 4096


def test_a_cancelled_call_is_over_only_when_its_thread_is():
    async def main():
        workers = Workers(1, "test")
        inside, go = threading.Event(), threading.Event()
        ended = []

        def call():
            inside.set()
            go.wait(10)
            ended.append(time.monotonic())

        task = asyncio.create_task(workers.run(call))
        with ThreadPoolExecutor(1) as pool:
            await asyncio.get_running_loop().run_in_executor(pool, inside.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # twice: it must not give up the second time
        await asyncio.sleep(0.02)
        assert not task.done()
        assert not await workers.close(0.01)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended
        assert await workers.close(5)

    asyncio.run(main())


def test_a_call_that_had_not_begun_is_cancelled_at_once():
    async def main():
        workers = Workers(1, "test")
        go = threading.Event()
        first = asyncio.create_task(workers.run(lambda: go.wait(10)))
        ran = []
        second = asyncio.create_task(workers.run(lambda: ran.append(1)))
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go.set()
        await first
        assert await workers.close(5)
        assert not ran

    asyncio.run(main())
