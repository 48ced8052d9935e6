"""The learning switch: who gets what, and that one port's trouble is its own."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.ip_frames import ether, ipv4, tcp
from tests.support.net_ends import BROADCAST, Sink, frame, station, up

from xenbus.drivers.net.frames import is_valid
from xenbus.drivers.net.packet import ALL, Gso, Offloads, Packet
from xenbus.drivers.net.ports import PortError, open_port
from xenbus.drivers.net.ports import switch as module
from xenbus.drivers.net.ports.schemes.switch import UPLINKS_MAX, switches
from xenbus.drivers.net.ports.switch import Switch
from xenbus.errors import LinkDown, UsageError

A, B, C, D = (station(n) for n in range(4))


class Lan:
    """A switch with a clock of its own and three ports whose links are up."""

    def __init__(self, count=3, room=1 << 30):
        self.time = 1000.0
        self.soon = []
        self.switch = Switch("lan", lambda: self.time, self.soon.append)
        self.sinks = [Sink(room) for _ in range(count)]
        self.ports = [self.switch.plug() for _ in range(count)]
        for port, sink in zip(self.ports, self.sinks, strict=True):
            port.start(sink)
            port.link(up())
        self.run()

    def run(self):
        while self.soon:
            self.soon.pop(0)()

    def send(self, port, *frames):
        assert self.ports[port].send([Packet(f) for f in frames]) == len(frames)

    def got(self):
        found = [sink.frames for sink in self.sinks]
        for sink in self.sinks:
            sink.got.clear()
        return found


def test_unknown_goes_to_all_others_and_known_to_one():
    lan = Lan()
    to_b, to_a = frame(B, A), frame(A, B)
    lan.send(0, to_b)
    assert lan.got() == [[], [to_b], [to_b]]
    lan.send(1, to_a)
    assert lan.got() == [[to_a], [], []]
    lan.send(0, to_b)
    assert lan.got() == [[], [to_b], []]
    assert lan.switch.port_of(A) is lan.ports[0] and lan.switch.port_of(B) is lan.ports[1]
    # Two stations behind one port (a TAP with a bridge): what is for the neighbour stays there.
    lan.send(0, frame(D, C), frame(C, D))
    lan.got()
    lan.send(0, frame(C, A))
    assert lan.got() == [[], [], []]


def test_broadcast_and_multicast_go_to_all_others():
    lan = Lan()
    lan.send(1, frame(A, B))
    lan.got()
    for group in (BROADCAST, bytes.fromhex("333300000001"), bytes.fromhex("01005e000001")):
        sent = frame(group, A)
        lan.send(0, sent)
        assert lan.got() == [[], [sent], [sent]]


def test_what_a_bridge_keeps_to_itself_and_what_is_no_frame():
    lan = Lan()
    lan.send(0, frame(bytes.fromhex("0180c2000000"), A), frame(B, BROADCAST), frame(B, A)[:13], b"")
    assert lan.got() == [[], [], []]
    assert lan.ports[0].counters()["tx_dropped"] == 4
    assert lan.switch.port_of(BROADCAST) is None


def test_a_station_moves_and_is_forgotten():
    lan = Lan()
    lan.send(0, frame(BROADCAST, A))
    lan.send(2, frame(BROADCAST, A))
    assert lan.switch.port_of(A) is lan.ports[2] and not lan.ports[0].addresses
    lan.got()
    lan.send(1, frame(A, B))
    assert [len(found) for found in lan.got()] == [0, 0, 1]
    assert module.AGE == 300  # 802.1D, table 7-5
    lan.time += module.AGE - 1
    lan.send(2, frame(BROADCAST, A))  # it spoke: its time begins anew
    lan.time += 2
    assert lan.switch.port_of(A) is lan.ports[2]
    lan.time += module.AGE
    lan.got()
    lan.send(1, frame(A, B))
    assert [len(found) for found in lan.got()] == [1, 0, 1]
    lan.send(2, frame(BROADCAST, A))
    lan.ports[2].link(None)
    assert lan.switch.port_of(A) is None
    asyncio.run(lan.ports[1].close())
    assert lan.switch.port_of(B) is None and lan.switch.ports == [lan.ports[0], lan.ports[2]]


def test_invented_addresses_push_out_their_own_ports_alone():
    lan = Lan()
    lan.send(1, frame(BROADCAST, B))
    for number in range(5000):
        lan.send(0, frame(B, station(1000 + number)))
    assert len(lan.ports[0].addresses) == module.ADDRESSES_MAX
    assert lan.switch.port_of(B) is lan.ports[1]
    assert lan.switch.port_of(station(1000)) is None
    assert lan.switch.port_of(station(5999)) is lan.ports[0]
    assert len(lan.switch._table) == module.ADDRESSES_MAX + 1


def test_who_speaks_is_not_pushed_out():
    lan = Lan()
    lan.send(0, frame(BROADCAST, A))
    for number in range(5000):
        lan.time += 1.5
        lan.send(0, frame(B, station(1000 + number)), frame(B, A))
    assert lan.switch.port_of(A) is lan.ports[0]


def test_a_flood_is_cut_and_others_are_not():
    lan = Lan()
    lan.send(1, frame(BROADCAST, B))
    lan.got()
    storm = [frame(BROADCAST, A)] * 10_000
    lan.send(0, *storm)
    assert len(lan.got()[1]) == module.FLOOD_BURST
    counted = lan.ports[0].counters()
    assert (
        counted["flood_dropped"] == 10_000 - module.FLOOD_BURST and counted["flooded"] == module.FLOOD_BURST
    )
    lan.send(0, frame(B, A))  # what is for one is none
    lan.send(2, frame(BROADCAST, C))
    assert [len(found) for found in lan.got()] == [1, 2, 0]
    lan.time += 0.0625
    lan.send(0, *storm)
    assert len(lan.got()[1]) == module.FLOOD_RATE / 16


def test_a_slow_port_loses_its_own_frames_only():
    lan = Lan()
    lan.sinks[1].room = 3
    numbered = [frame(BROADCAST, A, n.to_bytes(46, "big")) for n in range(1000)]
    lan.send(0, *numbered)
    _, slow, quick = lan.got()
    assert quick == numbered and slow == numbered[:3]
    counted = lan.ports[1].counters()
    assert counted["waiting"] == module.WAITING_PACKETS
    assert counted["rx_dropped"] == 1000 - 3 - module.WAITING_PACKETS
    lan.sinks[1].room = 10
    lan.send(0, numbered[0])  # it is full until it says otherwise
    assert lan.got()[1] == []
    lan.ports[1].ready()
    assert lan.got()[1] == numbered[3:13]  # the oldest first, and the data is theirs
    lan.sinks[1].room = 1 << 30
    lan.ports[1].ready()
    assert lan.got()[1] == numbered[13 : 3 + module.WAITING_PACKETS]
    lan.send(0, numbered[7])
    assert lan.got()[1] == [numbered[7]] and lan.ports[1].waiting == 0


def test_what_waits_is_bounded_in_bytes_and_a_copy():
    lan = Lan(2, room=0)
    data = bytearray(frame(B, A, bytes(60_000)))
    for port in lan.ports:
        port.link(up(mtu=65_000))
    for _ in range(100):
        lan.ports[0].send([Packet(memoryview(data))])
    data[-1] = 1
    assert lan.ports[1].waiting == module.WAITING_BYTES // len(data)
    lan.sinks[1].room = 1
    lan.ports[1].ready()
    assert lan.got()[1] == [frame(B, A, bytes(60_000))]
    lan.ports[1].link(None)
    assert lan.ports[1].waiting == 0 and lan.ports[1].counters()["rx_dropped"] == 99
    lan.ports[1].link(up())
    lan.ports[0].send([Packet(frame(B, A))])
    assert lan.ports[1].waiting == 1


def test_each_gets_what_it_takes():
    lan = Lan()
    lan.ports[1].link(up(ALL))
    lan.ports[2].link(up(Offloads(csum=True)))
    long = ether(ipv4(tcp(bytes(4000)), 6))
    lan.ports[0].send([Packet(BROADCAST + long[6:], True, gso=Gso.TCPV4, gso_size=1000)])
    assert [(len(p.data), p.gso, p.csum_blank) for p in lan.sinks[1].got] == [(4054, Gso.TCPV4, True)]
    assert [(len(p.data), p.gso, p.csum_blank) for p in lan.sinks[2].got] == [(1054, Gso.NONE, True)] * 4
    lan.ports[2].link(up())
    lan.got()
    lan.ports[0].send([Packet(BROADCAST + long[6:], True, gso=Gso.TCPV4, gso_size=1000)])
    assert all(is_valid(data) for data in lan.got()[2])
    # A lie of the sender's is nobody's packet, but for those who take everything.
    lan.ports[0].send([Packet(BROADCAST + long[6:], True, gso=Gso.TCPV6, gso_size=1000)])
    assert [len(found) for found in lan.got()] == [0, 1, 0] and lan.ports[2].rx_dropped == 1


def test_a_long_packet_floods_as_what_it_stands_for(monkeypatch):
    """It is cut once for all ports, and its segments count: else a guest would multiply its flood by them."""
    made = []
    real = module.lower_all
    monkeypatch.setattr(module, "lower_all", lambda *args: made.append(args) or real(*args))
    lan = Lan(5)
    lan.ports[4].link(up(ALL))
    data = ether(ipv4(tcp(bytes(4000)), 6))
    packet = Packet(data[:6] + A + data[12:], True, True, Gso.TCPV4, 40)
    lan.ports[0].send([packet])
    assert [len(frames) for frames in lan.got()] == [0, 100, 100, 100, 1]
    assert len(made) == 1
    assert lan.ports[0].send([packet] * 30) == 30
    counters = lan.ports[0].counters()
    assert counters["flooded"] == 19 and counters["flood_dropped"] == 12  # 102 each, with its header, of 2000


def test_a_frame_longer_than_a_ports_mtu_is_dropped_there():
    lan = Lan()
    lan.ports[1].link(up(mtu=9000))
    lan.send(0, frame(BROADCAST, A, bytes(1504)), frame(BROADCAST, A, bytes(1505)))
    assert [len(found) for found in lan.got()] == [0, 2, 1] and lan.ports[2].rx_dropped == 1


class Echo(Sink):
    """Answers from within its send."""

    def send(self, packets):
        taken = super().send(packets)
        self.port.send([Packet(frame(p.data[6:12], p.data[:6])) for p in packets])
        return taken


def test_ends_that_answer_from_within_go_round_without_a_stack_or_a_queue_that_grows():
    lan = Lan(2)
    for index in (0, 1):
        echo = Echo()
        echo.port = lan.ports[index]
        lan.sinks[index] = lan.ports[index].driver = echo
    lan.send(0, frame(B, A))
    assert len(lan.sinks[1].got) == 1 and not lan.sinks[0].got
    for _ in range(2000):
        assert len(lan.soon) == 1
        lan.soon.pop()()
    assert len(lan.sinks[0].got) + len(lan.sinks[1].got) == 2001
    lan.send(0, *[frame(B, A)] * 5000)
    assert len(lan.switch._later) <= 4 * module.WAITING_PACKETS
    assert lan.ports[1].tx_dropped


def test_a_port_that_is_down_gets_nothing_and_learns_again():
    lan = Lan()
    lan.send(1, frame(BROADCAST, B))
    lan.got()
    lan.ports[1].link(None)
    lan.send(0, frame(B, A))
    assert [len(found) for found in lan.got()] == [0, 0, 1]
    lan.ports[1].link(up())
    lan.send(0, frame(B, A))
    assert [len(found) for found in lan.got()] == [0, 1, 1]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 7), st.integers(0, 400)), max_size=60
    )
)
@settings(deadline=None)
def test_it_forwards_as_the_simplest_model_does(steps):
    lan = Lan(4)
    model = {}
    for port, source, destination, wait in steps:
        lan.time += wait
        to = BROADCAST if destination == 7 else station(destination)
        lan.send(port, frame(to, station(source)))
        model[source] = (port, lan.time)
        known = model.get(destination)
        if known is not None and lan.time - known[1] <= module.AGE:
            expected = {known[0]} - {port}
        else:
            expected = {0, 1, 2, 3} - {port}
        assert {n for n, found in enumerate(lan.got()) if found} == expected


def test_by_name_one_switch_is_shared_and_goes_with_its_last_port():
    async def main():
        one, two = await open_port("switch:lan"), await open_port("switch:lan")
        other = await open_port("switch:other")
        ends = [Sink(), Sink(), Sink()]
        for port, end in zip((one, two, other), ends, strict=True):
            port.start(end)
            port.link(up())
        await asyncio.sleep(0)
        assert [end.links[0].offloads for end in ends] == [ALL] * 3
        one.send([Packet(frame(BROADCAST, A))])
        assert [len(end.got) for end in ends] == [0, 1, 0]
        assert one.name == "switch lan" and two.counters()["rx_packets"] == 1
        for port in (one, other, two):
            await port.close()
            await port.close()
        assert not switches
        with pytest.raises(UsageError, match="unknown option"):
            await open_port("switch:lan?colour=red")
        with pytest.raises(UsageError, match="no switch's name"):
            await open_port("switch:a/b")

    asyncio.run(main())


def test_a_port_that_is_held_to_its_own_address():
    lan = Lan()
    lan.ports[0].own_source_only = True
    lan.send(0, frame(B, A))  # nobody said what its own address is
    lan.ports[0].link(up(mac=A))
    lan.send(0, frame(B, C), frame(B, A), frame(BROADCAST, B))
    lan.send(1, frame(C, D))
    assert lan.got() == [[frame(C, D)], [frame(B, A)], [frame(B, A), frame(C, D)]]
    assert lan.ports[0].counters()["spoofed"] == 3 and lan.ports[1].counters()["spoofed"] == 0
    assert lan.switch.port_of(C) is None  # a lie teaches nothing
    assert lan.switch.port_of(A) is lan.ports[0]


def test_the_option_of_that_name():
    async def main():
        held, free = await open_port("switch:lan?source=own"), await open_port("switch:lan?source=any")
        for port, mac in ((held, A), (free, B)):
            port.start(Sink())
            port.link(up(mac=mac))
        for port in (held, free):
            port.send([Packet(frame(BROADCAST, C))])
            await port.close()
        assert [port.spoofed for port in (held, free)] == [1, 0]
        with pytest.raises(UsageError, match="`own` or `any`"):
            await open_port("switch:lan?source=mine")
        assert not switches

    asyncio.run(main())


def test_an_uplink_is_opened_once_and_goes_with_the_switch():
    async def main():
        one = await open_port("switch:lan?uplink=packet:")
        two = await open_port("switch:lan?uplink=packet:&source=own")
        (outside,) = switches["lan"].uplinks.values()
        ends = Sink(), Sink()
        for port, end, mac in ((one, ends[0], A), (two, ends[1], B)):
            port.start(end)
            port.link(up(mac=mac))
        assert (await outside.linked(1)).mtu == 1500
        sent = frame(BROADCAST, A)
        one.send([Packet(sent)])
        assert (await outside.get(1)).data == sent and ends[1].frames == [sent]
        back = frame(A, D)
        await outside.put(back, 1)
        assert ends[0].frames == [back] and ends[1].frames == [sent]
        await one.close()
        assert len(switches["lan"].ports) == 2  # the other one's, and the uplink's
        await two.close()
        assert not switches
        with pytest.raises(LinkDown):
            await outside.get(1)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("uplink", "error", "text"),
    [
        ("switch:other", UsageError, "loop"),
        ("up0", UsageError, "no far side"),
        ("printer:x", UsageError, "no port scheme"),
        ("packet:?capture=/nowhere/x", PortError, "No such file"),
    ],
)
def test_an_uplink_that_cannot_be_leaves_no_switch(uplink, error, text):
    async def main():
        with pytest.raises(error, match=text):
            await open_port(f"switch:lan?uplink={uplink}")
        assert not switches

    asyncio.run(main())


def test_uplinks_are_bounded(tmp_path):
    async def main():
        port = await open_port("switch:lan")
        for number in range(UPLINKS_MAX):
            await switches["lan"].join(f"packet:?capture={tmp_path / str(number)}")
        with pytest.raises(UsageError, match="the most"):
            await switches["lan"].join("packet:")
        await port.close()
        assert not switches

    asyncio.run(main())


def test_ports_are_bounded():
    switch = Switch("lan", lambda: 0.0, lambda call: None)
    for _ in range(module.PORTS_MAX):
        switch.plug()
    with pytest.raises(UsageError, match="ports are in use"):
        switch.plug()
