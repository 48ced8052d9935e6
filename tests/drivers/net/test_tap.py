"""TAP devices between real kernels' stacks: two network namespaces, and what is between them is ours."""

import asyncio
import contextlib
import ctypes
import fcntl
import logging
import os
import struct
from pathlib import Path

import pytest
from tests.support import netlab
from tests.support.net_ends import Sink, frame, station, up
from tests.support.station import Station, Talker
from tests.support.until import descriptors, until

from xenbus.drivers.net.frames import is_valid, lower
from xenbus.drivers.net.packet import ALL, PLAIN, Link, Offloads, Packet
from xenbus.drivers.net.ports import PortError, open_port
from xenbus.drivers.net.ports.registry import parse_target
from xenbus.drivers.net.ports.schemes.tap import TapOptions
from xenbus.drivers.net.ports.tun import TUNSETIFF
from xenbus.errors import UsageError

SIZE = 4 << 20


@contextlib.asynccontextmanager
async def two_stations(options="", other=""):
    """Both with a TAP each, addresses 10.0.0.1 and .2 set; the TAPs are not started."""
    async with Station() as one, Station() as two:
        left = await open_port(f"tap:left?up=0&netns={one.netns}{options}")
        right = await open_port(f"tap:right%d?up=0&netns={two.netns}{other or options}")
        try:
            await one.ask("up", device="left", address="10.0.0.1")
            await two.ask("up", device=right.interface, address="10.0.0.2")
            yield one, two, left, right
        finally:
            await left.close()
            await right.close()


async def transfer(sender, receiver, host, family="inet", size=SIZE):
    port = await receiver.ask("listen", family=family)
    sent = await sender.ask("push", host=host, port=port, size=size)
    assert await receiver.ask("heard") == {"sha256": sent, "bytes": size}


async def link_local(station, device):
    async with asyncio.timeout(10):
        while not (address := (await station.ask("link", device=device))["inet6"]):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return address


async def exercise(one, two, right):
    assert await one.ask("ping", host="10.0.0.2") == 3
    await transfer(one, two, "10.0.0.2")
    await transfer(two, one, "10.0.0.1")
    port = await two.ask("udp_serve")
    assert await one.ask("udp_ask", host="10.0.0.2", port=port, size=1400, count=50) == 50
    # The kernel gives them some time after the link was up.
    await link_local(one, "left")
    address = await link_local(two, right.interface)
    await transfer(one, two, address.replace(right.interface, "left"), "inet6")


class Between:
    """The End that a TAP sees: passes on to another one, after `change`."""

    def __init__(self, other, offloads, change=lambda packet: [packet], mtu=1500):
        self.other, self.offloads, self.change, self.mtu = other, offloads, change, mtu
        self.packets = 0

    def send(self, packets):
        passed = [made for packet in packets for made in self.change(packet)]
        self.packets += len(passed)
        assert self.other.send(passed) == len(passed)
        return len(packets)

    def ready(self):
        self.other.ready()

    def link(self, link):
        self.other.link(None if link is None else Link(self.offloads, self.mtu))


def join(left, right, offloads=ALL, change=lambda packet: [packet], mtu=1500):
    """What `left` reads goes to `right` and the other way; each is told of `offloads`."""
    ends = Between(right, offloads, change, mtu), Between(left, offloads, change, mtu)
    left.start(ends[0])
    right.start(ends[1])
    return ends


async def straight():
    async with two_stations() as (one, two, left, right):
        left.start(right)  # a port is an End, too
        right.start(left)
        await exercise(one, two, right)
        return left.counters(), right.counters()


def test_a_plain_copier_passes_large_segments_through():
    for counted in netlab.run(straight):
        assert counted["rx_gso"] and counted["tx_gso"]
        # Far fewer packets than segments: three transfers of SIZE in all.
        assert counted["rx_packets"] + counted["tx_packets"] < 3 * SIZE / 4000
        assert not counted["tx_errors"] and not counted["tx_dropped"]


async def switched():
    async with two_stations() as (one, two, left, right):
        ports = [await open_port("switch:lan") for _ in range(3)]
        listener = Sink()
        ports[2].start(listener)
        ports[2].link(up())
        for tap, port in zip((left, right), ports, strict=False):
            tap.start(port)
            port.start(tap)
        await exercise(one, two, right)
        for packet in listener.got:  # what was flooded came without offloads
            assert not packet.csum_blank and is_valid(packet.data) is not False
        counted = [port.counters() for port in ports]
        for port in ports:
            await port.close()
        return counted


