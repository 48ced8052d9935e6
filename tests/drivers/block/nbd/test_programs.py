"""Programs that nobody here wrote: nbdcopy, qemu-img and the like, nbdkit and qemu-nbd as servers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.until import until

from xenbus.drivers.block import image
from xenbus.drivers.block.nbd import NbdClient, NbdServer
from xenbus.drivers.block.storage import StorageError, open_storage

SECONDS = 30


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


async def run(name, *args, expect=0) -> str:
    process = await asyncio.create_subprocess_exec(
        program(name), *map(str, args), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(SECONDS):
        out, _ = await process.communicate()
    assert process.returncode == expect, out.decode()
    return out.decode()


@asynccontextmanager
async def served(tmp_path, target, **options):
    """(uri, disk): our server over a storage."""
    disk = await open_storage(target, **options)
    try:
        async with NbdServer(disk, export="xbd0", description="a test") as server:
            await server.serve_unix(tmp_path / "nbd")
            yield f"nbd+unix:///xbd0?socket={tmp_path / 'nbd'}", disk
            await until(lambda: not server.clients)
    finally:
        await disk.close()


def listens(socket) -> bool:
    """A socket file is there before anybody listens on it. Fields as unix_seq_show of Linux has them."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[7:] == [str(socket)] and int(fields[3], 16) & 0x10000:  # __SO_ACCEPTCON
            return True
    return False


@asynccontextmanager
async def daemon(name, *args, socket, ready=listens):
    """A server of somebody else's on a unix socket, or on whatever it makes `socket` for when it listens."""
    process = await asyncio.create_subprocess_exec(program(name), *map(str, args))
    try:
        await until(lambda: ready(socket) or process.returncode is not None, SECONDS)
        assert process.returncode is None
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.parametrize("sector", [512, 4096])
def test_nbdinfo_reads_our_handshake(tmp_path, sector):
    async def main():
        async with served(tmp_path, "memory:4M", sector_size=sector) as (uri, _):
            about = json.loads(await run("nbdinfo", "--json", uri))["exports"][0]
            assert about["export-name"] == "xbd0"
            assert about["export-size"] == 4 << 20
            assert about["block_size_minimum"] == sector
            assert about["can_flush"] and about["can_fua"] and about["can_trim"] and about["can_zero"]
            assert not about["is_read_only"]
            listed = json.loads(await run("nbdinfo", "--list", "--json", uri))
            assert [export["export-name"] for export in listed["exports"]] == ["xbd0"]
            await run("nbdinfo", uri.replace("xbd0", "nothere"), expect=1)

    asyncio.run(main())


def test_nbdcopy_and_qemu_img_carry_an_image_in_and_out(tmp_path):
    path = image.write_to(tmp_path / "disk.img")

    async def main():
        async with served(tmp_path, f"memory:{image.SIZE}") as (uri, _):
            await run("nbdcopy", path, uri)
            await run("qemu-img", "compare", "-f", "raw", "-F", "raw", path, uri)
            await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "out.qcow2")
            await run("qemu-img", "convert", "-O", "raw", tmp_path / "out.qcow2", tmp_path / "out.img")
            await run("nbdcopy", uri, tmp_path / "back.img")
            assert (
                json.loads(await run("qemu-img", "info", "--output=json", uri))["virtual-size"] == image.SIZE
            )

    asyncio.run(main())
    assert (tmp_path / "out.img").read_bytes() == image.load()
    assert (tmp_path / "back.img").read_bytes() == image.load()


@pytest.mark.parametrize("target", ["memory", "file"])
def test_qemu_io_writes_zeroes_and_discards(tmp_path, target):
    if target == "file":
        (tmp_path / "disk.img").write_bytes(bytes(1 << 20))

    async def main():
        where = "memory:1M" if target == "memory" else str(tmp_path / "disk.img")
        async with served(tmp_path, where, sector_size=4096) as (uri, disk):
            commands = [
                "write -P 7 0 64k",
                "write -z 4k 8k",
                "discard 16k 8k",
                "write -f -P 9 513 1000",
                "flush",
            ]
            commands += ["read -P 7 2000 2000", "read -P 0 4k 8k", "read -P 9 513 1000", "read -P 7 24k 40k"]
            args = [part for command in commands for part in ("-c", command)]
            out = await run("qemu-io", "-f", "raw", *args, uri)
            assert "failed" not in out and "error" not in out.lower(), out
            await disk.read_into(0, got := memoryview(bytearray(4096)))
            assert got == b"\7" * 513 + b"\11" * 1000 + b"\7" * (4096 - 1513)

    asyncio.run(main())


