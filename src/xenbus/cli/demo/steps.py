"""The demo's steps, in order: each does something as an operator would, and checks what came of it."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from xenbus.cli.demo import peers
from xenbus.cli.demo.picture import picture
from xenbus.cli.demo.stage import GUEST, Stage, check, differences, digest, give_disk
from xenbus.domain.layout import CONTROL_DOMAIN
from xenbus.drivers.block.nbd import NbdClient
from xenbus.toolstack.devices import detach_device, wait_connected
from xenbus.toolstack.domains import DomainInfo
from xenbus.toolstack.paths import DevicePaths

STORAGE, BRIEF = "storage", "brief"
SCRATCH = 1 << 20  # the last MiB of the disk is where the demo writes
CHUNK = 1 << 20

Step = Callable[[Stage], Awaitable[None]]


def _rate(count: float, seconds: float) -> str:
    return f"{count / seconds / 1e6:.0f} MB/s" if seconds else "-"


async def start(stage: Stage) -> None:
    """A host, domain 0 and a guest"""
    await stage.start_host()
    mode = stat.S_IMODE(stage.toolstack.layout.store_socket.stat().st_mode)
    check(mode == 0o600, f"the store's socket has mode {mode:o}, not 600")
    await stage.toolstack.create(GUEST)
    pids = await stage.toolstack.host.call("processes")
    check(len(set(pids.values())) == 4, f"four processes expected, got {pids}")
    listed = ", ".join(f"{name} {pid}" for name, pid in pids.items())
    stage.show.fact(f"processes: {listed}", processes=pids)
    stage.show.fact("the store's socket is domain 0's alone (mode 0600); the guest came over its ring page")
    if lines := await peers.xenstore_ls(stage.root):
        stage.show.fact(f"Debian's xenstore-ls reads the store: {lines} nodes", xenstore_ls_nodes=lines)
        stage.did("xenstore-ls")
    await stage.show_trees()
    stage.did("four processes")


async def attach(stage: Stage) -> None:
    """A disk for the guest"""
    paths = await give_disk(stage, GUEST, stage.image, "xvda")
    await stage.show_trees()
    stage.show.fact(f"{paths.front} and {paths.back} are Connected", front=paths.front, back=paths.back)
    stage.did("handshake to Connected")


async def data(stage: Stage) -> None:
    """Data through the ring"""
    size = stage.image.stat().st_size
    with stage.show.progress("reading the disk in the guest", size) as advance:
        async with await stage.connect(GUEST) as guest:
            result = await guest.call(
                "device",
                device="xbd0",
                operation="digest",
                timeout=600.0,
                progress=lambda p: advance(p["done"]),
            )
    expected = digest(stage.image)
    check(result["sha256"] == expected, f"SHA-256 {result['sha256']} in the guest, {expected} in the file")
    rate = _rate(result["bytes"], result["seconds"])
    stage.show.fact(f"{result['bytes']} bytes read in the guest at {rate}, SHA-256 as the file's", **result)
    stage.did("whole disk by SHA-256")
    await _write_flush_discard(stage, size)


async def _write_flush_discard(stage: Stage, size: int) -> None:
    at, block = size - SCRATCH, os.urandom(65536)
    await stage.disk(GUEST, "xbd0", "write", offset=at, data=base64.b64encode(block).decode())
    await stage.disk(GUEST, "xbd0", "flush")
    check(
        _read_file(stage.image, at, len(block)) == block,
        "what the guest wrote and flushed is not in the file",
    )
    stage.show.fact("written and flushed in the guest, found in the file", bytes=len(block))
    await stage.disk(GUEST, "xbd0", "discard", offset=at, length=len(block))
    check(not any(_read_file(stage.image, at, len(block))), "what the guest discarded is still in the file")
    stage.show.fact("discarded in the guest, a hole in the file")
    stage.did("write, flush, discard")


def _read_file(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


async def nbd(stage: Stage) -> None:
    """The guest's disk over NBD"""
    socket = stage.root / "xbd0.nbd"
    async with await stage.connect(GUEST) as guest:
        await guest.call("device", device="xbd0", operation="nbd_start", socket=str(socket))
        found = await _read_export(stage, socket)
        expected = digest(stage.image)
        check(found == expected, f"SHA-256 {found} over NBD, {expected} in the file")
        stage.show.fact("our own NBD client reads the same bytes", sha256=found)
        stage.did("NBD")
        for name, sum_ in (await peers.nbd_programs(socket, stage.root)).items():
            check(sum_ in (None, expected), f"{name} read other bytes: SHA-256 {sum_}")
            stage.show.fact(f"{name} agrees", program=name)
            stage.did(name)
    await stage.until(lambda: _absent(socket), "the export to go with who asked for it")


async def _absent(path: Path) -> bool:
    return not path.exists()


async def _read_export(stage: Stage, socket: Path) -> str:
    sum_ = hashlib.sha256()
    client = await NbdClient.connect(f"nbd+unix:///?socket={socket}", readonly=True)
    try:
        with stage.show.progress("reading over NBD", client.size) as advance:
            for at in range(0, client.size, CHUNK):
                buffer = bytearray(min(CHUNK, client.size - at))
                await client.read_into(at, memoryview(buffer))
                sum_.update(buffer)
                advance(at + len(buffer))
    finally:
        await client.close()
    return sum_.hexdigest()