def test_a_switch_between_them():
    left, right, listener = netlab.run(switched)
    assert left["rx_dropped"] == right["rx_dropped"] == 0
    assert left["addresses"] == right["addresses"] == 1
    assert 0 < listener["rx_packets"] < 100 < left["rx_packets"]


async def uplinked():
    """A guest's stack on a switch, and one behind the switch's uplink."""
    async with Station() as one, Station() as two:
        guest = await open_port(f"tap:eth0?up=0&mac=guest&netns={one.netns}")
        port = await open_port(f"switch:lan?source=own&uplink=tap:up0?netns={two.netns}")
        guest.start(port)
        port.start(guest)
        await until(lambda: port.peer and guest._link)
        for end in (guest, port):  # what a driver between them would say
            end.link(up(ALL, mac=station(3)))
        await one.ask("up", device="eth0", address="10.0.0.1")
        await two.ask("up", device="up0", address="10.0.0.2")
        assert await one.ask("ping", host="10.0.0.2") == 3
        await transfer(one, two, "10.0.0.2")
        await transfer(two, one, "10.0.0.1")
        mtu = (await two.ask("link", device="up0"))["mtu"]
        spoofed = port.spoofed
        await guest.close()
        await port.close()
        with pytest.raises(RuntimeError, match="No such device"):
            await two.ask("link", device="up0")
        return [mtu, spoofed]


def test_an_uplink_of_a_switch():
    assert netlab.run(uplinked) == [1500, 0]


async def lowered(by_us: str):
    async with two_stations() as (one, two, left, right):
        plain = []

        def seen(packet):
            plain.append(not packet.csum_blank and not packet.gso and is_valid(packet.data) is not False)
            return [packet]

        if by_us == "by us":
            ends = join(left, right, ALL, lambda packet: lower(packet, PLAIN))
        else:
            ends = join(left, right, PLAIN, seen)
        await exercise(one, two, right)
        return {
            "packets": sum(end.packets for end in ends),
            "plain": all(plain),
            "read": left.rx_gso + right.rx_gso,
            "errors": left.tx_errors + right.tx_errors + left.tx_dropped + right.tx_dropped,
        }


def test_segments_and_checksums_of_ours_are_right_for_a_real_stack():
    found = netlab.run(lowered, "by us")
    assert found["read"] and not found["errors"]
    assert found["packets"] > 3 * SIZE / 1500  # they were cut


def test_a_driver_without_offloads_gets_plain_packets_from_the_kernel():
    found = netlab.run(lowered, "by the kernel")
    assert found["plain"] and not found["read"] and not found["errors"]
    assert found["packets"] > 3 * SIZE / 1500


async def jumbo():
    async with two_stations("&queues=2", "&mtu=9000&queues=2") as (one, two, left, right):
        join(left, right, mtu=9000)
        await until(lambda: left._link and right._link)
        links = await one.ask("link", device="left"), await two.ask("link", device=right.interface)
        assert await one.ask("ping", host="10.0.0.2", size=8900) == 3
        await transfer(one, two, "10.0.0.2")
        return [link["mtu"] for link in links]


def test_large_frames_and_several_queues():
    """One of them follows the driver's MTU, the other one was told."""
    assert netlab.run(jumbo) == [9000, 9000]


async def running(one, wanted):
    """What `ip link` would say once the carrier is that: the kernel tells it a second later at most."""
    async with asyncio.timeout(10):
        while (link := await one.ask("link", device="left"))["running"] is not wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return link


async def life():
    """Carrier, address and MTU as the driver's link goes up, changes and goes down; a device that goes."""
    async with Station() as one:
        port = await open_port(f"tap:left?netns={one.netns}&mac=guest")
        driver = Sink()
        port.start(driver)
        await until(lambda: driver.links)
        seen = [await running(one, False)]
        port.link(up(mtu=1400, mac=station(7)))
        seen.append(await running(one, True))
        port.link(up(mtu=1300, mac=station(7)))
        seen.append(await running(one, True))
        port.link(None)
        seen.append(await running(one, False))
        await port.close()
        await port.close()
        with pytest.raises(RuntimeError, match="No such device"):
            await one.ask("link", device="left")
        return [(link["up"], link["mtu"], link["mac"] == "00:16:3e:00:00:07") for link in seen]


@pytest.mark.slow
def test_the_device_follows_the_drivers_link():
    down, first, second, again = netlab.run(life)
    assert down == [True, 1500, False]
    assert first == [True, 1400, True] and second == again == [True, 1300, True]


def numbers(driver):
    """Of the frames that a station injected."""
    return [int.from_bytes(data[14:60], "big") for data in driver.frames if data[12:14] == b"\x88\xb5"]


