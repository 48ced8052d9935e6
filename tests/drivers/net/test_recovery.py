"""A back end that is killed, and another process that goes on: real processes over the broker, real rings.

The front is xn in this process; it must see nothing but a pause, and frames that are lost.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from tests.support import netlab
from tests.support.killed_back import KilledBack
from tests.support.station import Talker
from tests.support.until import until
from tests.support.vif import MAC, frame

from xenbus.bus import XenbusState
from xenbus.drivers.net import Gso, Packet, Xn
from xenbus.errors import DeadlineError
from xenbus.toolstack.devices import DeviceSpec, wait_connected, write_device
from xenbus.toolstack.paths import DevicePaths

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
S = XenbusState


class Rig(KilledBack):
    async def plug(self) -> None:
        given = {"mac": MAC, "mtu": "9000"}
        front, back = given | {"xenbus-port": "packet:?offloads=1"}, given | {"xenbus-port": "echo:"}
        await self.add(DeviceSpec(DevicePaths("vif", 0, 1, 0), front, back))
        self.port = self.bus.devices["device/vif/0"].driver.port
        await self.port.linked(5)

    async def echo(self, packet: Packet) -> None:
        """Until it comes back; what others left on the way is skipped."""
        await self.port.put(packet, 5)
        while (await self.port.get(5)).data != packet.data:
            pass

    async def echoes(self, first: int, count: int = 50) -> None:
        for number in range(first, first + count):
            await self.echo(Packet(frame(60, 1) + number.to_bytes(4, "big")))
        await self.echo(Packet(frame(9014, first)))
        await self.echo(Packet(frame(65535, first), True, True, Gso.TCPV4, 1448))


def test_killed_and_gone_on_with(tmp_path):
    async def test(r):
        await r.rise()
        await r.plug()
        await r.echoes(0)
        seen = []
        r.bus.observe(lambda dev, what: seen.append((what, dev.state, dev.otherend_state)))
        for number in range(1, 4):
            await r.back.kill()
            # What is sent meanwhile waits on the ring.
            r.port.put_many([Packet(frame(61, number))] * 20)
            await r.rise()
            await r.echoes(number * 1000)
        assert seen == [], "the front saw more than a pause"
        await r.unplug()

    Rig.run(test, tmp_path)


def test_killed_in_the_middle_of_traffic(tmp_path):
    async def test(r):
        await r.rise()
        await r.plug()
        over = False

        async def pour():
            while not over:
                try:
                    await r.port.put(frame(1514), 0.5)
                except DeadlineError:
                    pass  # nobody serves the ring at the moment
                await asyncio.sleep(0)

        async def drain():
            while not over:
                try:
                    await r.port.get(0.1)
                except DeadlineError:
                    pass

        tasks = [asyncio.create_task(pour()), asyncio.create_task(drain())]
        for _ in range(4):
            before = r.bus.devices["device/vif/0"].driver.counters.rx_packets
            await until(
                lambda before=before: r.bus.devices["device/vif/0"].driver.counters.rx_packets > before + 300,
                20,
            )
            await r.back.kill()
            await r.rise()
        over = True
        await asyncio.gather(*tasks)
        counters = r.bus.devices["device/vif/0"].driver.counters
        assert not counters.rx_errors and not counters.tx_errors
        await r.echoes(7000)
        await r.unplug()

    Rig.run(test, tmp_path)


def test_handed_over(tmp_path):
    async def test(r):
        await r.rise()
        await r.plug()
        await r.echoes(0)
        assert await r.back.hand_over() == "released"
        await r.rise()
        await r.echoes(1000)
        await r.unplug()

    Rig.run(test, tmp_path)


async def scripted(directory, vifname, name):
    """The TAP that a hotplug script has found: its index, over a kill and a hand-over; at the end it goes."""
    here = Talker()
    async with Rig.rig(Path(directory)) as r:
        await r.rise()
        back = {"mac": MAC, "handle": "0", "mtu": "1400", "script": "vif-bridge"}
        back |= {"vifname": vifname} if vifname else {}
        r.spec = DeviceSpec(DevicePaths("vif", 0, 1, 0), {"mac": MAC}, back)
        await write_device(r.tool, r.spec)
        await r.tool.wait_for(f"{r.spec.paths.back}/state", lambda value: value == b"2", 5)
        if vifname:  # what Xen's own script does first
            here.rename("vif1.0", vifname)
        here.up(name)
        await r.tool.write(f"{r.spec.paths.back}/hotplug-status", "connected")
        await wait_connected(r.tool, r.spec.paths)
        await until(lambda: here.link(name)["mtu"] == 1400)
        found = [socket.if_nametoindex(name)]
        await r.back.kill()
        found.append(socket.if_nametoindex(name))
        await r.rise()
        assert await r.back.hand_over() == "released"
        found.append(socket.if_nametoindex(name))
        await r.rise()
        assert [each for _, each in socket.if_nameindex()] == ["lo", name]
        await r.unplug()
        await until(lambda: all(each != name for _, each in socket.if_nameindex()))
        return found


@pytest.mark.skipif(bool(netlab.missing()), reason=netlab.missing() or "there are")
@pytest.mark.parametrize("vifname", ["", "uplink0"])
def test_a_device_that_a_script_has_placed_stays_there(tmp_path, vifname):
    """A script is called once, and may give it another name: a new device would be in no bridge."""
    found = netlab.run(scripted, str(tmp_path), vifname, vifname or "vif1.0")
    assert len(set(found)) == 1


def test_a_front_end_that_began_anew_meanwhile(tmp_path):
    async def test(r):
        await r.rise()
        await r.plug()
        await r.back.kill()
        await r.tool.write("/local/domain/1/device/vif/0/state", "1")
        await until(lambda: not r.port.peer)
        await r.rise()
        await until(lambda: r.bus.devices["device/vif/0"].state is S.CONNECTED)
        r.port = r.bus.devices["device/vif/0"].driver.port
        await r.port.linked(10)
        await r.echoes(0)
        await r.unplug()

    Rig.run(test, tmp_path)


def test_a_second_process_leaves_the_first_one_s_devices_alone(tmp_path):
    async def test(r):
        first = await r.rise()
        await r.plug()
        second = await r.rise(patience=0.2)
        await r.echoes(0)
        await second.stop()
        await r.echoes(1000)
        await first.kill()
        await r.rise()
        await r.echoes(2000)
        await r.unplug()

    Rig.run(test, tmp_path)


def test_a_back_end_that_does_not_inherit(tmp_path):
    """The device is left alone until somebody arms it; then both begin anew, by themselves."""

    async def test(r):
        await r.rise()
        await r.plug()
        await r.back.kill()
        await r.rise(inherits=False)
        assert await r.tool.read(f"{r.spec.paths.back}/state") == b"4"
        await r.tool.write(f"{r.spec.paths.back}/state", "1")
        await until(lambda: not r.port.peer)
        await r.port.linked(10)
        await r.echoes(0)
        await r.unplug()

    Rig.run(test, tmp_path)


def test_across_processes(tmp_path):
    """Every kind of packet, and more than the rings hold, with the back end in another process."""

    class Several(Xn):
        num_queues = 3

    async def test(r):
        from xenbus.bus import Side, drivers

        drivers.remove(Xn)
        drivers.add(Side.FRONT, "vif", Several)
        try:
            await r.rise()
            await r.plug()
            await r.echoes(0, 500)
            sent = [frame(60 + n) for n in range(1000)]
            got = []
            for n in range(0, 1000, 20):
                for data in sent[n : n + 20]:
                    await r.port.put(data, 5)
                got += [(await r.port.get(5)).data for _ in range(20)]
            assert sorted(got) == sorted(sent)
            await r.unplug()
        finally:
            drivers.remove(Several)
            drivers.add(Side.FRONT, "vif", Xn)

    Rig.run(test, tmp_path)
