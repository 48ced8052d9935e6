"""xn against a back end that lies: its packets are dropped and counted; one that breaks a ring is left."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.raw_vif import RawBack, with_raw_back
from tests.support.until import until
from tests.support.vif import frame, rig

from xenbus.bus import XenbusState
from xenbus.drivers.net import Gso, Packet, Xn, netif
from xenbus.drivers.net.netif import RX_EXTRA_INFO, RX_MORE_DATA
from xenbus.drivers.net.xn_rx import BATCH, WORK_PER_WAKEUP
from xenbus.errors import HypervisorError
from xenbus.hypervisor.limits import Limits
from xenbus.ring.shared import RSP_PROD

S = XenbusState
GSO = netif.gso_extra(Gso.TCPV6, 1428)


def offering(**offers):
    said = {key.replace("_", "-"): value for key, value in offers.items()}
    return type("RawBack", (RawBack,), {"offers": {**RawBack.offers, **said}})


async def still_receives(r, back, slot):
    """A good packet in that slot."""
    await back.fill(slot, frame(77))
    await back.give((back.posted[slot][0], 0, 0, 77))
    assert (await r.near.get(5)).data == frame(77)


def more(extra: bytes) -> bytes:
    return extra[:1] + b"\1" + extra[2:]


WRONG = [
    ("too short", [(0, 0, 0, 13)], "length"),
    ("longer than the MTU", [(0, 0, 0, 1519)], "length"),
    ("over its page", [(0, 4090, 0, 60)], "frame"),
    ("more than a page", [(0, 0, 0, 4097)], "frame"),
    ("an error", [(0, 0, 0, -1)], "copy"),
    ("unknown flags", [(0, 0, 0x20, 60)], "frame"),
    ("a GSO prefix", [(0, 0, 0x10, 60)], "frame"),
    ("another slot's id", [(5, 0, 0, 60)], "frame"),
    ("too long in pieces", [(0, 0, RX_MORE_DATA, 4096), (1, 0, 0, 4096)], "length"),
    ("an error in a piece", [(0, 0, RX_MORE_DATA, 4096), (1, 0, 0, -5)], "copy"),
    ("18 pages", [(n, 0, RX_MORE_DATA if n < 17 else 0, 4096) for n in range(18)], "length"),
    ("19 slots", [(n, 0, RX_MORE_DATA if n < 18 else 0, 100) for n in range(19)], "length"),
    ("extra info of no type", [(0, 0, RX_EXTRA_INFO, 60), bytes(8)], "frame"),
    (
        "extra info for a back end",
        [(0, 0, RX_EXTRA_INFO | 3, 60), netif.multicast_extra(b"\1" + bytes(5), add=True)],
        "frame",
    ),
    ("GSO twice", [(0, 0, RX_EXTRA_INFO | 3, 60), more(GSO), GSO], "frame"),
    ("GSO of no type", [(0, 0, RX_EXTRA_INFO, 60), b"\1\0\xa8\5\3\0\0\0"], "frame"),
    ("GSO of what is no TCP", [(0, 0, RX_EXTRA_INFO, 60), GSO], "frame"),
]


@pytest.mark.parametrize(("responses", "kind"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_packets_are_dropped(responses, kind):
    async def check(r, back):
        await back.give(*responses)
        counters = r.front.counters
        await until(lambda: counters.rx_errors)
        assert (counters.rx_errors, getattr(counters, f"rx_{kind}_errors")) == (1, 1)
        assert counters.last_error
        await still_receives(r, back, len(responses))
        assert r.front_dev.state is S.CONNECTED

    with_raw_back(check)


def test_a_chain_in_pieces():
    async def check(r, back):
        await back.fill(0, b"a" * 1000)
        await back.fill(1, b"b" * 500)
        await back.give((0, 0, RX_MORE_DATA, 1000))
        await back.give((1, 0, 0, 500))
        assert (await r.near.get(5)).data == b"a" * 1000 + b"b" * 500

    with_raw_back(check)


BROKEN = [
    ("a response for nothing", lambda back: back.answer(77, 0), "request 77, which is not in flight"),
    ("one twice", lambda back: [back.answer(back.requests[0][3], 0) for _ in range(2)], "not in flight"),
]


@pytest.mark.parametrize(("lie", "says"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_wrong_ids_end_the_device(lie, says):
    async def check(r, back):
        for _ in range(2):
            await r.near.put(frame(60))
        await until(lambda: len(back.requests) == 2)
        lie(back)
        back.push()
        # Nobody hurries to read responses: the next packets do, once pages run short, or a detach.
        r.near.put_many([Packet(frame(60))] * 40)
        await until(lambda: r.front_dev.state in (S.CLOSING, S.CLOSED))
        assert says in await r.error_of(r.fnode)
        await until(lambda: r.near.peer is None)

    with_raw_back(check)


@pytest.mark.parametrize("ring", ["tx", "rx"])
def test_an_index_that_jumps_ends_the_device(ring):
    async def check(r, back):
        getattr(back, ring).words[RSP_PROD] = 4000
        back.channel.notify()
        r.near.put_many([Packet(frame(60))] * 40)
        await until(lambda: r.front_dev.state in (S.CLOSING, S.CLOSED))
        assert "rsp_prod jumped" in await r.error_of(r.fnode)

    with_raw_back(check)


def test_what_it_only_has_to_read_it_cannot_write():
    async def check(r, back):
        await r.near.put(frame(60))
        await until(lambda: back.requests and back.posted)
        sent, posted = back.requests[0][0], back.posted[0][1]
        with pytest.raises(HypervisorError):
            await back.dev.map_ring([sent])
        for ref, writable in ((sent, False), (posted, True)):
            await back.dev.unmap(await back.dev.map_ring([ref], writable))

    with_raw_back(check)


def test_a_packet_that_never_ends_ends_the_device():
    async def check(r, back):
        await until(lambda: len(back.posted) >= 32)
        await back.give(*((n, 0, RX_MORE_DATA, 10) for n in range(32)))
        await until(lambda: r.front_dev.state in (S.CLOSING, S.CLOSED))
        assert "does not end" in await r.error_of(r.fnode)

    with_raw_back(check)


def test_a_back_end_that_goes_on_while_it_is_served_does_not_keep_the_loop():
    """Another CPU answers as fast as we post."""

    async def check(r, back):
        await back.fill(0, frame(60))  # whatever is in the others
        loop, taken, turns = asyncio.get_running_loop(), 0, [0]
        real = r.near.send

        def more():
            back.kicked()
            for slot, _ in back.posted if taken < 5000 else ():
                back.rx.put_response(netif.RX_RESPONSE.pack(slot, 0, 0, 60))
            back.posted.clear()
            back.rx.push_responses()

        def send(packets):
            nonlocal taken
            taken += len(packets)
            turns[-1] += len(packets)
            more()
            return real(packets)

        def turn():
            turns.append(0)
            if taken < 5000:
                loop.call_soon(turn)

        r.near.send = send
        loop.call_soon(turn)
        more()
        back.channel.notify()
        await until(lambda: taken >= 5000)
        assert max(turns) <= WORK_PER_WAKEUP + BATCH

    with_raw_back(check)


def test_errors_for_what_was_sent_are_counted():
    async def check(r, back):
        for size in (60, 61):
            await r.near.put(frame(size))
        await until(lambda: len(back.requests) == 2)
        for (*_, ident, _), status in zip(back.requests, (-1, -2), strict=True):
            back.answer(ident, status)
        back.push()
        r.near.put_many([Packet(frame(60))] * 40)
        await until(lambda: r.front.counters.tx_errors == 2)
        assert "answered -2" in r.front.counters.last_error

    with_raw_back(check)


def test_a_back_end_that_answers_nothing():
    """What goes out is what the ring holds; then the port waits, and in the end its packets are dropped."""

    async def check(r, back):
        r.front.cable.stall = 0.05
        for _ in range(300):
            await r.near.put(frame(60))
        counters = r.front.counters
        assert (counters.tx_stalls, counters.tx_packets, counters.tx_dropped) == (1, 256, 44)
        assert len(back.requests) == 256

    with_raw_back(check)


OFFERS = [
    ({}, 9000, (True, False), (True, False)),
    ({"feature_sg": 0}, 1500, (True, False), (False, False)),
    ({"feature_no_csum_offload": 1}, 9000, (False, False), (False, False)),
    ({"feature_ipv6_csum_offload": 1, "feature_gso_tcpv6": 1}, 9000, (True, True), (True, True)),
    ({"feature_gso_tcpv6": 1}, 9000, (True, False), (True, False)),
]


@pytest.mark.parametrize(("offers", "mtu", "csum", "tso"), OFFERS)
def test_a_front_makes_use_of_what_there_is(offers, mtu, csum, tso):
    async def run():
        async with rig(back=offering(**offers)) as r:
            await r.plug(mtu="9000")
            await r.states(S.CONNECTED, S.CONNECTED)
            link = await r.near.linked(5)
            assert link.mtu == mtu
            assert (link.offloads.csum, link.offloads.csum6) == csum
            assert (link.offloads.tso4, link.offloads.tso6) == tso

    asyncio.run(run())


def test_a_back_end_that_flips_pages_is_refused():
    async def run():
        async with rig(back=offering(feature_rx_copy=0)) as r:
            await r.plug()
            await until(lambda: r.guest.front.devices)
            await until(lambda: r.front_dev.state in (S.CLOSING, S.CLOSED))
            assert "feature-rx-copy is not 1" in await r.error_of(r.fnode)
            await r.gone()

    asyncio.run(run())


def test_a_gso_packet_without_a_blank_checksum_is_put_right():
    """As old netfronts and netbacks send it; a real TCP packet, since its pseudo header is summed."""
    ip = bytes.fromhex("450005dc000040004006") + bytes(2) + bytes([10, 0, 0, 1, 10, 0, 0, 2])
    tcp = bytes.fromhex("03e8001600000000000000005010ffff1234") + bytes(2)
    data = frame(14)[:12] + b"\x08\x00" + ip + tcp + bytes(1460)

    async def check(r, back):
        await back.fill(0, data)
        await back.give((0, 0, RX_EXTRA_INFO, len(data)), netif.gso_extra(Gso.TCPV4, 500))
        packet = await r.near.get(5)
        assert (packet.gso, packet.gso_size, packet.csum_blank) == (Gso.TCPV4, 500, True)
        assert packet.data[:50] + packet.data[52:] == data[:50] + data[52:]
        assert packet.data[50:52] != b"\x12\x34"
        assert r.front.counters.rx_gso_checksum_fixup == 1

    with_raw_back(check)


def test_without_pages_there_is_no_device_but_an_error():
    """The domain may grant no more: the device closes, and says why."""

    class Poor(Xn):
        async def _initialise(self):
            self.dev.hv._machine.limits = Limits(granted_pages=3)
            await super()._initialise()

    async def run():
        async with rig(front=Poor) as r:
            await r.plug()
            await until(lambda: r.guest.front.devices)
            await until(lambda: r.front_dev.state in (S.CLOSING, S.CLOSED))
            assert "granting" in await r.error_of(r.fnode)
            await r.gone()

    asyncio.run(run())


def test_with_few_pages_there_are_short_packets():
    """What will never fit is dropped, and keeps nothing else waiting."""

    class Poor(Xn):
        async def _initialise(self):
            self.dev.hv._machine.limits = Limits(granted_pages=1 + 2 + 12)
            await super()._initialise()

    async def run():
        async with rig(front=Poor) as r:
            await r.up(mtu="9000")
            r.back.cable.stall = 0.05
            assert [len(pool.pages) for pool in r.front._links[0]._pools] == [8, 4]
            for back in (False, True):
                for size in (60, 9014):
                    for n in range(30):
                        assert (await r.exchange(frame(size, n), back=back)).data == frame(size, n)
            await r.near.put(Packet(frame(65535), True, True, Gso.TCPV4, 1448))
            assert (await r.exchange(frame(61))).data == frame(61)
            assert r.front.counters.tx_errors == 1
            await r.far.put(Packet(frame(20000), True, True, Gso.TCPV4, 1448))
            for n in range(30):
                assert (await r.exchange(frame(62, n), back=True)).data == frame(62, n)
            assert r.back.counters.tx_stalls == 1
            assert r.back.counters.tx_dropped == 1
            await r.gone()

    asyncio.run(run())
