"""Linux's xen-blkfront in a PV guest, our xbbd in dom0: checksums both ways, a filesystem, unplug."""

from __future__ import annotations

import asyncio
import hashlib
import random
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.real_xen import dom0_ports
from tests.support.xl_guest import XlGuest, xl_guest
from xenbus.domain.runtime import DomainRuntime
from xenbus.hypervisor.interface import Held
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import detach_device, wait_connected, write_device
from xenbus.xenstore.client import Client

MIB = 1 << 20
HANDSHAKE = 60.0  # seconds, under emulation
pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def dom0() -> AsyncIterator[DomainRuntime]:
    """dom0's back bus in this process. Nothing is held when it ends."""
    store = await Client.connect("/dev/xen/xenbus")
    hv = LinuxHypervisor(int(await store.read_str("domid")))
    await store.close()
    ports = dom0_ports()
    runtime = DomainRuntime("Domain-0", hv, lambda: Client.connect("/dev/xen/xenbus"))
    try:
        await runtime.start()
        yield runtime
    finally:
        await runtime.stop()
        held = hv.held()
        await hv.close()
    assert held == Held(0, 0, 0)
    assert dom0_ports() == ports


@asynccontextmanager
async def disk(runtime: DomainRuntime, guest: XlGuest, target: Path, **options) -> AsyncIterator[str]:
    """/dev/xvda in the guest, over `target`; unplugged in order afterwards."""
    spec = DiskSpec(guest.domid, str(target), **options).device()
    await write_device(runtime.store, spec)
    await wait_connected(runtime.store, spec.paths, HANDSHAKE)
    await guest.run("for i in $(seq 100); do [ -b /dev/xvda ] && break; sleep 0.1; done; [ -b /dev/xvda ]")
    yield "/dev/xvda"
    assert await detach_device(runtime.store, spec.paths, timeout=HANDSHAKE)
    assert not await runtime.store.exists(spec.paths.back)
    assert not await runtime.store.exists(spec.paths.front)


def random_file(path: Path, size: int) -> str:
    data = random.Random(7).randbytes(size)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_reads_and_writes_arrive(tmp_path):
    async def main():
        file = tmp_path / "disk.img"
        expected = random_file(file, 16 * MIB)
        async with dom0() as runtime, xl_guest(runtime.store, "reader") as guest:
            for _ in range(2):  # plugged, unplugged, plugged again
                async with disk(runtime, guest, file) as dev:
                    assert (await guest.run(f"sha256sum {dev}")).split()[0] == expected
                    assert (await guest.run(f"blockdev --getsize64 {dev}")).strip() == str(16 * MIB)
                    await guest.run("dd if=/dev/urandom of=/tmp/new bs=64k count=64 2>/dev/null")
                    await guest.run(f"dd if=/tmp/new of={dev} bs=64k seek=32 conv=fsync 2>/dev/null")
                    new = (await guest.run("sha256sum /tmp/new")).split()[0]
                    there = file.read_bytes()[2 * MIB : 6 * MIB]
                    assert hashlib.sha256(there).hexdigest() == new
                expected = sha256(file)

    asyncio.run(main())


def test_a_filesystem(tmp_path):
    """Made in dom0, mounted and written in the guest, checked and read in dom0."""

    async def main():
        file = tmp_path / "disk.img"
        with file.open("wb") as out:
            out.truncate(32 * MIB)
        await asyncio.to_thread(e2fs, "mke2fs", "-q", "-t", "ext4", str(file))
        async with (
            dom0() as runtime,
            xl_guest(runtime.store, "writer") as guest,
            disk(runtime, guest, file) as dev,
        ):
            await guest.run(f"mount -t ext4 {dev} /mnt")
            await guest.run("dd if=/dev/urandom of=/mnt/big bs=64k count=96 2>/dev/null")
            await guest.run("mkdir /mnt/d && for i in $(seq 50); do echo file $i >/mnt/d/$i; done")
            big = (await guest.run("sha256sum /mnt/big")).split()[0]
            await guest.run("umount /mnt")
        await asyncio.to_thread(e2fs, "e2fsck", "-fn", str(file))
        copy = tmp_path / "big"
        await asyncio.to_thread(e2fs, "debugfs", "-R", f"dump /big {copy}", str(file))
        assert sha256(copy) == big
        listed = await asyncio.to_thread(e2fs, "debugfs", "-R", "cat /d/37", str(file))
        assert listed == "file 37\n"

    asyncio.run(main())


def test_read_only(tmp_path):
    async def main():
        file = tmp_path / "disk.img"
        expected = random_file(file, 4 * MIB)
        async with (
            dom0() as runtime,
            xl_guest(runtime.store, "watcher") as guest,
            disk(runtime, guest, file, readonly=True) as dev,
        ):
            assert (await guest.run(f"blockdev --getro {dev}")).strip() == "1"
            await guest.run(f"! dd if=/dev/zero of={dev} bs=4k count=1 conv=fsync")
            assert (await guest.run(f"sha256sum {dev}")).split()[0] == expected
        assert sha256(file) == expected

    asyncio.run(main())


def e2fs(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