async def pressure():
    """A driver without room keeps the TAP unread, and gets everything in order when it has room again."""
    async with Station() as one:
        port = await open_port(f"tap:left?netns={one.netns}")
        driver = Sink(room=0)
        port.start(driver)
        port.link(up())
        await one.ask("up", device="left")
        await one.ask("inject", device="left", count=200)
        await until(lambda: driver.batches)
        await one.ask("inject", device="left", count=200, first=200)
        for _ in range(3):
            await until(lambda: port._rest)
            tried = len(driver.batches)
            driver.room = 10
            for _ in range(5):
                await asyncio.sleep(0)
            # Nothing is offered until `ready`, whatever the kernel has.
            assert len(driver.batches) == tried and not port._reading
            port.ready()
            assert driver.room == 0 or not port._rest
            driver.room = 0
        driver.room = 1 << 30
        port.ready()
        await until(lambda: len(numbers(driver)) >= 400)
        return numbers(driver) == list(range(400))


def test_back_pressure():
    assert netlab.run(pressure)


async def sent_wrong():
    async with Station() as one:
        port = await open_port(f"tap:left?netns={one.netns}")
        port.start(Sink())
        port.link(up())
        sent = [Packet(frame(b"\xff" * 6, station(9), n.to_bytes(46, "big"))) for n in range(200)]
        assert port.send(sent) == 200
        tx = port.counters()["tx_packets"]
        port.send([Packet(b"short"), Packet(sent[0].data, csum_blank=True)])
        await port.close()
        assert port.send(sent) == 200 and port.counters()["tx_packets"] == tx
        return [tx, port.tx_dropped, port.tx_errors]


def test_packets_that_are_none_are_counted():
    """Two of them: one has less than a header, the other one's checksum is nowhere."""
    assert netlab.run(sent_wrong) == [200, 1, 1]


async def deleted():
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("xenbus").addHandler(handler)
    async with Station() as one:
        before = descriptors()
        port = await open_port(f"tap:left?netns={one.netns}")
        driver = Sink()
        port.start(driver)
        port.link(up())
        await one.ask("inject", device="left", count=1)
        await until(lambda: numbers(driver))
        await one.ask("delete", device="left")
        await until(lambda: driver.links[-1] is None)
        # The guest goes on, and comes back with another connection: nothing turns round on the dead device.
        sent = [Packet(frame(b"\xff" * 6, station(9)))] * 64
        assert port.send(sent) == 64
        for link in (None, up()):
            port.link(link)
        assert port.send(sent) == 64
        port.ready()
        assert not port._reading and driver.links[-1] is None
        await port.close()
        return [said, port.counters()["tx_errors"], len(descriptors() - before)]


def test_a_device_that_somebody_deletes():
    said, errors, left = netlab.run(deleted)
    assert len(said) == 1 and "tap left: somebody deleted it" in said[0]
    assert (errors, left) == (128, 0)


async def bridged():
    async with Station() as one, Station() as two:
        try:
            await one.ask("bridge", name="br0")
        except RuntimeError as error:
            return f"no bridges here: {error}"
        left = await open_port(f"tap:left?netns={one.netns}&bridge=br0")
        right = await open_port(f"tap:right?netns={two.netns}")
        left.start(right)
        right.start(left)
        await one.ask("up", device="br0", address="10.0.0.1")
        await two.ask("up", device="right", address="10.0.0.2")
        assert await two.ask("ping", host="10.0.0.1") == 3
        mac = (await one.ask("link", device="left"))["mac"]
        for each in (left, right):
            await each.close()
        return mac


def test_into_a_bridge():
    found = netlab.run(bridged)
    if found.startswith("no bridges"):
        pytest.skip(found)
    assert found == "fe:ff:ff:ff:ff:ff"


async def kept():
    """What others set of a kept device is there for the next process; an orderly end takes it away."""
    async with Station() as one:
        target = f"tap:left?netns={one.netns}&mtu=1400&keep=1"
        await (await open_port(target)).close(leave=True)
        await one.ask("up", device="left", address="10.0.0.1")  # as a hotplug script does once
        left = await one.ask("link", device="left")
        killed = await open_port(target)
        for fd in killed._device.fds:  # all that is left of a process that was killed
            os.close(fd)
        killed._device.fds.clear()
        await killed.close()
        port = await open_port(target)
        again = await one.ask("link", device="left")
        await port.close()
        with pytest.raises(RuntimeError, match="No such device"):
            await one.ask("link", device="left")
        await (await open_port(target.replace("&keep=1", ""))).close(leave=True)
        with pytest.raises(RuntimeError, match="No such device"):
            await one.ask("link", device="left")
        return [left, again]


