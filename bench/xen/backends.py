"""Three programs that serve the same file to the same guest, each as its own users start it.

Knows processes, modules and the nodes each back end wants. Nothing of measuring.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from xenbus.drivers.block.blkif import vdev_number
from xenbus.toolstack.devices import DeviceSpec, detach_device, wait_connected, write_device
from xenbus.toolstack.paths import DevicePaths, domain_path
from xenbus.xenstore.client import Client

DEADLINE = 60.0  # seconds, under emulation
QEMU = "/usr/libexec/xen-qemu-system-i386"


@dataclass(slots=True, frozen=True)
class Paths(DevicePaths):
    """Those of a `vbd` whose back end is of another type: only the front end's `backend` node leads there."""

    back_kind: str = "vbd"

    @property
    def back(self) -> str:
        return f"{domain_path(self.back_domid)}/backend/{self.back_kind}/{self.front_domid}/{self.devid}"


@dataclass(slots=True)
class Served:
    """nodes: what the back end wants in its directory besides those of any disk; pid: 0 for the kernel"""

    nodes: dict[str, str]
    pid: int = 0

    def cpu(self) -> tuple[float, float]:
        """Seconds that it ran so far, in user space and in its kernel's (proc(5), stat)."""
        if not self.pid:
            return 0.0, 0.0
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return int(fields[11]) / ticks, int(fields[12]) / ticks


Serve = Callable[[int, Path, Path], AbstractAsyncContextManager[Served]]


@asynccontextmanager
async def process(*command: str, log: Path, ready: str = "") -> AsyncIterator[int]:
    """A program that runs meanwhile, its pid; `ready`: what its first line says when it is up."""
    with log.open("wb") as err:
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=err)
    try:
        if ready:
            assert child.stdout is not None
            line = await asyncio.wait_for(child.stdout.readline(), DEADLINE)
            assert line.decode().strip() == ready, f"{command}: {line!r} {log.read_text()}"
        yield child.pid
        assert child.returncode is None, f"{command} ended: {log.read_text()}"
    finally:
        if child.returncode is None:
            child.terminate()
            try:
                await asyncio.wait_for(child.communicate(), DEADLINE)
            except TimeoutError:
                child.kill()


async def run(*command: str) -> str:
    """Its output; AssertionError if it fails."""
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(child.communicate(), DEADLINE)
    assert child.returncode == 0, f"{command}: {out.decode(errors='replace')}"
    return out.decode()


def xbbd(name: str, *options: str) -> Serve:
    """Ours, in a process and under a type of its own."""

    @asynccontextmanager
    async def serve(_domid: int, image: Path, results: Path) -> AsyncIterator[Served]:
        command = [sys.executable, "-m", "bench.xen.serve", name, *options]
        async with process(*command, log=results / f"{name}.log", ready="ready") as pid:
            yield Served({"params": str(image), "type": "xenbus"}, pid)

    return serve


@asynccontextmanager
async def blkback(_domid: int, image: Path, _results: Path) -> AsyncIterator[Served]:
    """Over a loop device, as xl does for a file; the nodes are those of the stock hotplug script."""
    await run("modprobe", "xen-blkback")
    loop = (await run("losetup", "-f", "--show", str(image))).strip()
    try:
        number = Path(loop).stat().st_rdev
        nodes = {"physical-device": f"{number >> 8:x}:{number & 0xFF:x}", "physical-device-path": loop}
        yield Served({"params": loop, "type": "phy", **nodes, "hotplug-status": "connected"})
    finally:
        await run("losetup", "-d", loop)


@asynccontextmanager
async def qemu(domid: int, image: Path, results: Path) -> AsyncIterator[Served]:
    """As libxl starts it for a PV guest with a disk of backendtype=qdisk."""
    command = [QEMU, "-M", "xenpv", "-xen-domid", str(domid), "-xen-attach", "-m", "256", "-nodefaults"]
    command += ["-no-user-config", "-nographic", "-monitor", "none", "-serial", "none", "-parallel", "none"]
    async with process(*command, log=results / "qemu.log") as pid:
        nodes = {"params": f"aio:{image}", "type": "qdisk", "discard-enable": "1", "direct-io-safe": "0"}
        yield Served(nodes, pid)


# name -> (type below backend/, the guest's name of the disk, what serves it). Where xen-blkback is loaded it
# claims every `vbd`, so that ours are of other types. The last two are for comparing us with ourselves.
BACKENDS: dict[str, tuple[str, str, Serve]] = {
    "xbbd": ("xbbd", "xvda", xbbd("xbbd")),
    "blkback": ("vbd", "xvdb", blkback),
    "qemu": ("qdisk", "xvdc", qemu),
    "polling": ("polling", "xvdd", xbbd("polling", "--polling")),
    "once": ("once", "xvde", xbbd("once", "--no-persistent")),
}
DEFAULT = ("xbbd", "blkback", "qemu")


@asynccontextmanager
async def plugged(
    store: Client, domid: int, kind: str, vdev: str, nodes: dict[str, str]
) -> AsyncIterator[None]:
    """Both ends Connected when the body runs; unplugged in order after it."""
    number = str(vdev_number(vdev))
    front = {"virtual-device": number, "device-type": "disk"}
    back = {"dev": vdev, **front, "mode": "w", "removable": "0", "bootable": "1", **nodes}
    paths = Paths("vbd", int(number), domid, 0, kind)
    await write_device(store, DeviceSpec(paths, front, back))
    await wait_connected(store, paths, DEADLINE)
    yield
    await detach_device(store, paths, timeout=DEADLINE)