def test_a_readonly_disk_is_readonly_to_them(tmp_path):
    async def main():
        async with served(tmp_path, "memory:1M", readonly=True) as (uri, _):
            assert json.loads(await run("nbdinfo", "--json", uri))["exports"][0]["is_read_only"]
            out = await run("qemu-io", "-f", "raw", "-c", "write 0 512", uri, expect=1)
            assert "permission denied" in out.lower() or "read" in out.lower()

    asyncio.run(main())


async def exercise(disk, size):
    """Reads, writes, both kinds of zeroes, many at once."""
    assert disk.size == size
    data = os.urandom(1 << 20)
    await disk.writev(4096, [memoryview(bytearray(data[:5120])), memoryview(bytearray(data[5120:]))])
    parts = [memoryview(bytearray(512)), memoryview(bytearray((1 << 20) - 512))]
    await disk.readv(4096, parts)
    assert b"".join(parts) == data
    await disk.write_zeroes(4096, 8192)
    await disk.discard(65536, 65536)
    await disk.flush()
    assert await disk.read(4096, 16384) == bytes(8192) + data[8192:16384]

    async def one(at):
        block = bytes([at % 251]) * 4096
        await disk.write(at * 4096, block)
        assert await disk.read(at * 4096, 4096) == block

    await asyncio.gather(*(one(at) for at in range(256, 320)))
    with pytest.raises(StorageError, match="EINVAL"):
        await disk.read(size - 512, 1024)


@pytest.mark.parametrize("args", [[], ["--no-sr"], ["-o"]], ids=["structured", "simple", "oldstyle"])
def test_our_client_on_nbdkit(tmp_path, args):
    async def main():
        socket = tmp_path / "kit"
        async with daemon("nbdkit", "-f", "-U", socket, *args, "memory", "4M", socket=socket):
            where = f"nbd+unix:///?socket={socket}"
            if args == ["-o"]:
                with pytest.raises(Exception, match="newstyle"):
                    await NbdClient.connect(where, timeout=5)
                return
            disk = await open_storage(where)
            try:
                await exercise(disk, 4 << 20)
            finally:
                await disk.close()

    asyncio.run(main())


def test_our_client_over_tcp(tmp_path):
    import socket as sockets

    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def main():
        ready = tmp_path / "pid"
        args = ("-f", "-i", "127.0.0.1", "-p", port, "-P", ready, "memory", "4M")
        where = f"nbd://127.0.0.1:{port}"
        async with (
            daemon("nbdkit", *args, socket=ready, ready=Path.exists),
            await NbdClient.connect(where) as disk,
        ):
            await exercise(disk, 4 << 20)

    asyncio.run(main())


def test_an_error_of_nbdkits_comes_out_as_itself(tmp_path):
    async def main():
        socket = tmp_path / "kit"
        faults = ("error-rate=100%", "error=ENOSPC", "error-pread-rate=0")
        args = ("-f", "-U", socket, "--filter=error", "memory", "1M", *faults)
        where = f"nbd+unix:///?socket={socket}"
        async with daemon("nbdkit", *args, socket=socket), await NbdClient.connect(where) as disk:
            with pytest.raises(StorageError, match=str(socket)) as caught:
                await disk.write(512, bytes(512))
            assert (caught.value.name, caught.value.offset) == ("ENOSPC", 512)
            assert await disk.read(0, 512) == bytes(512)  # the connection lives on

    asyncio.run(main())


def test_a_qcow2_comes_in_through_qemu_nbd(tmp_path):
    path = image.write_to(tmp_path / "disk.img")

    async def main():
        qcow2, socket = tmp_path / "disk.qcow2", tmp_path / "qemu"
        await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", path, qcow2)
        async with daemon("qemu-nbd", "-f", "qcow2", "-t", "-k", socket, qcow2, socket=socket):
            disk = await open_storage(f"nbd+unix:///?socket={socket}")
            try:
                assert await disk.read(0, image.SIZE) == image.load()
                await exercise(disk, image.SIZE)
            finally:
                await disk.close()
        await run("qemu-img", "check", qcow2)

    asyncio.run(main())
