"""Every front end with every back end, through all of a disk's life: found, used, unplugged, plugged, saved
and restored under load, its back end killed under load, its guest destroyed. Disks come from xl's
configuration."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.backs import Back, Blkback, Xbbd, disk, loop_device, nbd_server
from tests.support.dom0 import MIB, STORE, random_file, sha256
from tests.support.fronts import Front, LinuxFront, XbdFront, file_sums
from tests.support.real_xen import dom0_ports
from tests.support.xl_guest import python_guest, xl, xl_guest
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(420)
SIZE = 8 * MIB


@dataclass
class Disk:
    """file: what its bytes are in, in dom0; None where they die with the back end
    survives: whether the next process can go on with it after the back end was killed"""

    vdev: str
    target: str
    file: Path | None
    survives: bool = True


async def same(front: Front, each: Disk) -> None:
    """Guest and dom0 see the same bytes."""
    found = await front.digest(each.vdev)
    if each.file is not None:
        assert found == await asyncio.to_thread(sha256, each.file)


async def checked(front: Front, each: Disk) -> None:
    """The load is over, and every write that it was told of is there, for the guest and in dom0."""
    written = await front.unload(each.vdev)
    assert written
    assert await front.sums(each.vdev, written) == written
    if each.file is not None:
        assert file_sums(each.file, written) == written


async def life(front: Front, back: Back, disks: list[Disk], tmp_path: Path, store: Client) -> None:
    guest = front.guest
    await front.start()
    for each in disks:
        await front.appear(each.vdev)
        await same(front, each)
        written = await front.write(each.vdev, 16, 8)
        if each.file is not None:
            with each.file.open("rb") as file:
                file.seek(MIB)
                assert hashlib.sha256(file.read(MIB // 2)).hexdigest() == written
        await same(front, each)
    for each in disks:  # unplugged, and plugged again
        await xl("block-detach", guest.name, each.vdev)
        await front.vanish(each.vdev)
        await xl("block-attach", guest.name, disk(back.script, each.vdev, each.target))
        await front.appear(each.vdev)
        await same(front, each)
    await saved(front, back, disks, tmp_path, store)
    if isinstance(back, Xbbd):  # a kernel is not killed
        await killed(front, back, disks)
    for each in disks:
        await same(front, each)
    await front.end()


async def saved(front: Front, back: Back, disks: list[Disk], tmp_path: Path, store: Client) -> None:
    """Saved and restored under load; memory comes back empty, as a new disk."""
    guest, before = front.guest, front.guest.domid
    loaded = [each for each in disks if each.file is not None]
    for each in loaded:
        await front.load(each.vdev)
    await guest.save(tmp_path / "saved")
    assert not await store.exists(f"backend/vbd/{before}")
    await guest.restore(tmp_path / "saved")
    for each in loaded:
        await front.progress(each.vdev)
        await checked(front, each)


async def killed(front: Front, back: Xbbd, disks: list[Disk]) -> None:
    """Under load, more than once. A disk with which nobody can go on is closed, and can be plugged again."""
    kept = [each for each in disks if each.survives]
    for each in kept:
        await front.load(each.vdev)
    for _ in range(2):
        await back.kill_and_start()
        for each in kept:
            await front.progress(each.vdev)
    for each in kept:
        await checked(front, each)
    for each in disks:
        if not each.survives:
            await xl("block-detach", front.guest.name, each.vdev)
            await front.vanish(each.vdev)
            await xl("block-attach", front.guest.name, disk(back.script, each.vdev, each.target))
            await front.appear(each.vdev)


def pairing(test, tmp_path: Path, back: Back) -> None:
    """`test(store, stack)` with the back end up; afterwards nothing is left, by the store and by Xen."""

    async def main() -> None:
        async with await Client.connect(STORE) as store:
            ports = dom0_ports()
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(back.up())
                await test(store, stack)
            for kind in ("vbd", "xbbd"):
                assert not await store.exists(f"backend/{kind}") or not await store.directory(
                    f"backend/{kind}"
                )
            assert dom0_ports() == ports

    asyncio.run(main())


def test_blkfront_on_xbbd(tmp_path):
    """Four disks of one guest: a raw file, a block device, memory, an NBD server."""
    back = Xbbd(tmp_path / "run")

    async def test(store: Client, stack: AsyncExitStack) -> None:
        files = {name: tmp_path / f"{name}.img" for name in ("file", "block", "nbd")}
        for file in files.values():
            random_file(file, SIZE)
        device = await stack.enter_async_context(loop_device(files["block"]))
        server = await stack.enter_async_context(nbd_server(files["nbd"], tmp_path / "nbd.sock"))
        disks = [
            Disk("xvda", str(files["file"]), files["file"]),
            Disk("xvdb", str(device), files["block"]),
            Disk("xvdc", "memory:8M", None, survives=False),
            Disk("xvdd", server, files["nbd"], survives=False),
        ]
        lines = [disk(back.script, each.vdev, each.target) for each in disks]
        guest = await stack.enter_async_context(xl_guest(store, "linux", disks=lines))
        await life(LinuxFront(guest), back, disks, tmp_path, store)

    pairing(test, tmp_path, back)


@pytest.mark.parametrize("kind", [Blkback, Xbbd])
def test_xbd(tmp_path, kind):
    """Ours in a guest, on Linux's back end and on ours."""
    back = kind(tmp_path / "run")

    async def test(store: Client, stack: AsyncExitStack) -> None:
        file = tmp_path / "disk.img"
        random_file(file, SIZE)
        target = file if kind is Xbbd else await stack.enter_async_context(loop_device(file))
        disks = [Disk("xvda", str(target), file)]
        lines = [disk(back.script, each.vdev, each.target) for each in disks]
        guest = await stack.enter_async_context(python_guest(store, "ours", disks=lines))
        await life(XbdFront(guest), back, disks, tmp_path, store)

    pairing(test, tmp_path, back)
