"""Network devices on a real Xen: Linux's xen-netfront on xnb, xn on Linux's xen-netback, and ours on ours.

`life` is one of each pairing; what is marked `features` is the rest."""

from __future__ import annotations

import asyncio
import signal
import socket
from dataclasses import dataclass, replace

import pytest

from tests.support.dom0 import HANDSHAKE, STORE, dom0
from tests.support.nics import BRIDGE, DOM0_IPV6, Back, Netback, Nic, Seen, Station, Xnb, station, vif
from tests.support.real_xen import dom0_ports
from tests.support.serving import serving
from tests.support.xl_guest import python_guest, xl, xl_guest
from xenbus.toolstack.devices import detach_device, wait_connected, write_device
from xenbus.toolstack.net import NicSpec
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(420)
MAC = "00:16:3e:0a:0b:0c"
ATTACH = ("attach", "net", "--domain", "guest", "--bridge", BRIDGE, "--mac", MAC)


def run(test):
    """With the store; ports, back ends and interfaces are as before when it ends."""

    async def main():
        async with await Client.connect(STORE) as store:
            ports, links = dom0_ports(), socket.if_nameindex()
            await test(store)
            assert dom0_ports() == ports
            assert socket.if_nameindex() == links
            for kind in ("vif", "xnb"):
                path = f"backend/{kind}"
                assert not await store.exists(path) or not await store.directory(path)

    asyncio.run(main())


async def life(tmp_path, nic: Nic, back: Back, here: Station) -> None:
    """Found, used, unplugged and plugged, saved and restored under load, its back end killed under load."""
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
    if isinstance(back, Xnb):  # a kernel is not killed
        for _ in range(2):
            await back.kill_and_start()
            await here.progress()
        assert back.daemon is not None
        assert back.daemon.log.read_text().count("goes on for a process that ended") == 2
    await nic.unload(here)
    await nic.ping()
    await nic.end()


# Of an xl configuration, so that `xl` makes, replugs, saves and restores it. Ours in a guest has the guest's
# own stack behind a TAP.
PAIRINGS = [(xl_guest, Xnb), (python_guest, Netback), (python_guest, Xnb)]
pairings = pytest.mark.parametrize(
    ("make", "kind"), PAIRINGS, ids=["netfront on xnb", "xn on netback", "xn on xnb"]
)


def paired(make, kind, tmp_path, test, mtu=1500, **more):
    """`test(store, nic, back, here)` with the guest, its driver not loaded yet. more: see vif"""
    back = kind(tmp_path / "run")

    async def with_store(store):
        async with (
            station(mtu) as here,
            back.up(),
            make(store, "guest", config=f"vif={[vif(MAC, mtu, **more)]!r}") as guest,
        ):
            await test(store, Nic(guest), back, here)

    run(with_store)


@pairings
def test_a_life(tmp_path, make, kind):
    paired(make, kind, tmp_path, lambda _, *parts: life(tmp_path, *parts))


@pytest.mark.features
@pairings
def test_mtu_9000(tmp_path, make, kind):
    """Frames of one packet each: nothing between the two stacks cuts them."""

    async def test(store, nic, back, here):
        await nic.start()
        await nic.appear(9000)
        before = await nic.packets()
        await nic.ping(8900)
        assert await nic.packets() - before < 25  # 70 are the fragments
        await nic.transfer(here)
        await nic.end()

    paired(make, kind, tmp_path, test, 9000)


@pytest.mark.features
def test_xens_own_script(tmp_path):
    """`vif-bridge`, as an xl configuration that names no script has it; it renames the device."""

    async def test(store, nic, back, here):
        await nic.start()
        await nic.appear()
        await nic.load(here)
        await back.kill_and_start()
        await here.progress()
        await nic.unload(here)
        await nic.end()
        assert "uplink0" in [name for _, name in socket.if_nameindex()]

    paired(xl_guest, Xnb, tmp_path, test, script="vif-bridge", more=",vifname=uplink0")


@pytest.mark.features
def test_attached_and_detached(tmp_path):
    """Of our own type, by our commands, while a guest runs and xen-netback is loaded."""

    async def test(store):
        async with (
            station() as here,
            Netback(tmp_path).up(),  # and has every vif
            serving(tmp_path / "run") as daemon,
            xl_guest(store, "guest") as guest,
        ):
            nic = Nic(guest)
            await nic.start()
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


@pytest.mark.features
def test_handed_over_killed_and_restored(tmp_path):
    """Of our own type, under load: the next process goes on with it, and a restored guest gets it anew."""

    async def test(store):
        async with (
            station() as here,
            serving(tmp_path / "run", "--verbose") as daemon,
            xl_guest(store, "guest") as guest,
        ):
            nic = Nic(guest)
            await nic.start()
            await daemon.command(*ATTACH)
            await nic.appear()
            await nic.load(here)
            for number in (signal.SIGUSR1, signal.SIGKILL, signal.SIGKILL):
                assert await daemon.end(number) in (0, -signal.SIGKILL)
                await daemon.start()
                await here.progress()
            assert daemon.log.read_text().count("goes on for a process that ended") == 3
            before = guest.domid
            await guest.save(tmp_path / "saved")
            await guest.restore(tmp_path / "saved", paused=True)
            await daemon.command(*ATTACH, "--no-wait")
            await xl("unpause", "guest")
            await here.progress()
            await nic.unload(here)
            assert not await store.exists(f"backend/xnb/{before}/0")

    run(test)


