"""`xenbus tree` and `sysctl` in dom0, of a Linux guest and devices that xl made: none is served by us."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from tests.support.dom0 import MIB, STORE
from tests.support.xl_guest import XlGuest, xl, xl_guest
from xenbus.toolstack.devices import DeviceSpec, remove_device, write_device
from xenbus.toolstack.paths import DevicePaths
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(300)
PYZ = Path(__file__).parents[2] / "xenbus.pyz"
# Without udev the stock block script waits for ever; these say at once what the stock ones do in the end.
BLOCK = """#!/bin/sh
[ "$1" = add ] || exit 0
device=$(xenstore-read "$XENBUS_PATH/params")
xenstore-write "$XENBUS_PATH/physical-device-path" "$device" \
  "$XENBUS_PATH/physical-device" "$(stat -L -c %t:%T "$device")" "$XENBUS_PATH/hotplug-status" connected
"""
VIF = """#!/bin/sh
[ "$1" = online ] && xenstore-write "$XENBUS_PATH/hotplug-status" connected
exit 0
"""


def xenbus(*words: str, command: tuple[str, ...] = (sys.executable, "-m", "xenbus")) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XEN")}
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@contextmanager
def linux_back_ends() -> Iterator[None]:
    """xen-blkback claims every vbd: it goes again, for the other tests of this dom0."""
    for module in ("xen-blkback", "xen-netback"):
        subprocess.run(["modprobe", module], check=True, timeout=30)
    try:
        yield
    finally:
        for module in ("xen-blkback", "xen-netback"):
            subprocess.run(["modprobe", "-r", module], check=True, timeout=30)


@contextmanager
def loop_device(file: Path) -> Iterator[str]:
    device = "/dev/loop7"
    subprocess.run(["busybox", "losetup", device, str(file)], check=True, timeout=30)
    try:
        yield device
    finally:
        subprocess.run(["busybox", "losetup", "-d", device], check=True, timeout=30)


@asynccontextmanager
async def guest_with_devices(store: Client, folder: Path) -> AsyncIterator[XlGuest]:
    image = folder / "disk.img"
    image.write_bytes(bytes(MIB))
    block, vif = script(folder / "block", BLOCK), script(folder / "vif", VIF)
    with linux_back_ends(), loop_device(image) as device:
        disk = f"script={block},vdev=xvda,access=rw,target={device}"
        devices = f'disk=["{disk}"]\nvif=["script={vif},mac=00:16:3e:01:02:03"]\n'
        async with xl_guest(store, "linux", config=devices) as guest:
            yield guest


def test_a_linux_guest(tmp_path):
    """Its disk is Connected; its network card has no driver in the guest, and a device nobody serves it."""

    async def main():
        store = await Client.connect(STORE)
        async with guest_with_devices(store, tmp_path) as guest:
            domid = guest.domid
            await guest.run(
                "for i in $(seq 100); do [ -b /dev/xvda ] && break; sleep 0.1; done; [ -b /dev/xvda ]"
            )
            unserved = DeviceSpec(DevicePaths("vsnd", 0, domid, 0))
            await write_device(store, unserved)
            try:
                seen = await asyncio.to_thread(xenbus, "tree")
                lines = [line.strip() for line in seen.splitlines()]
                waits = "waits for linux: no front end driver for vif in the guest, or it is not loaded"
                unclaimed = (
                    f"nobody serves {unserved.paths.back}: no driver for back ends of type vsnd "
                    "runs in Domain-0"
                )
                for line in (
                    "Domain-0 (domain 0)",
                    f"linux (domain {domid})",
                    f"vbd-51712 at device/vbd/51712: Connected; "
                    f"backend vbd-{domid}-51712 in Domain-0: Connected",
                    f"vbd-{domid}-51712 at backend/vbd/{domid}/51712: Connected; "
                    "frontend vbd-51712 in linux: Connected",
                    f"vif-0 at device/vif/0: Initialising; "
                    f"backend vif-{domid}-0 in Domain-0: InitWait; {waits}",
                    f"vsnd-0 at device/vsnd/0: Initialising; "
                    f"backend vsnd-{domid}-0 in Domain-0: Initialising; {unclaimed}",
                ):
                    assert line in lines
                (console,) = [line for line in lines if line.startswith(f"console-{domid}-0 ")]
                assert "waits" not in console
                assert not [line for line in lines if line.startswith("!")]
                (tree,) = json.loads(await asyncio.to_thread(xenbus, "tree", "linux", "--json"))
                assert (tree["name"], tree["domid"]) == ("linux", domid)
                assert await asyncio.to_thread(xenbus, "sysctl", "linux/dev.vbd-51712") == (
                    "dev.vbd-51712.xenstore_path: device/vbd/51712\n"
                    "dev.vbd-51712.xenbus_dev_type: vbd\n"
                    "dev.vbd-51712.xenbus_connection_state: Connected\n"
                    "dev.vbd-51712.xenbus_peer_domid: 0\n"
                    f"dev.vbd-51712.xenstore_peer_path: /local/domain/0/backend/vbd/{domid}/51712\n"
                )
                assert "linux" in await asyncio.to_thread(xenbus, "domain", "list")
                assert f"/local/domain/{domid}" in await asyncio.to_thread(
                    xenbus, "store", "ls", "-f", f"/local/domain/{domid}"
                )
            finally:
                await remove_device(store, unserved.paths)
            await xl("block-detach", "linux", "xvda")
            assert "vbd-" not in await asyncio.to_thread(xenbus, "tree", "linux")
        await store.close()

    asyncio.run(main())


@pytest.mark.skipif(not PYZ.exists(), reason="`make pyz` builds it")
def test_the_one_file_says_the_same():
    """Of a device of dom0 to itself, with nothing but dom0's Python; Debian's click and rich do the other."""

    async def main():
        store = await Client.connect(STORE)
        unserved = DeviceSpec(DevicePaths("vsnd", 0, 0, 0))
        await write_device(store, unserved)
        try:
            for words in (("tree",), ("sysctl", "-a"), ("store", "ls", "-f", unserved.paths.back)):
                alone = (sys.executable, "-I", "-S", str(PYZ))
                said = await asyncio.to_thread(xenbus, *words, command=alone)
                assert said == await asyncio.to_thread(xenbus, *words)
                assert "vsnd" in said
        finally:
            await remove_device(store, unserved.paths)
            await store.close()

    asyncio.run(main())
