"""Two real kernels' stacks with a vif between them: TAP, xn, rings, xnb, TAP. Ping, TCP, UDP, IPv6."""

from __future__ import annotations

import pytest
from tests.drivers.net.test_tap import exercise, transfer
from tests.support import netlab
from tests.support.station import Station
from tests.support.until import until
from tests.support.vif import MAC, rig

from xenbus.bus import XenbusState
from xenbus.drivers.net import Xn, Xnb

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(netlab.missing()), reason=netlab.missing() or "there are"),
]
S = XenbusState
PLAIN = {"sg": False, "csum": False, "ipv6_csum": False}
CASES = {
    "all": ({}, {}, "1500"),
    "jumbo": ({}, {}, "9000"),
    "front takes nothing": (PLAIN, {}, "1500"),
    "back takes nothing": ({}, PLAIN, "1500"),
    "jumbo without offloads": ({"csum": False, "ipv6_csum": False}, {"gso_tcpv4": False}, "9000"),
    "queues": ({"num_queues": 3}, {}, "1500"),
    "one event channel": ({"split_event_channels": False}, {}, "1500"),
    "no notification of pages": ({"rx_notify": False}, {}, "1500"),
}


async def between(name: str) -> dict[str, int]:
    front, back, mtu = CASES[name]
    async with (
        Station() as one,
        Station() as two,
        rig(type("Xn", (Xn,), front), type("Xnb", (Xnb,), back)) as r,
    ):
        await r.plug(
            front_port=f"tap:left?up=0&mac=guest&netns={one.netns}",
            port=f"tap:right?up=0&netns={two.netns}",
            mtu=mtu,
        )
        await r.states(S.CONNECTED, S.CONNECTED)
        await one.ask("up", device="left", address="10.0.0.1")
        await two.ask("up", device="right", address="10.0.0.2")
        await until(lambda: r.front.cable.connected and r.back.cable.carrier)
        link = await one.ask("link", device="left")
        assert link["mac"] == MAC
        assert link["mtu"] == int(mtu)
        await exercise(one, two, r.far)
        # The guest's back end begins anew under the same interfaces.
        await r.world.tool.write(f"{r.bnode}/state", "5")
        await until(lambda: not r.front.cable.connected)
        await until(lambda: r.front.cable.connected)
        await transfer(one, two, "10.0.0.2")
        counted = {"gso": r.near.tx_gso + r.far.tx_gso, "stalls": r.back.counters.tx_stalls}
        for half, driver in (("front", r.front), ("back", r.back)):
            for counter in ("rx_errors", "tx_errors"):
                counted[f"{half} {counter}"] = getattr(driver.counters, counter)
        await r.gone()
        return counted


@pytest.mark.parametrize("name", CASES)
def test_between_kernels(name):
    counted = netlab.run(between, name)
    front, back, _ = CASES[name]
    # A front that never says that there is room is given up, and found to have some with the next packet.
    expected = {"gso"} if front.get("rx_notify", True) else {"gso", "stalls"}
    assert {key: value for key, value in counted.items() if value and key not in expected} == {}
    offloads = {"sg", "csum", "gso_tcpv4"}
    assert bool(counted["gso"]) is not bool(offloads & {*front, *back}), counted
