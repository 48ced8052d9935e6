"""Network devices in the lab: a bridge with a station behind it, back ends, guests' ends. No test here.

An end is driven by shell, whoever's it is: xen-netfront's `eth0`, or the TAP device behind our xn, which is
called `eth0` too.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.serving import Daemon, serving
from tests.support.xl_guest import Guest, PythonGuest, program
from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.netif import PAGE_SIZE
from xenbus.drivers.net.packet import Gso, Packet

BRIDGE = "xenbr0"
DOM0, DOM0_IPV6 = "10.7.0.1", "fd07::1"
GUEST, GUEST_IPV6 = "10.7.0.2", "fd07::2"
IPV6 = b"\x86\xdd"  # as Ethernet has it
SINK, SOURCE, FLOOD = 5001, 5002, 5003
SIZE = 2 << 20
WAIT = 120.0  # seconds for a transfer, a handshake, under emulation
SCRIPTS = Path("/etc/xen/scripts")
SCRIPT = "vif-lab"
# What a hotplug script is for, and no more.
SCRIPT_TEXT = """#!/bin/sh
if [ "$1" = online ]; then
  mtu=$(xenstore-read "$XENBUS_PATH/mtu" 2>/dev/null) && ip link set "$vif" mtu "$mtu"
  ip link set "$vif" master "$(xenstore-read "$XENBUS_PATH/bridge")" &&
  ip link set "$vif" up &&
  xenstore-write "$XENBUS_PATH/hotplug-status" connected
