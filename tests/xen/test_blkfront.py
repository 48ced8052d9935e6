"""Linux's xen-blkfront in a PV guest, our xbbd in dom0: checksums both ways, a filesystem, unplug."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.dom0 import MIB, dom0, plugged, random_file, sha256
from tests.support.xl_guest import XlGuest, xl_guest
from xenbus.domain.runtime import DomainRuntime
from xenbus.drivers.block import Xbbd, xbbd
from xenbus.hypervisor.linux import LinuxHypervisor

pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def disk(runtime: DomainRuntime, guest: XlGuest, target: Path, **options) -> AsyncIterator[str]:
    """/dev/xvda in the guest, over `target`."""
    async with plugged(runtime, guest.domid, str(target), **options):
        await guest.run(
            "for i in $(seq 100); do [ -b /dev/xvda ] && break; sleep 0.1; done; [ -b /dev/xvda ]"
        )
        yield "/dev/xvda"


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


@pytest.mark.parametrize("how", ["copied", "mapped"])
def test_without_persistent_grants(tmp_path, monkeypatch, how):
    """Each request's pages are granted for it alone: copied, or mapped and unmapped; none stays mapped."""
    monkeypatch.setattr(Xbbd, "max_persistent_grants", 0)
    if how == "mapped":
        monkeypatch.setattr(xbbd, "copies_for", lambda *_: None)

    async def main():
        file = tmp_path / "disk.img"
        expected = random_file(file, 8 * MIB)
        async with (
            dom0() as runtime,
            xl_guest(runtime.store, "changeable") as guest,
            disk(runtime, guest, file) as dev,
        ):
            mapped = runtime.hv.held().mapped_pages  # the ring
            real, most = LinuxHypervisor.map, []

            async def map_(hv, *arguments, **options):
                most.append(arguments)
                return await real(hv, *arguments, **options)

            monkeypatch.setattr(LinuxHypervisor, "map", map_)
            assert (await guest.run(f"sha256sum {dev}")).split()[0] == expected
            await guest.run("dd if=/dev/urandom of=/tmp/new bs=64k count=64 2>/dev/null")
            await guest.run(f"dd if=/tmp/new of={dev} bs=64k seek=32 conv=fsync 2>/dev/null")
            new = (await guest.run("sha256sum /tmp/new")).split()[0]
            assert hashlib.sha256(file.read_bytes()[2 * MIB : 6 * MIB]).hexdigest() == new
            assert runtime.hv.held().mapped_pages == mapped
            assert bool(most) == (how == "mapped")

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
