"""A guest's disks, whichever driver has them: Linux's xen-blkfront, or our xbd. No test here.

`write`, `digest`, and a load that runs in the guest by itself and keeps what it wrote in mind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from tests.support.xl_guest import PythonGuest, XlGuest

BLOCK = 64 << 10  # bytes of one write of the load
SLOTS = range(64, 96)  # where it writes, in blocks
APPEAR = 90.0  # seconds, under emulation
Sums = Mapping[int, str]

# One line: the guest's shell evaluates each as it comes.
_LOAD = (
    "rm -f /tmp/stop-{dev} /tmp/stopped-{dev}; : >/tmp/log-{dev}; (i=0; "
    "while [ ! -e /tmp/stop-{dev} ]; do slot=$(({first} + i % {count})); "
    "dd if=/dev/urandom of=/tmp/block-{dev} bs=64k count=1 2>/dev/null; "
    "dd if=/tmp/block-{dev} of=/dev/{dev} bs=64k seek=$slot conv=fsync,notrunc 2>/dev/null "
    "|| echo failed $slot; "
    "echo $slot $(sha256sum </tmp/block-{dev}); i=$((i + 1)); sleep {pause}; "
    "done >/tmp/log-{dev}; touch /tmp/stopped-{dev}) </dev/null >/dev/null 2>&1 &"
)


class LinuxFront:
    """xen-blkfront, driven by shell."""

    def __init__(self, guest: XlGuest) -> None:
        self.guest = guest

    async def start(self) -> None:
        pass

    async def end(self) -> None:
        pass

    async def appear(self, dev: str) -> None:
        await self._until(f"[ -b /dev/{dev} ]")

    async def vanish(self, dev: str) -> None:
        await self._until(f"[ ! -e /dev/{dev} ]")

    async def _until(self, test: str) -> None:
        line = f"for i in $(seq {int(APPEAR * 5)}); do {test} && break; sleep 0.2; done; {test}"
        await self.guest.run(line, APPEAR + 30)

    async def digest(self, dev: str) -> str:
        await self.guest.run(f"blockdev --flushbufs /dev/{dev}")
        return (await self.guest.run(f"sha256sum /dev/{dev}")).split()[0]

    async def write(self, dev: str, at: int, count: int) -> str:
        """`count` blocks of noise at block `at`, synced: their SHA-256."""
        await self.guest.run(f"dd if=/dev/urandom of=/tmp/new bs=64k count={count} 2>/dev/null")
        await self.guest.run(f"dd if=/tmp/new of=/dev/{dev} bs=64k seek={at} conv=fsync,notrunc 2>/dev/null")
        return (await self.guest.run("sha256sum /tmp/new")).split()[0]

    async def load(self, dev: str, pause: float = 0) -> None:
        """pause: seconds between two writes"""
        line = _LOAD.format(dev=dev, first=SLOTS[0], count=len(SLOTS), pause=pause)
        await self.guest.run(line + " true")
        await self.progress(dev)

    async def progress(self, dev: str, writes: int = 3) -> None:
        """Until so many more writes are done."""
        before = int(await self.guest.run(f"wc -l </tmp/log-{dev}"))
        await self._until(f"[ $(wc -l </tmp/log-{dev}) -ge {before + writes} ]")

    async def unload(self, dev: str) -> Sums:
        """The last sum of each slot."""
        await self.guest.run(f"touch /tmp/stop-{dev}")
        await self._until(f"[ -e /tmp/stopped-{dev} ]")
        said = await self.guest.run(f"cat /tmp/log-{dev}")
        assert "failed" not in said, said
        return {int(line.split()[0]): line.split()[1] for line in said.splitlines()}

    async def sums(self, dev: str, slots: Sums) -> Sums:
        """What it reads there now, from the disk."""
        await self.guest.run(f"blockdev --flushbufs /dev/{dev}")
        found = {}
        for slot in slots:
            said = await self.guest.run(
                f"dd if=/dev/{dev} bs=64k skip={slot} count=1 2>/dev/null | sha256sum"
            )
            found[slot] = said.split()[0]
        return found


_START = """
import hashlib, logging, os
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s")
from xenbus.bus import Side
from xenbus.domain.native import Served, native_runtime
from xenbus.drivers.block.blkif import vdev_number
for name, value in options:
    from xenbus.drivers.block.xbd import Xbd
    setattr(Xbd, name, value)
runtime = await native_runtime(Served(frozenset({Side.FRONT}), frozenset({"vbd"})))
await runtime.start()
loads = {}