fi
"""


class Station:
    """Three TCP ports of dom0: SINK takes what comes, SOURCE sends `data`, FLOOD sends it until `stop`."""

    def __init__(self, size: int) -> None:
        self.data = random.Random(5).randbytes(size)
        self.digest = hashlib.sha256(self.data).hexdigest()
        self.taken: asyncio.Queue[str] = asyncio.Queue()  # SHA-256 of each stream that SINK had to its end
        self.sent: asyncio.Queue[str] = asyncio.Queue()  # of each that FLOOD sent
        self.got = 0  # bytes that SINK has read so far
        self.given = 0  # bytes that FLOOD has got rid of so far
        self.stop = asyncio.Event()
        self.moved = asyncio.Condition()

    async def sink(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sha = hashlib.sha256()
        while piece := await reader.read(1 << 18):
            sha.update(piece)
            await self._count(got=len(piece))
        self.taken.put_nowait(sha.hexdigest())
        writer.close()

    async def source(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.data)
        await writer.drain()
        writer.close()

    async def flood(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sha, at, step = hashlib.sha256(), 0, 1 << 16
        while not self.stop.is_set():
            piece = self.data[at : at + step]
            at = (at + step) % len(self.data)
            writer.write(piece)
            await writer.drain()
            sha.update(piece)
            await self._count(given=len(piece))
        self.sent.put_nowait(sha.hexdigest())
        writer.close()

    async def progress(self, count: int = 1 << 20) -> None:
        """Until so many more bytes have come, and have gone."""
        got, given = self.got + count, self.given + count
        async with asyncio.timeout(WAIT), self.moved:
            await self.moved.wait_for(lambda: self.got >= got and self.given >= given)

    async def _count(self, got: int = 0, given: int = 0) -> None:
        async with self.moved:
            self.got += got
            self.given += given
            self.moved.notify_all()


@asynccontextmanager
async def station(mtu: int = 1500, size: int = SIZE) -> AsyncIterator[Station]:
    """The bridge with dom0's address on it, and the ports; all of it is gone afterwards."""
    SCRIPTS.mkdir(parents=True, exist_ok=True)
    (SCRIPTS / SCRIPT).write_text(SCRIPT_TEXT)
    (SCRIPTS / SCRIPT).chmod(0o755)
    await program("modprobe", "-a", "tun", "bridge")
    await program("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        await program("ip", "link", "set", BRIDGE, "mtu", str(mtu))  # said so, it follows no port's
        await program("ip", "addr", "add", f"{DOM0}/24", "dev", BRIDGE)
        await program("ip", "addr", "add", f"{DOM0_IPV6}/64", "dev", BRIDGE, "nodad")
        await program("ip", "link", "set", BRIDGE, "up")
        here = Station(size)
        async with (
            await asyncio.start_server(here.sink, None, SINK),
            await asyncio.start_server(here.source, None, SOURCE),
            await asyncio.start_server(here.flood, None, FLOOD),
        ):
            yield here
            here.stop.set()
    finally:
        await program("ip", "link", "del", BRIDGE)


class Xnb:
    """`xenbus serve --claim vif`, which can be killed and started again under its guests."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.daemon: Daemon | None = None

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        async with serving(self.run, "--claim", "vif", "--verbose") as self.daemon:
            yield

    async def kill_and_start(self) -> None:
        assert self.daemon is not None
        await self.daemon.kill()
        await self.daemon.start()


class Netback:
    """Linux's own, which is unloaded afterwards: it would have every vif."""

    def __init__(self, run: Path) -> None:
        self.run = run

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        await program("modprobe", "xen-netback")
        try:
            yield
        finally:
            await program("modprobe", "-r", "xen-netback")


Back = Xnb | Netback

_START = """
import logging
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s")
from xenbus.bus import Side
from xenbus.domain.native import Served, native_runtime
from xenbus.drivers.net.xn import Xn
Xn.default_port = "tap:eth0?mac=guest"
runtime = await native_runtime(Served(frozenset({Side.FRONT}), frozenset({"vif"})))
await runtime.start()
"""


class Nic:
    """The guest's end, and the transfers that it makes with the station."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    async def start(self) -> None:
        """The guest's driver is there from now on."""
        if isinstance(self.guest, PythonGuest):
            await self.guest.run("modprobe tun")
            await self.guest.call(_START, WAIT)
        else:
            await self.guest.run("load network")

    async def end(self) -> None:
        """Of ours: in order; then the process goes, with whatever it has of a life before a restore."""
        if isinstance(self.guest, PythonGuest):
            await self.guest.call("await runtime.stop()", WAIT)
            await self.guest.restart()
        said = await self.guest.run("dmesg")
        assert "BUG" not in said and "WARNING" not in said, said[-3000:]

    async def until(self, test: str) -> None:
        line = f"for i in $(seq {int(WAIT * 5)}); do {test} && break; sleep 0.2; done; {test}"
        await self.guest.run(line, WAIT + 30)

    async def appear(self, mtu: int = 1500) -> None:
        """It is there, has its addresses and a carrier."""
        await self.until("[ -e /sys/class/net/eth0 ]")
        await self.guest.run(
            "echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; "
            f"ip link set eth0 mtu {mtu} up; ip addr add {GUEST}/24 dev eth0; "
            f"ip addr add {GUEST_IPV6}/64 dev eth0"
        )
        await self.until("[ $(cat /sys/class/net/eth0/carrier) = 1 ]")

    async def vanish(self) -> None:
        await self.until("[ ! -e /sys/class/net/eth0 ]")

    async def ping(self, size: int = 56) -> None:
        """From both sides. The first ones may go before the bridge knows who is where."""
        await self.until(f"ping -c 1 -W 2 {DOM0} >/tmp/ping")
        said = await self.guest.run(f"ping -c 5 -i 0.2 -s {size} -W 10 {DOM0}")
        assert " 0% packet loss" in said, said
        said = await program("busybox", "ping", "-c", "5", "-i", "0.2", "-s", str(size), "-W", "10", GUEST)
        assert " 0% packet loss" in said, said

    async def packets(self) -> int:
        """That it has received so far."""
        return int(await self.guest.run("cat /sys/class/net/eth0/statistics/rx_packets"))

    async def transfer(self, here: Station, dom0: str = DOM0) -> None:
        """TCP both ways, one after the other, by checksum."""
        said = await self.guest.run(f"nc {dom0} {SOURCE} </dev/null | sha256sum", WAIT)
        assert said.split()[0] == here.digest
        await self.guest.run("dd if=/dev/urandom of=/tmp/new bs=64k count=32 2>/dev/null")
        await self.guest.run(f"nc {dom0} {SINK} </tmp/new", WAIT)
        taken = await asyncio.wait_for(here.taken.get(), WAIT)
        assert (await self.guest.run("sha256sum /tmp/new")).split()[0] == taken

    async def load(self, here: Station) -> None:
        """Two TCP connections, one each way, that last until `unload`."""
        await self.guest.run(
            "rm -f /tmp/stop /tmp/fifo; mkfifo /tmp/fifo; dd if=/dev/urandom of=/tmp/new bs=64k count=16 "
            "2>/dev/null; (sha256sum </tmp/fifo >/tmp/up) </dev/null >/dev/null 2>&1 & "
            "((while [ ! -e /tmp/stop ]; do cat /tmp/new; done) | tee /tmp/fifo | "
            f"nc {DOM0} {SINK}) </dev/null >/dev/null 2>&1 & "
            f"(nc {DOM0} {FLOOD} </dev/null | sha256sum >/tmp/down) >/dev/null 2>&1 & true"
        )
        await here.progress()

    async def unload(self, here: Station) -> None:
        """Both had every byte, in order."""
        here.stop.set()
        await self.guest.run("touch /tmp/stop")
        taken = await asyncio.wait_for(here.taken.get(), WAIT)
        sent = await asyncio.wait_for(here.sent.get(), WAIT)
        await self.until("[ -s /tmp/up ] && [ -s /tmp/down ]")
        assert (await self.guest.run("cat /tmp/up")).split()[0] == taken
        assert (await self.guest.run("cat /tmp/down")).split()[0] == sent
        here.stop.clear()


def vif(mac: str, mtu: int = 1500, script: str = SCRIPT, more: str = "") -> str:
    """A line of an xl configuration's `vif`."""
    return f"mac={mac},bridge={BRIDGE},script={script}{more}" + (f",mtu={mtu}" if mtu != 1500 else "")


class Seen:
    """What the other half makes use of, of what ours offers: stands before the `send` of our port."""

    def __init__(self, cable: Cable) -> None:
        assert cable.port is not None
        self._send = cable.port.send
        cable.port.send = self._look  # type: ignore[method-assign]
        self.used: set[str] = set()  # by the names of offers.Offer

    def _look(self, packets: Sequence[Packet]) -> int:
        for packet in packets:
            if packet.csum_blank:
                self.used.add("ipv6_csum" if packet.data[12:14] == IPV6 else "csum")
            if packet.gso is not Gso.NONE:
                self.used.add(f"gso_{packet.gso.name.lower()}")
            if len(packet.data) > PAGE_SIZE:
                self.used.add("sg")
        return self._send(packets)
