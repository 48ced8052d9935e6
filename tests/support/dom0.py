"""dom0's buses in this process, on a real Xen, and disks on them as a toolstack makes them. No test here."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support import evidence
from tests.support.real_xen import dom0_ports
from xenbus.domain.runtime import DomainRuntime
from xenbus.hypervisor.interface import Held
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import DeviceSpec, detach_device, wait_connected, write_device
from xenbus.xenstore.client import Client

MIB = 1 << 20
HANDSHAKE = 60.0  # seconds, under emulation
STORE = "/dev/xen/xenbus"


@asynccontextmanager
async def dom0() -> AsyncIterator[DomainRuntime]:
    """Nothing is held when it ends, by our count and by Xen's."""
    store = await Client.connect(STORE)
    hv = LinuxHypervisor(int(await store.read_str("domid")))
    await store.close()
    ports = dom0_ports()
    runtime = DomainRuntime("Domain-0", hv, lambda: Client.connect(STORE))
    try:
        await runtime.start()
        yield runtime
    except BaseException:
        evidence.note()
        raise
    finally:
        await runtime.stop()
        held = hv.held()
        await hv.close()
    assert held == Held(0, 0, 0)
    assert dom0_ports() == ports


@asynccontextmanager
async def plugged(runtime: DomainRuntime, domid: int, target: str, **options) -> AsyncIterator[DeviceSpec]:
    """A disk `xvda` for that domain, both ends Connected; unplugged in order afterwards, no node left."""
    spec = DiskSpec(domid, target, **options).device()
    store = runtime.store
    await write_device(store, spec)
    await wait_connected(store, spec.paths, HANDSHAKE)
    yield spec
    assert await detach_device(store, spec.paths, timeout=HANDSHAKE)
    for node in (spec.paths.back, spec.paths.front, spec.paths.record):
        assert not await store.exists(node), node


def random_file(path: Path, size: int) -> str:
    """Its SHA-256."""
    data = random.Random(7).randbytes(size)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