def dev(name):
    return runtime.buses[0].devices.get(f"device/vbd/{vdev_number(name)}")

async def appear(name, seconds):
    async with asyncio.timeout(seconds):
        while dev(name) is None or not dev(name).device.attached:
            await asyncio.sleep(0.05)
        await dev(name).driver.disk.connected(seconds)

async def vanish(name, seconds):
    async with asyncio.timeout(seconds):
        while dev(name) is not None:
            await asyncio.sleep(0.05)

async def digest(name):
    disk, sha = dev(name).driver.disk, hashlib.sha256()
    for at in range(0, disk.size, 1 << 20):
        sha.update(await disk.read(at, min(1 << 20, disk.size - at)))
    return sha.hexdigest()

async def write(name, at, count):
    data = os.urandom(count << 16)
    await dev(name).driver.disk.write(at << 16, data)
    await dev(name).driver.disk.flush()
    return hashlib.sha256(data).hexdigest()

class Load:
    def __init__(self, disk, first, count):
        self.disk, self.slots = disk, range(first, first + count)
        self.sums, self.done, self.over = {}, 0, False
        self.task = asyncio.ensure_future(self.run())
    async def run(self):
        while not self.over:
            slot = self.slots[self.done % len(self.slots)]
            data = os.urandom(1 << 16)
            await self.disk.write(slot << 16, data)
            await self.disk.flush()
            self.sums[slot] = hashlib.sha256(data).hexdigest()
            self.done += 1

async def progress(name, writes, seconds):
    load = loads[name]
    wanted = load.done + writes
    async with asyncio.timeout(seconds):
        while load.done < wanted:
            if load.task.done():
                load.task.result()
            await asyncio.sleep(0.05)

async def unload(name, seconds):
    load = loads.pop(name)
    load.over = True
    async with asyncio.timeout(seconds):
        await load.task
    return [[slot, found] for slot, found in load.sums.items()]

async def sums(name, slots):
    found = []
    for slot in slots:
        data = await dev(name).driver.disk.read(slot << 16, 1 << 16)
        found.append([slot, hashlib.sha256(data).hexdigest()])
    return found
"""


class XbdFront:
    """Our xbd in the guest's Python. options: class attributes of Xbd."""

    def __init__(self, guest: PythonGuest, **options: object) -> None:
        self.guest = guest
        self.options = options

    async def start(self) -> None:
        await self.guest.call(_START, APPEAR, options=[list(pair) for pair in self.options.items()])

    async def end(self) -> None:
        """In order; then the process goes, with whatever it has of a life before a restore."""
        await self.guest.call("await runtime.stop()", APPEAR)
        await self.guest.restart()
        said = await self.guest.run("dmesg")
        assert "BUG" not in said and "WARNING" not in said, said[-3000:]

    async def appear(self, dev: str) -> None:
        await self.guest.call("await appear(name, seconds)", APPEAR + 10, name=dev, seconds=APPEAR)

    async def vanish(self, dev: str) -> None:
        await self.guest.call("await vanish(name, seconds)", APPEAR + 10, name=dev, seconds=APPEAR)

    async def digest(self, dev: str) -> str:
        return await self.guest.call("await digest(name)", APPEAR, name=dev)

    async def write(self, dev: str, at: int, count: int) -> str:
        return await self.guest.call("await write(name, at, count)", APPEAR, name=dev, at=at, count=count)

    async def load(self, dev: str) -> None:
        source = "loads[name] = Load(dev(name).driver.disk, first, count)"
        await self.guest.call(source, APPEAR, name=dev, first=SLOTS[0], count=len(SLOTS))
        await self.progress(dev)

    async def progress(self, dev: str, writes: int = 3) -> None:
        source = "await progress(name, writes, seconds)"
        await self.guest.call(source, APPEAR + 10, name=dev, writes=writes, seconds=APPEAR)

    async def unload(self, dev: str) -> Sums:
        return dict(
            await self.guest.call("await unload(name, seconds)", APPEAR + 10, name=dev, seconds=APPEAR)
        )

    async def sums(self, dev: str, slots: Sums) -> Sums:
        return dict(await self.guest.call("await sums(name, slots)", APPEAR, name=dev, slots=list(slots)))


Front = LinuxFront | XbdFront


def file_sums(target: Path, slots: Sums) -> Sums:
    """The same in dom0, from the file or device behind the disk."""
    with target.open("rb", buffering=0) as file:
        found = {}
        for slot in slots:
            file.seek(slot * BLOCK)
            found[slot] = hashlib.sha256(file.read(BLOCK)).hexdigest()
        return found
