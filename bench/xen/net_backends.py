"""Two back ends of network devices, each as its own users start it. Knows processes, modules and nodes."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace

from bench.xen.processes import plugged, process, python_module, run
from xenbus.toolstack.net import PORT_KEY, NicSpec
from xenbus.xenstore.client import Client


@dataclass(slots=True, frozen=True)
class Nic:
    """The guest's device of this number: its bridge, and the addresses at both ends."""

    number: int

    @property
    def mac(self) -> str:
        return f"00:16:3e:0a:0b:{self.number:02x}"

    @property
    def bridge(self) -> str:
        return f"xenbr{self.number}"

    @property
    def dom0(self) -> str:
        return f"10.7.{self.number}.1"

    @property
    def guest(self) -> str:
        return f"10.7.{self.number}.2"

    def spec(self, domid: int, kind: str) -> NicSpec:
        return NicSpec(domid, self.number, self.mac, self.bridge, back_kind=kind)


@asynccontextmanager
async def xnb(store: Client, domid: int, nic: Nic, options: Namespace) -> AsyncIterator[int]:
    """`xenbus serve`, and what `xenbus attach net --bridge` writes."""
    command = python_module(
        "xenbus", "serve", profile=options.results / "xnb.prof" if options.profile else None
    )
    async with (
        process(*command, log=options.results / "xnb.log", ready="ready") as pid,
        plugged(store, nic.spec(domid, "xnb").device()),
    ):
        yield pid
        counters = await run(sys.executable, "-m", "xenbus", "sysctl", "dev.xnb")
        (options.results / "xnb-counters.txt").write_text(counters)


@asynccontextmanager
async def netback(store: Client, domid: int, nic: Nic, _options: Namespace) -> AsyncIterator[int]:
    """Linux's own, as `xl` plugs it; what the stock hotplug script does is done here."""
    await run("modprobe", "xen-netback")
    spec = nic.spec(domid, "vif").device()
    back = {key: value for key, value in spec.back.items() if key != PORT_KEY}
    back |= {"script": "/etc/xen/scripts/vif-bridge", "hotplug-status": "connected"}
    async with plugged(store, replace(spec, back=back)):
        await run("ip", "link", "set", f"vif{domid}.{nic.number}", "master", nic.bridge, "up")
        yield 0


# name -> what serves it; yields its pid, 0 for the kernel.
Serve = Callable[[Client, int, Nic, Namespace], AbstractAsyncContextManager[int]]
BACKENDS: dict[str, Serve] = {"xnb": xnb, "netback": netback}
DEFAULT = ("xnb", "netback")
