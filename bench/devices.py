"""Thousands of devices in one process: front and back of each, found, probed, attached and Connected.

Quotas are raised, and said: a guest's own (128 watches, 1000 nodes) end at 60 devices. The drivers do the
handshake and nothing else, so that what is measured is the store, newbus and the bus.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import xenbus
from bench.rows import Row
from xenbus.bus import DriverRegistry, Side, XenbusDevice, XenbusDriver, XenbusState
from xenbus.bus.back import BackBus
from xenbus.bus.front import FrontBus
from xenbus.bus.xenbusb import Settings, XenBus
from xenbus.hypervisor.embedded import Machine
from xenbus.newbus import Newbus
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon import Daemon
from xenbus.xenstore.engine import Quotas

KIND = "bench"
HOST, GUEST = 0, 1
TIMEOUT = 300.0


class Front(XenbusDriver):
    name = "fbench"
    description = "handshake alone"
    heard = 0
    called = asyncio.Event()

    async def otherend_changed(self, state: XenbusState) -> None:
        if state is XenbusState.INIT_WAIT:
            await self.dev.set_state(XenbusState.INITIALISED)
        elif state is XenbusState.CONNECTED:
            await self.dev.set_state(XenbusState.CONNECTED)

    async def localend_changed(self, path: str) -> None:
        Front.heard += 1
        Front.called.set()


class Back(XenbusDriver):
    name = "bbench"
    description = "handshake alone"

    async def attach(self) -> None:
        await self.dev.set_state(XenbusState.INIT_WAIT)

    async def otherend_changed(self, state: XenbusState) -> None:
        if state is XenbusState.INITIALISED:
            await self.dev.set_state(XenbusState.CONNECTED)


class Pair:
    """A store, and two domains' buses on it, in this process."""

    def __init__(self, daemon: Daemon, front: XenBus, back: XenBus, admin: Client) -> None:
        self.daemon = daemon
        self.front = front
        self.back = back
        self.admin = admin
        self.connected: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.all = asyncio.Event()
        self.expected = 0
        for bus in (front, back):
            bus.observe(self._moved)

    def _moved(self, dev: XenbusDevice, what: str) -> None:
        self.changed[dev.node] += 1
        if what == "state" and dev.state is XenbusState.CONNECTED:
            self.connected[dev.side.value] += 1
            if sum(self.connected.values()) >= 2 * self.expected:
                self.all.set()


async def _make(count: int) -> Pair:
    machine = Machine()
    names = ("nodes", "watches", "memory", "outstanding", "transactions")
    daemon = Daemon(machine.domain(HOST), quotas=Quotas(dict.fromkeys(names, 0)))
    admin = await Client.connect(daemon.connect_local(HOST))
    registry = DriverRegistry()
    registry.add(Side.FRONT, KIND, Front)
    registry.add(Side.BACK, KIND, Back)
    settings = Settings(callback=TIMEOUT, boot=TIMEOUT)
    buses = []
    for domid, kind in ((GUEST, FrontBus), (HOST, BackBus)):
        store = await Client.connect(daemon.connect_local(domid))
        store.timeout = TIMEOUT
        tree = Newbus()
        xenstore = tree.add_child(tree.root, name="xenstore")
        buses.append(kind(store, machine.domain(domid), xenstore, registry, settings))
    await admin.introduce(GUEST, 0, machine.store_port(GUEST))
    pair = Pair(daemon, buses[0], buses[1], admin)
    pair.expected = count
    return pair


async def _write_nodes(admin: Client, count: int) -> None:
    """As a toolstack has them before the buses come up; plain writes, since nobody looks yet."""
    for domid, root in ((GUEST, f"/local/domain/{GUEST}/device"), (HOST, f"/local/domain/{HOST}/backend")):
        await admin.mkdir(root)
        await admin.set_perms(root, [f"n{HOST}", f"r{domid}"])
    for start in range(0, count, 100):
        await asyncio.gather(*(_write_pair(admin, n) for n in range(start, min(start + 100, count))))


