"""Network devices on a real Xen: Linux's xen-netfront on xnb, our xn on Linux's xen-netback."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.support.dom0 import STORE
from tests.support.net_lab import BRIDGE, Netback, Nic, Station, station, vif
from tests.support.real_xen import dom0_ports
from tests.support.serving import serving
from tests.support.xl_guest import python_guest, xl, xl_guest
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(420)
MAC = "00:16:3e:0a:0b:0c"


def run(test):
    """With the store; ports and back ends are as before when it ends."""

    async def main():
        async with await Client.connect(STORE) as store:
            ports = dom0_ports()
            await test(store)
            assert dom0_ports() == ports
            for kind in ("vif", "xnb"):
                path = f"backend/{kind}"
                assert not await store.exists(path) or not await store.directory(path)

    asyncio.run(main())


ATTACH = ("attach", "net", "--domain", "guest", "--bridge", BRIDGE, "--mac", MAC)


def test_netfront_on_xnb(tmp_path):
    """Of our own type: attached and detached by our commands, while a guest runs."""

    async def test(store):
        async with (
            station() as here,
            serving(tmp_path / "run") as daemon,
            xl_guest(store, "guest") as guest,
        ):
            nic = Nic(guest)
            for _ in range(2):  # plugged, unplugged, plugged again
                assert f"backend/xnb/{guest.domid}/0" in await daemon.command(*ATTACH)
                await nic.appear()
                await nic.ping()
                await nic.transfer(here)
                tree = await daemon.command("tree")
                assert f"xnb0 at backend/xnb/{guest.domid}/0: Connected" in tree
                await daemon.command("detach", "guest/vif0")
                await nic.vanish()

    run(test)


async def life(nic: Nic, here: Station, tmp_path) -> None:
    """Found, used, unplugged and plugged, saved and restored under load."""
    guest = nic.guest
    await nic.start()
    await nic.appear()
    await nic.ping()
    await nic.transfer(here)
    await xl("network-detach", guest.name, "0")
    await nic.vanish()
    await xl("network-attach", guest.name, *vif(MAC).split(","))
    await nic.appear()
    await nic.load(here)
    await guest.save(tmp_path / "saved")
    await guest.restore(tmp_path / "saved")
    await here.progress()
    await nic.unload(here)
    await nic.ping()
    await nic.end()


@pytest.mark.features  # long
def test_xn_on_netback(tmp_path):
    """Ours in a guest, with the guest's own stack behind a TAP, on Linux's back end."""

    async def test(store):
        async with AsyncExitStack() as stack:
            here = await stack.enter_async_context(station())
            await stack.enter_async_context(Netback().up())
            made = python_guest(store, "ours", config=f"vif={[vif(MAC)]!r}")
            await life(Nic(await stack.enter_async_context(made)), here, tmp_path)

    run(test)
