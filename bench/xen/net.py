"""A guest's network devices: one guest has all of them at the same time, each with a bridge of its own.

Knows the guest's shell, dom0's bridges, and iperf3's words.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from tests.support.xl_guest import XlGuest, xl_guest

from bench.xen.net_backends import BACKENDS, DEFAULT, Nic
from bench.xen.processes import process, run
from bench.xen.rounds import Load, Part, Served, Turns, say
from xenbus.xenstore.client import Client

STORE = "/dev/xen/xenbus"
DATAGRAM = 18  # bytes: with UDP's, IP's and Ethernet's headers a frame of 60, the least there is
WARM_UP = 1  # seconds in which a load comes up to speed; iperf3 leaves them out
PATIENCE = 20  # seconds that iperf3 may take besides
WAIT = 60.0  # seconds for a device in the guest


def loads(quick: bool) -> list[Load]:
    seconds = 2 if quick else 5
    rows = []
    for direction, option in (("guest to dom0", ""), ("dom0 to guest", "-R")):
        # Its report comes once, without the figures of each second in it.
        client = (
            f"timeout -s KILL {seconds + WARM_UP + PATIENCE} iperf3 --client {{}} --json --interval 0 "
            f"--time {seconds} --omit {WARM_UP} --connect-timeout 5000 {option}"
        )
        rows.append(Load(f"TCP, {direction}", client, "MB/s", _megabytes))
        # As fast as the sender can; what does not arrive is not counted.
        udp = f"{client} --udp --bitrate 0 --length {DATAGRAM}"
        rows.append(Load(f"UDP of {DATAGRAM} bytes, {direction}", udp, "k/s", _datagrams))
    return rows


def _megabytes(said: str) -> float:
    return _bytes_per_second(said) / 1e6


def _datagrams(said: str) -> float:
    return _bytes_per_second(said) / DATAGRAM / 1e3


def _bytes_per_second(said: str) -> float:
    """That its receiver had, by the receiver's clock."""
    received = json.loads(said[said.index("{") : said.rindex("}") + 1])["end"]["sum_received"]
    return float(received["bytes"]) / float(received["seconds"])


async def measure(options: Namespace, names: Sequence[str], turns: Turns) -> None:
    served: dict[str, Served] = {}

    def server() -> AbstractAsyncContextManager[object]:
        """A new one for each load: nothing of one that failed is left."""
        log = options.results / "iperf3.log"
        return process("iperf3", "--server", "--forceflush", log=log, ready="Server listening")

    async with await Client.connect(STORE) as store, AsyncExitStack() as stack:
        await run("modprobe", "-a", "tun", "bridge")
        guest = await stack.enter_async_context(xl_guest(store, "net", memory=384))
        await guest.run("load network")
        say(f"{guest.name} is up")
        for number, name in enumerate(names):
            nic = Nic(number)
            await stack.enter_async_context(bridge(nic))
            pid = await stack.enter_async_context(BACKENDS[name](store, guest.domid, nic, options))
            served[name] = Served(nic.dom0, pid)
            await configure(guest, nic)
            say(f"{name} serves {nic.mac}")
        await turns.run(guest, served, server)
        (options.results / f"{guest.name}.log").write_text(guest.said)


@asynccontextmanager
async def bridge(nic: Nic) -> AsyncIterator[None]:
    """With dom0's address on it: dom0's own stack is the other end."""
    await run("ip", "link", "add", nic.bridge, "type", "bridge")
    try:
        await run("ip", "addr", "add", f"{nic.dom0}/24", "dev", nic.bridge)
        await run("ip", "link", "set", nic.bridge, "up")
        yield
    finally:
        await run("ip", "link", "del", nic.bridge)


async def configure(guest: XlGuest, nic: Nic) -> None:
    """The guest's end has its address, and dom0 answers."""
    tries = int(WAIT) * 5
    found = f"dev=$(grep -l {nic.mac} /sys/class/net/*/address | cut -d/ -f5)"
    await guest.run(
        f'for i in $(seq {tries}); do {found}; [ "$dev" ] && break; sleep 0.2; done; [ "$dev" ]', WAIT * 2
    )
    await guest.run(f"ip addr add {nic.guest}/24 dev $dev && ip link set $dev up")
    # The first ones may go before the bridge forwards.
    ping = f"ping -c 1 -W 1 {nic.dom0}"
    await guest.run(f"for i in $(seq {int(WAIT)}); do {ping} >/tmp/ping && break; done; {ping}", WAIT * 2)


NET = Part("xnb", BACKENDS, DEFAULT, "iperf3", loads, measure)