ALL = frozenset({"sg", "csum", "ipv6_csum", "gso_tcpv4", "gso_tcpv6"})


@dataclass(frozen=True)
class Offer:
    """What a half of ours does not offer, and what is as well of no use then.

    off: names of offers.Offer
    """

    off: frozenset[str] = frozenset()
    with_it: frozenset[str] = frozenset()
    split: bool = True
    queues: int = 2

    def check(self, name: str, used: set[str]) -> None:
        """Of what the other half made use of while TCP went both ways, over IPv4 and over IPv6."""
        may = ALL - self.off - self.with_it
        must = may - {"sg"}  # whether anything gets longer than a page is TCP's mood
        assert must <= used <= may, (name, used)


GSO = frozenset({"gso_tcpv4", "gso_tcpv6"})
OFFERS = {
    "all": Offer(),
    "no gso": Offer(GSO, frozenset({"sg"})),  # frames of 1500 bytes: nothing else is longer than a page
    "no gso of IPv6": Offer(frozenset({"gso_tcpv6"})),
    "no checksums": Offer(frozenset({"csum", "ipv6_csum"}), GSO | {"sg"}),
    "no checksums of IPv6": Offer(frozenset({"ipv6_csum"}), frozenset({"gso_tcpv6"})),
    "no sg": Offer(frozenset({"sg"}), GSO),
    "one port": Offer(split=False),
    "one queue": Offer(queues=1),
}


def transport(path: str, offer: Offer) -> str:
    """The node of the front's that is there if the offer's ports are."""
    folder = f"{path}/queue-0" if offer.queues > 1 else path
    return f"{folder}/event-channel-tx" if offer.split else f"{folder}/event-channel"


@pytest.mark.features
def test_what_xnb_offers(tmp_path):
    """Each offer of ours off, one device after the other: netfront keeps to it."""

    async def main():
        async with station() as here, dom0() as runtime, xl_guest(runtime.store, "guest", vcpus=2) as guest:
            store, nic = runtime.store, Nic(guest)
            await nic.start()
            for name, offer in OFFERS.items():
                made = NicSpec(guest.domid, mac=MAC, bridge=BRIDGE, queues=offer.queues).device()
                off = {f"xnb-{key.replace('_', '-')}": "0" for key in offer.off}
                if not offer.split:
                    off["xnb-split-event-channels"] = "0"
                spec = replace(made, back={**made.back, **off})
                await write_device(store, spec)
                await wait_connected(store, spec.paths, HANDSHAKE)
                device = runtime.buses[1].devices[f"backend/vif/{guest.domid}/0"]
                seen = Seen(device.driver.cable)
                await nic.appear()
                await nic.transfer(here)
                await nic.transfer(here, DOM0_IPV6)
                # xen-netfront does not look at feature-no-csum-offload: such packets are taken all the same.
                offer.check(name, seen.used - ({"csum"} & offer.off))
                assert (name, device.driver.sysctl()["queues"]()) == (name, offer.queues)
                assert await store.exists(transport(spec.paths.front, offer)), name
                assert not device.driver.counters.rx_errors
                assert not device.driver.counters.tx_errors
                assert await detach_device(store, spec.paths, timeout=HANDSHAKE)
                await nic.vanish()

    asyncio.run(main())


_SET = """
for name, value in given:
    setattr(Xn, name, value)
"""
_LOOK = """
from tests.support.nics import Seen
xn = runtime.buses[0].devices["device/vif/0"].driver
seen = Seen(xn.cable)
"""


@pytest.mark.features
def test_what_xn_offers(tmp_path):
    """The same of our front end: netback keeps to it."""

    async def test(store, nic, back, here):
        guest = nic.guest
        await nic.start()
        for name, offer in OFFERS.items():
            await xl("network-detach", guest.name, "0")
            await nic.vanish()
            attributes = [(key, key not in offer.off) for key in ALL]
            attributes += [("num_queues", offer.queues), ("split_event_channels", offer.split)]
            await guest.call(_SET, given=attributes)
            await xl("network-attach", guest.name, *vif(MAC).split(","))
            await nic.appear()
            await guest.call(_LOOK)
            await nic.transfer(here)
            await nic.transfer(here, DOM0_IPV6)
            offer.check(name, set(await guest.call("sorted(seen.used)")))
            assert (name, await guest.call('xn.sysctl()["queues"]()')) == (name, offer.queues)
            assert await guest.call("xn.counters.rx_errors + xn.counters.tx_errors") == 0, name
            assert await store.exists(transport(f"/local/domain/{guest.domid}/device/vif/0", offer)), name
        await nic.end()

    paired(python_guest, Netback, tmp_path, test)
