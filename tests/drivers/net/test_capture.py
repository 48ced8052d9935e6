"""Captures, read back by a reader of their own; and by tshark where there is one."""

import asyncio
import shutil
import stat
import struct
import subprocess

import pytest
from tests.support.full_disk import files_of_at_most
from tests.support.net_ends import BROADCAST, Sink, frame, station, up

from xenbus.drivers.net import capture
from xenbus.drivers.net.capture import PcapngWriter
from xenbus.drivers.net.packet import Packet
from xenbus.drivers.net.ports import PortError, open_port
from xenbus.errors import UsageError

A = station(1)
FRAMES = [frame(BROADCAST, A, bytes([n]) * (46 + n)) for n in range(7)]


def blocks(data):
    """(type, body) of each, lengths checked (section 3.1 of the draft)."""
    at = 0
    while at < len(data):
        kind, length = struct.unpack_from("<II", data, at)
        assert length % 4 == 0 and struct.unpack_from("<I", data, at + length - 4)[0] == length
        yield kind, data[at + 8 : at + length - 4]
        at += length


def options(data):
    found, at = {}, 0
    while True:
        code, length = struct.unpack_from("<HH", data, at)
        if code == 0:
            assert length == 0 and at + 4 == len(data)
            return found
        found[code] = data[at + 4 : at + 4 + length]
        at += 4 + length + -length % 4


def read(path):
    """[(nanoseconds, direction, frame)]; the first two blocks are checked."""
    (shb, section), (idb, interface), *rest = blocks(path.read_bytes())
    assert (shb, idb) == (0x0A0D0D0A, 1)
    assert struct.unpack_from("<IHHq", section) == (0x1A2B3C4D, 1, 0, -1)
    assert struct.unpack_from("<HHI", interface) == (1, 0, 0xFFFF)
    assert options(interface[8:])[9] == b"\x09"
    packets = []
    for kind, body in rest:
        number, high, low, captured, length = struct.unpack_from("<IIIII", body)
        assert kind == 6 and number == 0 and captured == length
        end = 20 + captured + -captured % 4
        direction = struct.unpack("<I", options(body[end:])[2])[0]
        packets.append((high << 32 | low, direction, body[20 : 20 + captured]))
    return packets


def test_what_passes_a_port_is_in_the_file(tmp_path):
    path = tmp_path / "lan.pcapng"

    async def main():
        port = await open_port(f"switch:lan?capture={path}")
        other = await open_port("switch:lan")
        driver, peer = Sink(room=2), Sink()
        for each, end in ((port, driver), (other, peer)):
            each.start(end)
            each.link(up())
        port.send([Packet(f) for f in FRAMES[:3]])
        other.send([Packet(f) for f in FRAMES[3:]])  # of which the driver takes two
        assert port.counters()["captured"] == 5
        port.ready()
        await port.close()
        await other.close()

    asyncio.run(main())
    found = read(path)
    assert [(direction, data) for _, direction, data in found] == [
        *((2, f) for f in FRAMES[:3]),
        *((1, f) for f in FRAMES[3:5]),
    ]
    assert sorted(stamp for stamp, _, _ in found) == [stamp for stamp, _, _ in found]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_capture_can_be_read_while_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "_FLUSH_EVERY", 0.02)
    path = tmp_path / "lan.pcapng"

    async def main():
        port = await open_port(f"switch:lan?capture={path}")
        port.start(Sink())
        port.send([Packet(FRAMES[0])])
        async with asyncio.timeout(5):
            while not read(path):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert [data for _, _, data in read(path)] == [FRAMES[0]]
        await port.close()

    asyncio.run(main())


def test_the_file_is_bounded(tmp_path):
    path = tmp_path / "small.pcapng"
    writer = PcapngWriter(path, "x", 4096, lambda: (5 << 32) + 7)
    for _ in range(100):
        writer.record([Packet(frame(BROADCAST, A, bytes(1000)))], outbound=True)
    writer.close()
    writer.close()
    found = read(path)
    assert path.stat().st_size <= 4096 and len(found) == writer.packets == 3 and writer.lost == 97
    assert found[0][0] == (5 << 32) + 7


def test_a_full_disk_ends_the_capture_and_not_the_traffic(tmp_path, caplog):
    path = tmp_path / "full.pcapng"
    with files_of_at_most(1 << 20):
        writer = PcapngWriter(path, "x")
        writer.record([Packet(frame(BROADCAST, A, bytes(60_000)))] * 100, outbound=False)
        writer.flush()
        writer.close()
    assert path.stat().st_size <= 1 << 20
    assert writer.lost and "the capture ends" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("capture=/nowhere/x", "ENOENT"),
        ("capture=/tmp/x&capture-max=lots", "no size"),
        ("capture=/tmp/x&capture-max=10", "from 4096"),
        ("capture=/tmp/x&colour=red", "unknown option colour"),
        ("capture-max=64M", "goes with capture=FILE"),
    ],
)
def test_what_is_refused_leaves_no_port(options, text, tmp_path):
    from xenbus.drivers.net.ports.schemes.switch import switches

    async def main():
        with pytest.raises((PortError, UsageError), match=text):
            await open_port(f"switch:lan?{options.replace('/tmp', str(tmp_path))}")

    asyncio.run(main())
    assert not switches


def plain_pcap(data: bytes) -> list[bytes]:
    """The frames of a pcap file: a header of 24 bytes, then each with one of 16."""
    at, frames = 24, []
    while at < len(data):
        captured, length = struct.unpack_from("<II", data, at + 8)
        assert captured == length
        frames.append(data[at + 16 : at + 16 + captured])
        at += 16 + captured
    return frames


def test_others_read_it(tmp_path):
    """libpcap or Wireshark make a plain pcap of it, with the same frames."""
    readers = {"tcpdump": ["-w", "-"], "tshark": ["-F", "pcap", "-w", "-"]}
    reader = next(filter(shutil.which, readers), None)
    if reader is None:
        pytest.skip("neither tcpdump nor tshark is installed")
    path = tmp_path / "lan.pcapng"
    writer = PcapngWriter(path, "x")
    writer.record([Packet(f) for f in FRAMES], outbound=True)
    writer.close()
    done = subprocess.run(
        [reader, "-r", str(path), *readers[reader]], capture_output=True, timeout=30, check=True
    )
    assert plain_pcap(done.stdout) == FRAMES
