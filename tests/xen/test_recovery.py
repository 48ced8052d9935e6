"""A back end in dom0 is killed under load, another process goes on; in front, our xbd or a Linux guest."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager

import pytest

from tests.support.back_process import STUCK, BackProcess
from tests.support.dom0 import HANDSHAKE, MIB, STORE, random_file, sha256
from tests.support.real_xen import dom0_ports
from tests.support.until import until
from tests.support.xl_guest import xl_guest
from xenbus.bus import FrontBus, XenbusState
from xenbus.hypervisor.interface import Held
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.newbus import Newbus
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import detach_device, wait_connected, write_device
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(300)
PAGE = 4096
KILLS = 3


@asynccontextmanager
async def served(tmp_path, store, domid):
    """A disk of 8 MiB for that domain, its back end in a process that sticks: (image, paths, rise, backs).

    At the end it is unplugged in order: no node, no journal and no port is left.
    """
    ports = dom0_ports()
    journals, image = tmp_path / "journals", tmp_path / "disk.img"
    journals.mkdir(mode=0o700)
    random_file(image, 8 * MIB)
    backs: list[BackProcess] = []

    async def rise(stick=None):
        backs.append(await BackProcess.start(STORE, journals=journals, stick=stick))
        return backs[-1]

    try:
        await rise(stick=40)
        spec = DiskSpec(domid, str(image)).device()
        await write_device(store, spec)
        await wait_connected(store, spec.paths, HANDSHAKE)
        yield image, spec.paths, rise, backs
        assert await detach_device(store, spec.paths, timeout=HANDSHAKE)
        assert list(journals.iterdir()) == []
        await backs[-1].stop()
    finally:
        for back in backs:
            if back.process.returncode is None:
                await back.kill()
    assert dom0_ports() == ports


async def kill_again_and_again(store, paths, rise, backs) -> None:
    """Each time with writes in flight, answered or not; the last one that rises stays."""
    for left in reversed(range(KILLS)):
        await backs[-1].said("stuck")
        await backs[-1].kill()
        for node in (paths.front, paths.back):
            assert await store.read(f"{node}/state") == b"4"
        await rise(stick=40 if left else None)
        assert backs[-1].again >= STUCK


def test_xbd_does_not_notice(tmp_path):
    async def main():
        store = await Client.connect(STORE)
        hv = LinuxHypervisor(0)
        tree = Newbus()
        bus = FrontBus(store, hv, tree.add_child(tree.root, name="xenstore"))
        await bus.attach()
        async with served(tmp_path, store, 0) as (image, paths, rise, backs):
            node = f"device/vbd/{paths.devid}"
            await until(lambda: bus.devices[node].state is XenbusState.CONNECTED, HANDSHAKE)
            disk = bus.devices[node].driver.disk
            await disk.connected(10)
            disk.timeout = 120.0
            model, rounds = bytearray(image.read_bytes()), 0
            killing = True

            async def work(number):
                nonlocal rounds
                data = random.Random(number)
                while killing:
                    page = data.randbytes(PAGE)
                    await disk.write(number * PAGE, page)
                    model[number * PAGE : (number + 1) * PAGE] = page
                    assert await disk.read(number * PAGE, PAGE) == page
                    rounds += 1

            seen = []
            bus.observe(lambda dev, what: seen.append((what, dev.state, dev.otherend_state)))
            tasks = [asyncio.create_task(work(number)) for number in range(16)]
            await kill_again_and_again(store, paths, rise, backs)
            before = rounds
            await until(lambda: rounds > before + 40, 60)
            killing = False
            await asyncio.wait_for(asyncio.gather(*tasks), 60)
            assert seen == []
            got = b"".join([await disk.read(at, MIB) for at in range(0, 8 * MIB, MIB)])
            assert got == bytes(model)
            await disk.flush()
            assert image.read_bytes() == bytes(model)
        await bus.detach()
        assert hv.held() == Held(0, 0, 0)
        await hv.close()
        await store.close()

    asyncio.run(main())


def test_a_linux_guest_does_not_notice(tmp_path):
    """xen-blkfront would give its disk up if it saw us close: its writes have to arrive all the same."""

    async def main():
        store = await Client.connect(STORE)
        async with (
            xl_guest(store, "survivor") as guest,
            served(tmp_path, store, guest.domid) as (image, paths, rise, backs),
        ):
            await guest.run("for i in $(seq 100); do [ -b /dev/xvda ] && break; sleep 0.1; done")
            await guest.run("dd if=/dev/urandom of=/tmp/new bs=64k count=8 2>/dev/null")
            # Eight at a time, each with one request in flight.
            one = "dd if=/tmp/new of=/dev/xvda bs=4k oflag=direct conv=fsync seek=$((n * 256)) 2>/dev/null"
            line = f"for n in 0 1 2 3 4 5 6 7; do {one} & done; wait"
            writing = asyncio.create_task(guest.run(line, 200))
            await kill_again_and_again(store, paths, rise, backs)
            await writing
            expected = (await guest.run("sha256sum /tmp/new")).split()[0]
            await guest.run("echo 3 >/proc/sys/vm/drop_caches")
            for n in range(8):
                got = await guest.run(
                    f"dd if=/dev/xvda bs=4k count=128 skip={n * 256} 2>/dev/null | sha256sum"
                )
                assert got.split()[0] == expected
            assert (await guest.run("sha256sum /dev/xvda")).split()[0] == sha256(image)
            assert "I/O error" not in await guest.run("dmesg")
        await store.close()

    asyncio.run(main())
