"""xn and xnb against each other: every kind of packet and every feature, on the real store and hypervisor."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.support.until import until
from tests.support.vif import MAC, frame, rig, with_rig

from xenbus.bus import XenbusState
from xenbus.drivers.net import Gso, Packet, Xn, Xnb
from xenbus.drivers.net.packet import ALL, PLAIN, Link, Offloads
from xenbus.errors import DeadlineError, LinkDown, UsageError
from xenbus.hypervisor.embedded import EmbeddedHypervisor

S = XenbusState
pytestmark = pytest.mark.usefixtures("either_way")
GROUP, OTHER_GROUP = bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")


def front_with(**offer):
    return type("Xn", (Xn,), offer)


def back_with(**offer):
    return type("Xnb", (Xnb,), offer)


def long_packet(size: int, gso: Gso = Gso.TCPV4, mss: int = 1448) -> Packet:
    """Contents do not matter to the drivers: offloads that both ports take are handed through."""
    return Packet(random.Random(size).randbytes(size), True, True, gso, mss)


def to_group(address: bytes) -> bytes:
    return address + frame(64)[6:]


def test_frames_both_ways():
    async def check(r):
        for size in (14, 60, 1514, 1518):
            assert (await r.exchange(frame(size))).data == frame(size)
            assert (await r.exchange(frame(size, 2), back=True)).data == frame(size, 2)
        assert r.front_dev.nameunit == "xn0"
        assert r.back_dev.nameunit == "xnb0"
        assert r.near.peer == r.far.peer == Link(ALL, 1500, bytes.fromhex(MAC.replace(":", "")))
        rx, tx = r.back.counters, r.front.counters
        assert (rx.rx_packets, rx.rx_bytes) == (4, 3106) == (tx.tx_packets, tx.tx_bytes)
        assert (rx.tx_packets, rx.tx_bytes) == (4, 3106) == (tx.rx_packets, tx.rx_bytes)

    with_rig(check)


def test_the_packet_interface_of_a_front_end():
    async def check(r):
        await r.front.send(frame(99))
        assert (await r.far.get(5)).data == frame(99)
        await r.far.put(frame(100))
        assert await r.front.recv() == frame(100)
        with pytest.raises(DeadlineError, match="a packet"):
            await r.front.recv(0.01)

    with_rig(check, front_port="packet:")


def test_the_packet_interface_behind_a_capture(tmp_path):
    async def check(r):
        await r.front.send(frame(99))
        assert (await r.far.get(5)).data == frame(99)
        await r.far.put(frame(100))
        assert await r.front.recv() == frame(100)

    with_rig(check, front_port=f"packet:?capture={tmp_path}/front.pcapng")
    assert frame(99) in (tmp_path / "front.pcapng").read_bytes()


def test_a_front_end_whose_far_side_is_another_one_has_no_packets_to_give():
    async def run():
        async with rig() as r:
            await r.plug(front_port="switch:lan")
            await r.states(S.CONNECTED, S.CONNECTED)
            with pytest.raises(UsageError, match="switch lan, not the packet interface"):
                await r.front.recv()

    asyncio.run(run())


def test_frames_that_are_too_long_or_too_short_stay_here():
    async def check(r):
        for size in (13, 1519):
            await r.near.put(frame(20)[:13] if size < 20 else frame(size))
            await r.far.put(frame(20)[:13] if size < 20 else frame(size))
        assert (await r.exchange(frame(60))).data == frame(60)
        assert (await r.exchange(frame(60), back=True)).data == frame(60)
        assert r.front.counters.tx_length_errors == r.back.counters.tx_length_errors == 2
        assert r.front.counters.tx_packets == 1

    with_rig(check)


@pytest.mark.parametrize("size", [4096, 4097, 8192, 9014])
def test_mtu_9000(size):
    async def check(r):
        assert r.near.peer.mtu == r.far.peer.mtu == 9000
        for back in (False, True):
            assert (await r.exchange(frame(size), back=back)).data == frame(size)

    with_rig(check, mtu="9000")


@pytest.mark.parametrize("gso", [Gso.TCPV4, Gso.TCPV6])
@pytest.mark.parametrize("size", [1515, 4096, 4097, 65535])
def test_gso(size, gso):
    async def check(r):
        for back in (False, True):
            packet = long_packet(size, gso)
            assert await r.exchange(packet, back=back) == packet

    with_rig(check)


def test_a_batch_for_the_guest_is_copied_in_runs(either_way, monkeypatch):
    """Packets of one page, and longer ones, in their order; one copy for a run of either kind."""
    copies = []
    if either_way == "copied":
        copy_run = EmbeddedHypervisor.copy_run

        def counted(*args, to_remote):
            if to_remote:
                copies.append(len(args[2]))
            return copy_run(*args, to_remote=to_remote)

        monkeypatch.setattr(EmbeddedHypervisor, "copy_run", counted)

    async def check(r):
        batch = [
            Packet(frame(60)),
            long_packet(9000),
            long_packet(5000),
            Packet(frame(61)),
            Packet(frame(62)),
        ]
        batch.append(long_packet(7000, Gso.TCPV6))
        assert r.back.cable.send(batch) == len(batch)
        assert copies == ([1, 5, 2, 2] if either_way == "copied" else [])
        assert [await r.near.get(5) for _ in batch] == batch
        assert r.back.counters.tx_packets == len(batch)

    with_rig(check)


def test_more_long_packets_than_any_ring_holds():
    async def check(r):
        sent = [long_packet(random.Random(n).randrange(1500, 65536)) for n in range(60)]
        for back in (False, True):
            one, other = (r.far, r.near) if back else (r.near, r.far)

            async def send(one=one):
                left = sent
                while left:  # as many in one call as there is room for
                    left = left[one.put_many(left) :]
                    await asyncio.sleep(0)

            task = asyncio.ensure_future(send())
            assert [await other.get(5) for _ in sent] == sent
            await task

    with_rig(check)


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("validated", [False, True])
def test_checksum_flags(blank, validated):
    async def check(r):
        packet = Packet(frame(60), blank, validated)
        # A blank one is valid data: both flags go with it, as Linux has it.
        wanted = Packet(frame(60), blank, blank or validated)
        for back in (False, True):
            assert await r.exchange(packet, back=back) == wanted

    with_rig(check)


OFFERS = [
    ({}, ALL),
    ({"sg": False}, Offloads(csum=True, csum6=True)),
    ({"gso_tcpv4": False}, Offloads(csum=True, csum6=True, tso6=True)),
    ({"gso_tcpv6": False}, Offloads(csum=True, csum6=True, tso4=True)),
    ({"csum": False}, Offloads(csum6=True, tso6=True)),
    ({"ipv6_csum": False}, Offloads(csum=True, tso4=True)),
    ({"csum": False, "ipv6_csum": False}, PLAIN),
]


@pytest.mark.parametrize("side", ["front", "back"])
@pytest.mark.parametrize(
    ("offer", "agreed"), OFFERS, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_features(side, offer, agreed):
    """What one half does not offer neither direction uses: each makes use of what it can take itself."""
    front, back = (front_with(**offer), Xnb) if side == "front" else (Xn, back_with(**offer))

    async def check(r):
        assert r.near.peer.offloads == r.far.peer.offloads == agreed
        mtu = 1500 if offer.get("sg") is False else 9000
        assert r.near.peer.mtu == r.far.peer.mtu == mtu
        for size in (60, 1500 + 14, mtu + 14):
            for back in (False, True):
                assert (await r.exchange(frame(size), back=back)).data == frame(size)
        await r.near.put(long_packet(20000))
        got = await r.exchange(frame(61))
        if agreed.tso4:
            assert got.gso is Gso.TCPV4
        else:
            assert got.data == frame(61)
            assert r.front.counters.tx_errors == 1

    with_rig(check, front=front, back=back, mtu="9000")


def test_options_are_nodes_of_the_back_end():
    keys = {
        "xnb_max_queues": "2",
        "xnb_sg": "0",
        "xnb_csum": "0",
        "xnb_ipv6_csum": "0",
        "xnb_split_event_channels": "0",
        "xnb_multicast_control": "0",
    }

    async def check(r):
        read = r.world.tool.read_str
        assert await read(f"{r.bnode}/multi-queue-max-queues") == "2"
        for key in ("sg", "gso-tcpv4", "gso-tcpv6", "ipv6-csum-offload", "split-event-channels"):
            assert await read(f"{r.bnode}/feature-{key}") == "0"
        assert await read(f"{r.bnode}/feature-no-csum-offload") == "1"
        assert await read(f"{r.bnode}/feature-dynamic-multicast-control") == "0"
        assert r.near.peer.offloads == PLAIN
        assert (await r.exchange(frame(60))).data == frame(60)

    with_rig(check, **keys)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"xnb_max_queues": "17"}, "xnb-max-queues: 17, 1 to 16"),
        ({"xnb_sg": "yes"}, "xnb-sg: b'yes' is not a number"),
        ({"port": "pakcet:"}, "no port scheme pakcet"),
        ({"port": "packet:?ofloads=1"}, "unknown option ofloads"),
        ({"mtu": "67"}, "mtu: 67, 68 to 65521"),
    ],
)
def test_an_option_that_makes_no_sense_closes_the_device(keys, says):
    async def run():
        async with rig() as r:
            await r.plug(**keys)
            await r.world.tool.wait_for(f"{r.bnode}/state", lambda value: value == b"6", 5)
            assert says in await r.error_of(r.bnode)

    asyncio.run(run())


@pytest.mark.parametrize("split", [False, True])
def test_event_channels(split):
    async def check(r):
        assert r.front_dev.counts()["channels"] == r.back_dev.counts()["channels"] == 1 + split
        said = await r.world.tool.directory(r.fnode)
        assert ("event-channel" in said) is not split
        assert ("event-channel-tx" in said) is ("event-channel-rx" in said) is split
        for back in (False, True):
            assert (await r.exchange(frame(60), back=back)).data == frame(60)

    with_rig(check, back=back_with(split_event_channels=split))


# -- queues


def ip_frame(port: int, number: int) -> bytes:
    """UDP over IPv4 with a source port and a number in it."""
    head = frame(14)[:12] + b"\x08\x00"
    ip = bytes.fromhex("45000030000000004011") + bytes(2) + bytes([10, 0, 0, 1, 10, 0, 0, 2])
    return head + ip + port.to_bytes(2, "big") + bytes([0, 53, 0, 28, 0, 0]) + number.to_bytes(20, "big")


@pytest.mark.parametrize("split", [False, True])
def test_queues_keep_the_order_of_a_flow(split):
    front = front_with(num_queues=4, split_event_channels=split)

    async def check(r):
        assert len(r.front._links) == len(r.back._links) == 4
        assert await r.world.tool.read_str(f"{r.fnode}/multi-queue-num-queues") == "4"
        assert not await r.world.tool.exists(f"{r.fnode}/tx-ring-ref")
        assert await r.world.tool.exists(f"{r.fnode}/queue-3/rx-ring-ref")
        sent = [ip_frame(port, number) for number in range(100) for port in range(1000, 1008)]
        for back in (False, True):
            one, other = (r.far, r.near) if back else (r.near, r.far)
            got = []
            for packet in sent:
                await one.put(packet, 5)
            got = [(await other.get(5)).data for _ in sent]
            assert sorted(got) == sorted(sent)
            for port in range(1000, 1008):
                key = port.to_bytes(2, "big")
                assert [f for f in got if f[34:36] == key] == [f for f in sent if f[34:36] == key]
        for ring in (0, 1):
            used = [link._rings[ring].req_cons > 32 for link in r.back._links]
            assert sum(used) > 1, "all flows went over one queue"

    with_rig(check, front=front)


def test_a_front_takes_no_more_queues_than_there_are():
    async def check(r):
        assert len(r.front._links) == len(r.back._links) == 2

    with_rig(check, front=front_with(num_queues=16), xnb_max_queues="2")


def test_the_front_s_node_says_how_many_queues_it_asks_for():
    async def check(r):
        assert len(r.front._links) == len(r.back._links) == 3

    with_rig(check, xn_max_queues="3")


# -- bursts


def test_a_burst_is_not_lost():
    """Far more than the rings hold, as fast as it goes: each end holds back what has no room."""

    async def check(r):
        sent = [frame(60 + n % 1400, n) for n in range(1000)]
        for back in (False, True):
            one, other = (r.far, r.near) if back else (r.near, r.far)
            packets = [Packet(data) for data in sent]
            while packets:
                packets = packets[one.put_many(packets) :]
                await asyncio.sleep(0)
            assert [(await other.get(5)).data for _ in sent] == sent
        for counters in (r.front.counters, r.back.counters):
            assert not counters.tx_dropped + counters.rx_dropped + counters.tx_errors + counters.rx_errors

    with_rig(check)


@pytest.mark.parametrize("queues", [1, 2])
def test_both_ways_at_once(queues):
    """Long and short packets mixed, over several flows, while the other direction is as busy."""

    def mixed(seed):
        dice = random.Random(seed)
        for n in range(400):
            if dice.randrange(4):
                yield Packet(ip_frame(n % 5, n))
            else:
                yield Packet(
                    ip_frame(n % 5, n).ljust(dice.randrange(2000, 65536), b"x"), True, True, Gso.TCPV4, 1448
                )

    async def pour(port, packets):
        while packets:
            packets = packets[port.put_many(packets[:16]) :]
            await asyncio.sleep(0)

    async def check(r):
        sent = list(mixed(1)), list(mixed(2))
        for cable in (r.front.cable, r.back.cable):
            cable.stall_shared = 10
        async with asyncio.timeout(20):
            async with asyncio.TaskGroup() as group:
                group.create_task(pour(r.near, sent[0]))
                group.create_task(pour(r.far, sent[1]))
                for port, wanted in ((r.far, sent[0]), (r.near, sent[1])):
                    got = [await port.get(10) for _ in wanted]
                    for n in range(5):
                        assert [p for p in got if p.data[35] == n] == wanted[n::5]
        for counters in (r.front.counters, r.back.counters):
            assert not counters.tx_dropped + counters.rx_dropped + counters.tx_errors + counters.rx_errors

    with_rig(check, front=front_with(num_queues=queues))


def test_an_idle_pair_sends_no_events():
    async def check(r):
        for back in (False, True):
            await r.exchange(frame(60), back=back)
        await asyncio.sleep(0)
        channels = [*r.front._links[0]._channels, *r.back._links[0]._channels]
        kicks = []
        for channel in channels:
            handler = channel._handler
            channel._handler = lambda handler=handler: (kicks.append(1), handler())
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0.05)
        assert not kicks
        assert not any(not handle.cancelled() for handle in loop._ready)
        assert r.front.cable._timer is None is r.back.cable._timer

    with_rig(check)


# -- multicast


def test_multicast_control_from_the_start():
    async def check(r):
        assert r.back.multicast.on
        await r.front.join(GROUP)
        await until(lambda: r.back.multicast.groups)
        await r.far.put(to_group(OTHER_GROUP))
        await r.far.put(to_group(GROUP))
        assert (await r.near.get(5)).data == to_group(GROUP)
        assert (await r.exchange(frame(60), back=True)).data == frame(60)  # broadcast
        assert r.back.counters.multicast_filtered == 1
        await r.front.leave(GROUP)
        await until(lambda: not r.back.multicast.groups)
        await r.far.put(to_group(GROUP))
        assert (await r.exchange(frame(61), back=True)).data == frame(61)
        assert not r.back.counters.rx_errors

    with_rig(check, front=front_with(multicast_control=True))


def test_a_group_too_many_is_an_error_of_the_one_who_joins():
    async def check(r):
        groups = [bytes.fromhex("01005e0000") + bytes([n]) for n in range(65)]
        for group in groups:
            await r.front.join(group)
        assert (await r.exchange(frame(60))).data == frame(60)
        await r.near.put(frame(60))  # answers are looked at with the next packet
        assert r.front.counters.tx_errors == 1 and "answered -1" in r.front.counters.last_error
        assert r.back.multicast.groups == set(groups[:64])
        for wrong in (b"", GROUP[:5], GROUP + b"\0", bytes(6)):
            with pytest.raises(UsageError, match="no multicast group"):
                await r.front.join(wrong)

    with_rig(check, front=front_with(multicast_control=True))


def test_multicast_control_while_connected():
    async def check(r):
        assert not r.back.multicast.on
        assert (await r.exchange(to_group(GROUP), back=True)).data == to_group(GROUP)
        await r.front.filter_multicast(True)
        await until(lambda: r.back.multicast.on)
        await r.far.put(to_group(GROUP))
        assert (await r.exchange(frame(60), back=True)).data == frame(60)
        await r.front.filter_multicast(False)
        await until(lambda: not r.back.multicast.on)
        assert (await r.exchange(to_group(GROUP), back=True)).data == to_group(GROUP)

    with_rig(check)


def test_groups_are_told_again_after_a_reconnect():
    async def check(r):
        await r.front.join(GROUP)
        await until(lambda: r.back.multicast.groups == {GROUP})
        await r.world.tool.write(f"{r.bnode}/state", "5")
        await until(lambda: not r.back.multicast.groups)
        await r.connected()
        await until(lambda: r.back.multicast.groups == {GROUP})

    with_rig(check, front=front_with(multicast_control=True))


# -- link state


def test_carrier():
    async def check(r):
        assert await r.world.tool.read_str(f"{r.bnode}/carrier") == "1"
        port = r.far
        port._driver.link(None)
        await until(lambda: r.near.peer is None)
        assert await r.world.tool.read_str(f"{r.bnode}/carrier") == "0"
        with pytest.raises(DeadlineError, match="a link"):
            await r.near.put(frame(60), 0.01)
        port._driver.link(Link(ALL))
        await r.near.linked(5)
        assert (await r.exchange(frame(60))).data == frame(60)

    with_rig(check)


def test_a_connection_begins_without_a_carrier_where_the_port_has_none():
    async def check(r):
        port, near = r.far, r.near
        port.link = lambda link: None  # as a TAP device that somebody deleted: it says nothing more
        port._driver.link(None)
        await until(lambda: near.peer is None)
        await r.world.tool.rm(f"{r.bnode}/carrier")
        await r.world.tool.write(f"{r.bnode}/state", "5")
        await until(lambda: r.front_dev.state is not XenbusState.CONNECTED)
        await r.states(XenbusState.CONNECTED, XenbusState.CONNECTED)
        assert await r.world.tool.read_str(f"{r.bnode}/carrier") == "0"
        assert near.peer is None

    with_rig(check)


def test_closed_ports_say_so():
    async def check(r):
        near = r.near
        await near.close()
        for use in (near.get(1), near.put(b"x", 1), near.linked(1)):
            with pytest.raises(LinkDown):
                await use

    with_rig(check)
