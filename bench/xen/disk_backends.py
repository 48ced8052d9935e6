"""Three programs that serve the same file to the same guest, each as its own users start it.

Knows processes, modules and the nodes each back end wants. Nothing of measuring.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.xen.processes import plugged, process, python_module, run
from bench.xen.rounds import Served
from xenbus.drivers.block.blkif import vdev_number
from xenbus.toolstack.devices import DeviceSpec
from xenbus.toolstack.paths import DevicePaths
from xenbus.xenstore.client import Client

QEMU = "/usr/libexec/xen-qemu-system-i386"


@dataclass(slots=True, frozen=True)
class Server:
    """nodes: what it wants in its directory besides those of any disk; pid: 0 for the kernel"""

    nodes: dict[str, str]
    pid: int = 0


# For a domid, a file, and the run's options.
Serve = Callable[[int, Path, Namespace], AbstractAsyncContextManager[Server]]


def xbbd(name: str, *words: str) -> Serve:
    """Ours, in a process and under a type of its own."""

    @asynccontextmanager
    async def serve(_domid: int, image: Path, options: Namespace) -> AsyncIterator[Server]:
        profile = options.results / f"{name}.prof" if options.profile else None
        command = python_module("bench.xen.serve", name, *words, profile=profile)
        async with process(*command, log=options.results / f"{name}.log", ready="ready") as pid:
            yield Server({"params": str(image), "type": "xenbus"}, pid)

    return serve


@asynccontextmanager
async def blkback(_domid: int, image: Path, _options: Namespace) -> AsyncIterator[Server]:
    """Over a loop device, as xl does for a file; the nodes are those of the stock hotplug script."""
    await run("modprobe", "xen-blkback")
    loop = (await run("losetup", "-f", "--show", str(image))).strip()
    try:
        number = Path(loop).stat().st_rdev
        nodes = {"physical-device": f"{number >> 8:x}:{number & 0xFF:x}", "physical-device-path": loop}
        yield Server({"params": loop, "type": "phy", **nodes, "hotplug-status": "connected"})
    finally:
        await run("losetup", "-d", loop)


@asynccontextmanager
async def qemu(domid: int, image: Path, options: Namespace) -> AsyncIterator[Server]:
    """As libxl starts it for a PV guest with a disk of backendtype=qdisk."""
    command = [QEMU, "-M", "xenpv", "-xen-domid", str(domid), "-xen-attach", "-m", "256", "-nodefaults"]
    command += ["-no-user-config", "-nographic", "-monitor", "none", "-serial", "none", "-parallel", "none"]
    async with process(*command, log=options.results / "qemu.log") as pid:
        nodes = {"params": f"aio:{image}", "type": "qdisk", "discard-enable": "1", "direct-io-safe": "0"}
        yield Server(nodes, pid)


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
async def disk(
    store: Client, domid: int, name: str, image: Path, options: Namespace
) -> AsyncIterator[Served]:
    """Both ends Connected when the body runs; unplugged in order after it."""
    kind, vdev, serve = BACKENDS[name]
    number = str(vdev_number(vdev))
    front = {"virtual-device": number, "device-type": "disk"}
    async with serve(domid, image, options) as server:
        back = {"dev": vdev, **front, "mode": "w", "removable": "0", "bootable": "1", **server.nodes}
        async with plugged(store, DeviceSpec(DevicePaths("vbd", int(number), domid, 0, kind), front, back)):
            yield Served(f"/dev/{vdev}", server.pid)
