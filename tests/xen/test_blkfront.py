"""Linux's xen-blkfront in a PV guest, our xbbd in dom0: checksums both ways, a filesystem, a root, unplug."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support import backs
from tests.support.backs import disk as xl_disk
from tests.support.dom0 import MIB, STORE, dom0, plugged, random_file, sha256
from tests.support.xl_guest import Guest, python_guest, xl, xl_guest
from xenbus.domain.runtime import DomainRuntime
from xenbus.drivers.block import Xbbd, xbbd
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def disk(runtime: DomainRuntime, guest: Guest, target: Path, **options) -> AsyncIterator[str]:
    """/dev/xvda in the guest, over `target`."""
    async with plugged(runtime, guest.domid, str(target), **options):
        await guest.run(
            "for i in $(seq 100); do [ -b /dev/xvda ] && break; sleep 0.1; done; [ -b /dev/xvda ]"
        )
        yield "/dev/xvda"


@pytest.mark.features
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


@pytest.mark.features
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
    """Made, mounted and written in the guest, checked there and in dom0, which reads the same."""

    async def main():
        file = tmp_path / "disk.img"
        with file.open("wb") as out:
            out.truncate(32 * MIB)
        async with dom0() as runtime, python_guest(runtime.store, "writer") as guest:
            await guest.run("modprobe -a xen-blkfront crc32c_generic ext4")
            async with disk(runtime, guest, file) as dev:
                await guest.run(f"/usr/sbin/mke2fs -q -t ext4 {dev}")
                await guest.run(f"mount -t ext4 {dev} /mnt")
                await guest.run("dd if=/dev/urandom of=/mnt/big bs=64k count=96")
                await guest.run(
                    "mkdir /mnt/d; for i in $(seq 50); do echo file $i >/mnt/d/$i; done; rm /mnt/d/9"
                )
                big = (await guest.run("sha256sum /mnt/big")).split()[0]
                await guest.run("umount /mnt")
                await guest.run(f"/usr/sbin/e2fsck -fn {dev}")
        assert await asyncio.to_thread(contents, file, "/big") == big
        listed = await asyncio.to_thread(e2fs, "debugfs", "-R", "cat /d/37", str(file))
        assert listed == "file 37\n"
        assert "File not found" in await asyncio.to_thread(e2fs, "debugfs", "-R", "cat /d/9", str(file))

    asyncio.run(main())


ROOT_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
echo "root is up"
while read -r line; do
  eval "$line" </dev/null
done
"""
# What the kernel starts when the toolstack asks for a shutdown.
ROOT_POWEROFF = """#!/bin/busybox sh
/bin/busybox mount -o remount,ro /
exec /bin/busybox poweroff -f
"""


def root_image(file: Path, tree: Path) -> None:
    """A small system: busybox, an init that does what the console says, and the way to end."""
    for name in ("bin", "sbin", "proc", "sys", "dev", "data"):
        (tree / name).mkdir(parents=True)
    shutil.copy2("/usr/bin/busybox", tree / "bin/busybox")
    for name, text in (("init", ROOT_INIT), ("poweroff", ROOT_POWEROFF)):
        (tree / "sbin" / name).write_text(text)
        (tree / "sbin" / name).chmod(0o755)
    (tree / "data/mark").write_text("from dom0\n")
    with file.open("wb") as out:
        out.truncate(24 * MIB)
    e2fs("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(file))


def test_a_guest_whose_root_it_is(tmp_path):
    """From an xl configuration; shut down in order, and what it wrote is in dom0."""
    back = backs.Xbbd(tmp_path / "run")

    async def main():
        file = tmp_path / "root.img"
        await asyncio.to_thread(root_image, file, tmp_path / "tree")
        line = xl_disk(back.script, "xvda", str(file))
        async with await Client.connect(STORE) as store, back.up():
            async with xl_guest(store, "root", disks=[line], extra="root=/dev/xvda") as guest:
                assert "/dev/xvda / ext4 rw" in await guest.run("cat /proc/mounts")
                assert await guest.run("cat /data/mark") == "from dom0\n"
                await guest.run("dd if=/dev/urandom of=/data/big bs=64k count=64 2>/dev/null")
                big = (await guest.run("sha256sum /data/big")).split()[0]
                await guest.run("mv /data/mark /data/seen")
                home = f"/local/domain/{guest.domid}"
                await xl("shutdown", "root")
                assert await store.wait_for(home, lambda value: value is None, 90) is None
            assert not await store.exists("backend/vbd")
        assert await asyncio.to_thread(contents, file, "/data/big") == big
        seen = await asyncio.to_thread(e2fs, "debugfs", "-R", "cat /data/seen", str(file))
        assert seen == "from dom0\n"

    asyncio.run(main())


def contents(file: Path, path: str) -> str:
    """The SHA-256 of a file in that file system, which is clean."""
    e2fs("e2fsck", "-fn", str(file))
    said = subprocess.run(
        ["dumpe2fs", "-h", str(file)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "needs_recovery" not in said.stdout
    copy = file.with_suffix(".copy")
    e2fs("debugfs", "-R", f"dump {path} {copy}", str(file))
    return sha256(copy)


@pytest.mark.features
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
    return done.stdout + done.stderr.partition("\n")[2]  # the first line is the program's version