def test_a_kept_device_outlives_the_process():
    left, again = netlab.run(kept)
    assert left["up"] and again["up"] and left["mac"] == again["mac"]  # a new one would have another address


async def refused():
    said = {}
    before = len(descriptors())
    taken = await open_port("tap:taken")
    for target in (
        "tap:taken",
        "tap:lo",
        "tap:new?bridge=nowhere",
        "tap:new?bridge=lo",
        "tap:new?netns=nobody",
        "tap:new?netns=/dev/null",
        "tap:new?netns=/proc/1/ns/net",
    ):
        try:
            await open_port(target)
        except PortError as error:
            said[target] = str(error)
    await taken.close()
    left = len(descriptors()) - before
    return [said, left]


def test_what_the_kernel_refuses_says_what_to_do():
    said, left = netlab.run(refused)
    assert left == 0
    assert "EBUSY" in said["tap:taken"] and "open elsewhere" in said["tap:taken"]
    assert "no TAP device" in said["tap:lo"]
    assert (
        "bridge 'nowhere'" in said["tap:new?bridge=nowhere"] and "ip link" in said["tap:new?bridge=nowhere"]
    )
    assert "no bridge" in said["tap:new?bridge=lo"]
    assert "/run/netns/nobody" in said["tap:new?netns=nobody"]
    assert "EINVAL" in said["tap:new?netns=/dev/null"]
    assert len(said) == 7


async def unprivileged():
    try:
        await open_port("tap:mine")
    except PortError as error:
        return str(error)


def test_without_rights_it_says_how_to_do_without():
    """Root of a user namespace alone, in a network namespace that is not its own."""
    said = netlab.run(unprivileged, namespaces="-Ur")
    assert "EPERM" in said and "ip tuntap add dev mine mode tap user 0" in said


async def made_beforehand():
    """As docs/net-ports.md says: root makes the device and sets it up, and has no part in it afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"mine", 0x1002))
    fcntl.ioctl(tun, 0x400454CB, 1)  # TUNSETPERSIST
    fcntl.ioctl(tun, 0x400454CC, os.geteuid())  # TUNSETOWNER
    os.close(tun)
    Talker().up("mine")
    # capset(2): no capability left.
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    assert libc.capset(header, none) == 0
    said = {}
    for target in ("tap:other", "tap:mine?mac=00:16:3e:00:00:01", "tap:mine?mtu=9000"):
        try:
            await open_port(target)
        except PortError as error:
            said[target] = str(error)
    for _ in range(2):  # it stays
        port = await open_port("tap:mine")
        driver = Sink()
        port.start(driver)
        port.link(up(mtu=1400))
        assert port.send([Packet(frame(b"\xff" * 6, station(9)))]) == 1
        assert port.counters()["tx_packets"] == 1
        await port.close()
    return said


def test_a_device_that_was_made_for_us_needs_no_root():
    said = netlab.run(made_beforehand)
    assert len(said) == 3 and all("EPERM" in text for text in said.values())
    assert "setting the address of mine" in said["tap:mine?mac=00:16:3e:00:00:01"]
    assert "it needs root" in said["tap:mine?mtu=9000"]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("tap:" + "x" * 16, "no name of a network device"),
        ("tap:a b", "no name"),
        ("tap:a/b", "no name"),
        ("tap:a%s", "no other"),
        ("tap:a%d%d", "one `%d`"),
        ("tap:a?bridge=b/c", "no name"),
        ("tap:a?mac=nonsense", "no MAC"),
        ("tap:a?mac=01:00:5e:00:00:01", "group"),
        ("tap:a?mac=00:00:00:00:00:00", "nobody"),
        ("tap:a?mtu=67", "from 68"),
        ("tap:a?mtu=x", "from 68"),
        ("tap:a?queues=0", "from 1"),
        ("tap:a?queues=99", "to 16"),
        ("tap:a?keep=yes", "from 0"),
        ("tap:a?colour=red", "unknown option colour"),
    ],
)
def test_options_are_checked(target, text):
    with pytest.raises(UsageError, match=text):
        TapOptions.of(parse_target(target))


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch])
def test_a_namespace_that_is_none(make, tmp_path):
    make(tmp_path / "it")

    async def main():
        with pytest.raises(PortError, match=r"EINVAL|EPERM"):
            await open_port(f"tap:left?netns={tmp_path / 'it'}")

    asyncio.run(main())


def test_options():
    found = TapOptions.of(
        parse_target("tap:?bridge=br0&netns=n&mac=00-16-3E-00-00-01&mtu=9000&queues=4&up=0")
    )
    assert found == TapOptions("tap%d", "br0", "n", bytes.fromhex("00163e000001"), False, 9000, 4, False)
    assert Offloads() == PLAIN
