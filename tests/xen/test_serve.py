"""`xenbus serve` in dom0 as an operator has it: a daemon, commands, a Linux guest, an xl configuration."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest

from tests.support.backs import Blkback
from tests.support.dom0 import MIB, STORE, random_file, sha256
from tests.support.fronts import LinuxFront, file_sums
from tests.support.real_xen import dom0_ports
from tests.support.serving import serving
from tests.support.xl_guest import xl, xl_guest
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(300)


def run(test):
    """With the store; ports and back ends are as before when it ends."""

    async def main():
        async with await Client.connect(STORE) as store:
            ports = dom0_ports()
            await test(store)
            assert dom0_ports() == ports
            for kind in ("vbd", "xbbd"):
                assert not await store.exists(f"backend/{kind}")

    asyncio.run(main())


WAIT_FOR_DISK = "for i in $(seq 300); do [ -b /dev/xvda ] && break; sleep 0.1; done; [ -b /dev/xvda ]"


def test_attach_tree_sysctl_detach(tmp_path):
    async def test(store):
        file = tmp_path / "disk.img"
        expected = random_file(file, 8 * MIB)
        async with (
            Blkback(tmp_path).up(),  # and has every vbd
            serving(tmp_path / "run") as daemon,
            xl_guest(store, "guest") as guest,
        ):
            refusal = await daemon.command("serve", "--claim", "vbd", code=2)
            assert "Linux's own driver has every backend of that type" in refusal
            said = await daemon.command("attach", "block", "--domain", "guest", "--image", str(file))
            back = f"/local/domain/0/backend/xbbd/{guest.domid}/51712"
            assert back in said
            await guest.run(WAIT_FOR_DISK)
            assert (await guest.run("sha256sum /dev/xvda")).split()[0] == expected
            await guest.run("dd if=/dev/urandom of=/dev/xvda bs=64k count=8 conv=fsync 2>/dev/null")
            assert (await guest.run("sha256sum /dev/xvda")).split()[0] == sha256(file)
            tree = await daemon.command("tree")
            assert f"xbbd0 at backend/xbbd/{guest.domid}/51712: Connected" in tree
            trees = {each["name"]: each for each in json.loads(await daemon.command("tree", "--json"))}
            assert {"Domain-0", "guest"} <= set(trees)
            state = await daemon.command("sysctl", "dev.xbbd.0.xenbus_connection_state")
            assert state.strip().endswith("Connected")
            await daemon.command("detach", "guest/xvda")
            assert not await store.exists(f"{back}/state")
            await guest.run(
                "for i in $(seq 300); do [ -b /dev/xvda ] || break; sleep 0.1; done; [ ! -b /dev/xvda ]"
            )
            # And again: what was taken was given back.
            await daemon.command("attach", "block", "--domain", "guest", "--image", str(file))
            await guest.run(WAIT_FOR_DISK)
            assert (await guest.run("sha256sum /dev/xvda")).split()[0] == sha256(file)

    run(test)


def test_a_guest_that_is_destroyed_leaves_nothing(tmp_path):
    async def test(store):
        file = tmp_path / "disk.img"
        random_file(file, MIB)
        async with serving(tmp_path / "run") as daemon:
            async with xl_guest(store, "guest") as guest:
                await daemon.command("attach", "block", "--domain", "guest", "--image", str(file))
                await guest.run(WAIT_FOR_DISK)
            assert await store.wait_for("backend/xbbd", lambda value: value is None, 60) is None

    run(test)


def test_handed_over_killed_and_restored(tmp_path):
    """A disk of our own type: the next process goes on with it, and a restored guest gets it anew."""

    async def test(store):
        file = tmp_path / "disk.img"
        random_file(file, 8 * MIB)
        async with serving(tmp_path / "run") as daemon, xl_guest(store, "guest") as guest:
            front = LinuxFront(guest)
            await daemon.command("attach", "block", "--domain", "guest", "--image", str(file))
            await front.appear("xvda")
            await front.load("xvda")
            for number in (signal.SIGUSR1, signal.SIGKILL, signal.SIGUSR1):
                assert await daemon.end(number) in (0, -signal.SIGKILL)
                await daemon.start()
                await front.progress("xvda")
            assert "goes on for a process that ended" in daemon.log.read_text()
            before = guest.domid
            await guest.save(tmp_path / "saved")
            await guest.restore(tmp_path / "saved", paused=True)
            await daemon.command("attach", "block", "--domain", "guest", "--image", str(file), "--no-wait")
            await xl("unpause", "guest")
            await front.progress("xvda")
            written = await front.unload("xvda")
            assert await front.sums("xvda", written) == written == file_sums(file, written)
            assert not await store.exists(f"backend/xbbd/{before}/51712")

    run(test)


def test_stopped_in_order_its_devices_close(tmp_path):
    async def test(store):
        file = tmp_path / "disk.img"
        random_file(file, MIB)
        async with serving(tmp_path / "run") as daemon, xl_guest(store, "guest") as guest:
            await daemon.command("attach", "block", "--domain", "guest", "--image", str(file))
            await guest.run(WAIT_FOR_DISK)
            assert await daemon.end() == 0
            assert await store.read_str(f"backend/xbbd/{guest.domid}/51712/state") == "6"
            assert await store.read_str(f"/local/domain/{guest.domid}/device/vbd/51712/state") == "6"
            await daemon.start()
            await daemon.command("detach", "guest/xvda")

    run(test)