async def _write_pair(admin: Client, n: int) -> None:
    front = f"/local/domain/{GUEST}/device/{KIND}/{n}"
    back = f"/local/domain/{HOST}/backend/{KIND}/{GUEST}/{n}"
    halves = {
        front: ((GUEST, HOST), {"backend": back, "backend-id": HOST, "state": 1}),
        back: ((HOST, GUEST), {"frontend": front, "frontend-id": GUEST, "online": 1, "state": 1}),
    }
    for node, ((owner, reader), values) in halves.items():
        await admin.mkdir(node)
        await admin.set_perms(node, [f"n{owner}", f"r{reader}"])
        await asyncio.gather(*(admin.write(f"{node}/{key}", str(value)) for key, value in values.items()))


async def measure(count: int, traced: bool) -> dict[str, float]:
    """Seconds until all are Connected; with `traced` also bytes a device of newbus and bus objects."""
    pair = await _make(count)
    await _write_nodes(pair.admin, count)
    gc.collect()
    if traced:
        tracemalloc.start(1)
    start = time.perf_counter()
    await asyncio.gather(pair.front.attach(), pair.back.attach())
    async with asyncio.timeout(TIMEOUT):
        await pair.all.wait()
    took = time.perf_counter() - start
    result = {"seconds": took, "devices": float(len(pair.front.devices) + len(pair.back.devices))}
    if traced:
        await asyncio.sleep(0.2)  # mailboxes and coroutines that are on their way out are not the devices'
        gc.collect()
        result["bytes"] = _ours(tracemalloc.take_snapshot()) / (2 * count)
        tracemalloc.stop()
    await asyncio.sleep(0.5)  # first events of watches that were set last
    pair.changed.clear()
    Front.heard = 0
    Front.called.clear()
    await pair.admin.write(f"/local/domain/{GUEST}/device/{KIND}/{count // 2}/note", "x")
    async with asyncio.timeout(TIMEOUT):
        await Front.called.wait()
    await asyncio.sleep(0.1)  # whoever else would hear of it has had the time to
    result["touched"] = float(Front.heard + len(pair.changed))
    return result


def _ours(snapshot: tracemalloc.Snapshot) -> int:
    root = Path(xenbus.__file__).parent
    rooms = (str(root / "newbus"), str(root / "bus"))
    return sum(
        stat.size for stat in snapshot.statistics("filename") if stat.traceback[0].filename.startswith(rooms)
    )


def _in_child(count: int, traced: bool) -> dict[str, float]:
    """Each size in a fresh process: the allocator of one that has had 10 000 devices is another one."""
    code = (
        "import asyncio, json, os, resource\n"
        "from bench.devices import measure\nfrom bench.rows import pin\npin(0)\n"
        f"r = asyncio.run(measure({count}, {traced}))\n"
        "r['rss'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        # Not detached: ten thousand orderly ends are not what is measured.
        "print(json.dumps(r), flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def run(quick: bool) -> list[Row]:
    sizes = (250, 500, 1000) if quick else (2500, 5000, 10_000)
    runs = [_in_child(size, False) for size in sizes]
    rows = [
        Row(
            f"{size} devices, both ends Connected",
            found["seconds"],
            runs[i - 1]["seconds"] if i else None,
            "s",
            f"{sizes[i - 1]} devices" if i else "",
            "<= 2.2" if i else "",
            f"quotas off; at most {found['rss'] / 1e6:.0f} MB resident",
        )
        for i, (size, found) in enumerate(zip(sizes, runs, strict=True))
    ]
    traced = _in_child(sizes[0], True)
    rows.append(Row("newbus and bus objects", traced["bytes"], None, "bytes a device", target="<= 2048"))
    rows.append(
        Row(
            "devices that one property's write touches",
            runs[-1]["touched"],
            None,
            "",
            target="<= 1",
            note=f"in a tree of {sizes[-1]} devices a side",
        )
    )
    return rows