class _Load:
    """`async with _Load(stage)`: verified traffic in the guest meanwhile; no error may come of it."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.result: dict[str, Any] = {}

    async def __aenter__(self) -> _Load:
        size = self.stage.image.stat().st_size
        await self.stage.disk(GUEST, "xbd0", "load_start", offset=size - SCRATCH, length=SCRATCH)
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        self.result = await self.stage.disk(GUEST, "xbd0", "load_stop")
        if kind is None:
            check(not self.result["errors"], f"errors under load: {self.result['errors']}")
            check(self.result["requests"], "the load did nothing")

    def words(self) -> str:
        return f"{self.result['requests']} verified requests meanwhile, none failed"


async def hotplug(stage: Stage) -> None:
    """A second disk under load, and away again"""
    second = stage.root / "second.img"
    second.write_bytes(os.urandom(1 << 20))
    async with _Load(stage) as load:
        paths = await give_disk(stage, GUEST, second, "xvdb")
        await stage.show_trees()
        result = await stage.disk(GUEST, "xbd1", "digest")
        check(result["sha256"] == digest(second), "the second disk read other bytes")
        await detach_device(stage.toolstack.store, paths)
        await stage.until(lambda: _has_not(stage, GUEST, "xbd1"), "xbd1 to leave the guest's tree")
    stage.show.fact(f"xbd1 came, was read and went; {load.words()}", **load.result)
    stage.did("hot-plug and unplug under load")


async def _has_not(stage: Stage, name: str, device: str) -> bool:
    return not any(device in line for line in (await stage.ask(name, "tree"))["lines"])


async def suspend(stage: Stage) -> None:
    """Suspend and resume under load: cancelled, then for real"""
    guest = await stage.toolstack.find(GUEST)
    before = await stage.ask(GUEST, "counts")
    async with _Load(stage) as load:
        await stage.toolstack.suspend(guest.domid)
        await stage.toolstack.resume(guest.domid)
        after = await stage.ask(GUEST, "counts")
        # The disk's pool of pages may grow with the load; nothing that was granted may have gone.
        grown = before | {"granted_pages": max(before["granted_pages"], after["granted_pages"])}
        for what in ("granted_pages", "ports", "watches"):
            check(
                grown[what] == after[what],
                f"{what}: {before[what]} before a cancelled suspend, {after[what]} now",
            )
    stage.show.fact(f"cancelled: the guest went on as domain {guest.domid}; {load.words()}", **load.result)
    stage.did("suspend cancelled")
    await _restore(stage, guest)


async def _restore(stage: Stage, guest: DomainInfo) -> None:
    storage = await stage.toolstack.create(STORAGE)
    async with _Load(stage) as load:
        await stage.toolstack.suspend(guest.domid)
        reborn = await stage.toolstack.restore(guest.domid, back_domid=storage.domid)
        paths = DevicePaths("vbd", 51712, reborn.domid, storage.domid)
        await wait_connected(stage.toolstack.store, paths)
    check(reborn.domid != guest.domid, "the domid is still the old one")
    sums = (await stage.disk(GUEST, "xbd0", "digest"))["sha256"], digest(stage.image)
    check(sums[0] == sums[1], "the disk reads other bytes after the restore")
    await stage.show_trees()
    moved = f"domain {guest.domid} is now {reborn.domid}, its back end in domain {storage.domid}"
    stage.show.fact(f"for real: {moved}; {load.words()}", **load.result)
    stage.did("restored under another domid with its back end in another domain")


async def shutdown(stage: Stage) -> None:
    """control/shutdown: reboot and poweroff"""
    guest = await stage.toolstack.find(GUEST)
    await stage.toolstack.shutdown(guest.domid, "reboot")
    reborn = await _another(stage, GUEST, guest.domid)
    storage = await stage.toolstack.find(STORAGE)
    await wait_connected(stage.toolstack.store, DevicePaths("vbd", 51712, reborn.domid, storage.domid))
    stage.show.fact(f"reboot: acknowledged; domain {guest.domid} came back as {reborn.domid} with its disk")
    brief = await stage.toolstack.create(BRIEF)
    await stage.toolstack.poweroff(brief.domid)
    names = [domain.name for domain in await stage.toolstack.domains()]
    check(BRIEF not in names, "a domain that was powered off is still there")
    stage.show.fact(f"poweroff: domain {brief.domid} said feature-poweroff, acknowledged and ended")
    stage.did("reboot and poweroff")


async def _another(stage: Stage, name: str, old: int) -> DomainInfo:
    """The domain of that name once it has another domid and runs."""
    found: list[DomainInfo] = []

    async def there() -> bool:
        found[:] = [d for d in await stage.toolstack.domains() if d.name == name and d.domid != old]
        return bool(found) and found[0].state == "running"

    await stage.until(there, f"{name} to come back")
    return found[0]


async def kill(stage: Stage) -> None:
    """SIGKILL: nothing is left behind"""
    await _bury(stage, STORAGE)
    await _bury(stage, GUEST)
    before = await stage.settle({}, 1.0)
    guest = await stage.toolstack.create(GUEST)
    await give_disk(stage, GUEST, stage.image, "xvda")
    await stage.show_trees()
    assert guest.pid is not None
    os.kill(guest.pid, signal.SIGKILL)
    after = await stage.settle(before, 20.0)
    left = differences(before, after)
    check(not left, "left behind: " + "; ".join(left[:10]))
    await stage.show_trees()
    stage.show.fact(
        "the back bus closed; store, pages, ports, descriptors, watches and tasks are as before the guest",
        store_nodes=len(after["store"]),
        held=after["held"],
        counts=after[CONTROL_DOMAIN],
    )
    stage.did("nothing left after SIGKILL")


async def _bury(stage: Stage, name: str) -> None:
    info = await stage.toolstack.find(name)
    await stage.toolstack.destroy(info.domid)


STEPS: tuple[Step, ...] = (start, attach, data, nbd, picture, hotplug, suspend, shutdown, kill)
