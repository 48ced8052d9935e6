"""xnb against a front end that lies: dropped and counted; good packets and other guests are served."""

from __future__ import annotations

import asyncio

import pytest
from tests.drivers.net.test_chain import ADD, GSO, WRONG, extra
from tests.support.ip_frames import ether, ipv4, tcp
from tests.support.raw_vif import DATA_PAGES, lying, still_serves, with_raw_front
from tests.support.until import until
from tests.support.vif import frame, rig

from xenbus.bus import XenbusState
from xenbus.drivers.net import Gso, Packet, cable, netif, xnb_pages
from xenbus.drivers.net.netif import (
    NETIF_RSP_ERROR,
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    TX_EXTRA_INFO,
    TX_MORE_DATA,
)
from xenbus.ring.shared import REQ_PROD

S = XenbusState
pytestmark = pytest.mark.usefixtures("either_way")


@pytest.mark.parametrize(("raw", "kind"), [case[1:3] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_packets_are_answered_with_an_error(raw, kind):
    async def check(r, front):
        slots = len(raw) // netif.TX_SLOT_SIZE
        for n in range(slots):
            front.put_extra(raw[n * netif.TX_SLOT_SIZE : (n + 1) * netif.TX_SLOT_SIZE])
        front.push()
        answers = await front.answered(slots)
        assert {status for _, status in answers} <= {NETIF_RSP_ERROR, NETIF_RSP_NULL}
        assert answers[0][1] == NETIF_RSP_ERROR
        counters = r.back.counters
        assert (counters.rx_errors, getattr(counters, f"rx_{kind}_errors")) == (1, 1)
        assert counters.last_error
        await still_serves(r, front)
        assert r.back_dev.state is S.CONNECTED

    with_raw_front(check)


@pytest.mark.parametrize("ref", [7, 12345, 2**32 - 1])
def test_a_page_that_was_never_granted(ref):
    """Its packet is lost; the one before it and the one after it, of the same batch, are not."""

    async def check(r, front):
        front.data.view[:60], front.data.view[4096 : 4096 + 61] = frame(60), frame(61)
        front.put(60, ident=1)
        front.put(60, ref=ref, ident=2)
        front.put(5000, page=2, ident=3, flags=TX_MORE_DATA)
        front.put(1000, ref=ref, ident=4)
        front.put(61, page=1, ident=5)
        front.push()
        error = NETIF_RSP_ERROR
        assert await front.answered(5) == [(1, 0), (2, error), (3, error), (4, error), (5, 0)]
        assert [(await r.far.get(5)).data for _ in range(2)] == [frame(60), frame(61)]
        assert r.back.counters.rx_copy_errors == 2
        await still_serves(r, front)

    with_raw_front(check, mtu="9000")


def test_a_page_may_be_granted_later():
    """What was refused once is asked for again: a guest may use a reference anew."""

    async def check(r, front):
        ref = front.data.refs[-1] + 1
        front.put(60, ref=ref)
        front.push()
        assert (await front.answered(1))[0][1] == NETIF_RSP_ERROR
        pages = await front.dev.grant_ring(1)
        assert pages.refs == (ref,)
        pages.view[:60] = frame(60, 3)
        front.put(60, ref=ref)
        front.push()
        assert (await r.far.get(5)).data == frame(60, 3)

    with_raw_front(check)


def test_pages_to_receive_into_that_were_never_granted():
    async def check(r, front):
        front.post(0)
        front.post(0, ref=4711)
        front.post(1)
        front.push()
        for n in range(3):
            await r.far.put(frame(60, n))
        await until(lambda: len(front.received) == 3)
        assert [status for *_, status in front.received] == [60, NETIF_RSP_ERROR, 60]
        assert r.back.counters.tx_copy_errors == 1
        await still_serves(r, front)

    with_raw_front(check)


def test_a_page_to_receive_into_may_be_granted_later():
    async def check(r, front):
        ref = front.data.refs[-1] + 1
        front.post(0, ref=ref)
        front.push()
        await r.far.put(frame(60))
        await until(lambda: len(front.received) == 1)
        assert front.received[0][3] == NETIF_RSP_ERROR
        pages = await front.dev.grant_ring(1)
        assert pages.refs == (ref,)
        front.post(0, ref=ref)
        front.push()
        await r.far.put(frame(61, 3))
        await until(lambda: len(front.received) == 2)
        assert bytes(pages.view[:61]) == frame(61, 3)

    with_raw_front(check)


def test_ever_new_pages_are_not_all_kept():
    """A front that names other pages each time: what is mapped for it is bounded."""

    async def check(r, front):
        for n in range(12):
            pages = await front.dev.grant_ring(64)
            for ref in pages.refs:
                front.put(60, ref=ref)
                front.post(0, ref=ref)
            front.push()
            await front.answered(64 * (n + 1))
            for _ in range(64):
                await r.far.get(5)
                await r.far.put(frame(60))
            await until(lambda n=n: len(front.received) == 64 * (n + 1))
            assert r.back_dev.counts()["mapped_pages"] <= 2 + 2 * 512
        assert not r.back.counters.rx_errors + r.back.counters.tx_errors
        await still_serves(r, front)

    with_raw_front(check)


def test_a_chain_in_pieces():
    """Its end comes later: nothing is lost, and nothing else waits for it but what is behind it."""

    async def check(r, front):
        for page in range(3):
            front.data.view[page * 4096 : (page + 1) * 4096] = bytes([page]) * 4096
        front.put(3 * 4096, flags=TX_MORE_DATA)
        front.push()
        front.put(4096, page=1, flags=TX_MORE_DATA)
        front.post(5)
        front.push()
        await r.far.put(frame(60))  # the loop has gone round
        await until(lambda: front.received)
        assert not front.answers
        front.put(4096, page=2)
        front.push()
        assert (await r.far.get(5)).data == b"".join(bytes([page]) * 4096 for page in range(3))

    with_raw_front(check, mtu="16000")


@pytest.mark.parametrize("kind", ["data", "extra info", "req_prod", "rx req_prod"])
def test_what_breaks_a_ring_ends_the_device(kind):
    async def check(r, front):
        if kind == "data":
            for _ in range(64):
                front.put(60, flags=TX_MORE_DATA)
        elif kind == "extra info":
            front.put(60, flags=TX_EXTRA_INFO)
            for _ in range(64):
                front.put_extra(extra(GSO, True))
        elif kind == "req_prod":
            front.tx.words[REQ_PROD] = 5000
        else:
            front.rx.words[REQ_PROD] = 5000
        front.push()
        if "req_prod" in kind:
            ring = front.rx if "rx" in kind else front.tx
            ring.words[REQ_PROD] = 5000
            front.channel.notify()
        await until(lambda: r.back_dev.state in (S.CLOSING, S.CLOSED))
        await until(lambda: not r.back_dev.counts()["mapped_pages"])
        error = await r.error_of(r.bnode)
        assert "req_prod jumped" in error if "req_prod" in kind else "does not end" in error
        assert r.far.peer is None

    with_raw_front(check)


LIES = [
    ({"request-rx-copy": 0}, "request-rx-copy is not 1"),
    ({"request-rx-copy": None}, "request-rx-copy is not 1"),
    ({"tx-ring-ref": None}, "tx-ring-ref is missing"),
    ({"rx-ring-ref": "tx-ring-ref"}, "is that of tx-ring-ref already"),
    ({"tx-ring-ref": 9999}, "grant 9999"),
    ({"tx-ring-ref": "x"}, "is not a number"),
    ({"event-channel": None}, "event-channel is missing"),
    ({"event-channel": 4000}, "4000"),
    ({"event-channel-tx": 1, "event-channel-rx": 1}, "is that of event-channel-tx already"),
    ({"multi-queue-num-queues": 0}, "0, 1 to 4 it can be"),
    ({"multi-queue-num-queues": 5}, "5, 1 to 4 it can be"),
    ({"multi-queue-num-queues": 2}, "queue-0/tx-ring-ref is missing"),
]


@pytest.mark.parametrize(("lies", "says"), LIES, ids=lambda value: str(value))
def test_parameters_that_make_no_sense(lies, says):
    async def run():
        async with rig(front=lying(lies=lies)) as r:
            await r.plug()
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            await until(lambda: r.back_dev.state in (S.CLOSING, S.CLOSED))
            assert says in await r.error_of(r.bnode)
            await r.gone()

    asyncio.run(run())


@pytest.mark.parametrize("key", ["event-channel-tx", "event-channel-rx"])
def test_half_a_pair_of_ports_is_none(key):
    """As with netback: then the one port serves both directions."""

    async def check(r, front):
        await still_serves(r, front)

    with_raw_front(check, front=lying(lies={key: "event-channel"}))


def test_a_ring_that_is_never_refilled():
    """The guest takes three packets and no more: what waits is dropped, until it takes some again."""

    async def check(r, front):
        r.back.cable.stall = 0.05
        for page in range(3):
            front.post(page)
        front.push()
        for n in range(3):
            await r.far.put(frame(60, n))
        packets = [Packet(frame(60))] * 10
        assert r.far.put_many(packets) == 0
        assert r.back.cable.waiting == 0
        await r.far.put(frame(61))  # goes once the guest was given up
        counters = r.back.counters
        assert counters.tx_stalls == 1
        assert r.far.put_many(packets) == 10
        assert counters.tx_dropped == 11
        front.post(3)
        front.push()
        await until(lambda: not r.back.cable._stalled)
        await r.far.put(frame(62))
        await until(lambda: len(front.received) == 4)
        await still_serves(r, front)

    with_raw_front(check)


def test_a_long_packet_waits_for_all_its_pages():
    """They come in portions: it goes once there are enough, and not before."""

    async def check(r, front):
        packet = Packet(frame(65535), True, True, Gso.TCPV4, 1448)
        task = asyncio.ensure_future(r.far.put(packet))
        for page in range(17):
            assert not front.received
            front.post(page)
            if front.rx.push_requests():  # as a good front: only where it is asked for
                front.channel.notify()
            await until(lambda page=page: len(r.back._links[0].rx._posted) == page + 1 or front.received)
        await task
        await until(lambda: len(front.received) == 17)
        got = [bytes(front.data.view[n * 4096 : (n + 1) * 4096]) for n in range(17) if n != 1]
        assert b"".join(got)[:65535] == frame(65535)

    with_raw_front(check)


def test_a_whole_ring_of_long_packets_in_one_call():
    """More bytes than one grant copy has room for."""

    async def check(r, front):
        for n in range(256):
            front.post(n % DATA_PAGES)
        front.push()
        await until(lambda: len(r.back._links[0].rx._posted) == 256)
        packets = [Packet(frame(65535, n), True, True, Gso.TCPV4, 1448) for n in range(15)]
        assert r.far.put_many(packets) == 15
        await until(lambda: len(front.received) == 255)
        assert r.back.counters.tx_packets == 15

    with_raw_front(check)


def test_what_comes_while_pages_are_brought_does_not_overtake():
    async def check(r, front):
        await still_serves(r, front)  # page 0 is known from here on
        tx = r.back._links[0].tx
        front.data.view[4096 : 4096 + 61] = frame(61)
        for page, size in ((1, 61), (0, 60)):
            front.put(size, page=page)
            front.push()
            tx.kick()
        assert [len((await r.far.get(5)).data) for _ in range(2)] == [61, 60]

    with_raw_front(check)


def test_pages_that_are_known_do_not_wait_for_new_ones_behind_them(either_way):
    async def check(r, front):
        rx = r.back._links[0].rx
        for page in (0, 1):
            front.post(page)
        front.push()
        await until(lambda: len(rx._posted) == 2)
        sent = [Packet(frame(60 + n)) for n in range(6)]
        assert r.far.put_many(sent[:2]) == 2
        for page in (0, 1, 2, 0):
            front.post(page)
        front.push()
        # Nothing is mapped in here: the loop has no turn.
        taken = r.far.put_many(sent[2:])
        assert taken == (2 if either_way == "mapped" else 4)
        for packet in sent[2 + taken :]:
            await r.far.put(packet, 5)
        await until(lambda: len(front.received) == 6)
        assert [size for *_, size in front.received] == [60 + n for n in range(6)]

    with_raw_front(check)


def test_pages_that_are_let_go_of_for_new_ones_are_not_used_meanwhile(monkeypatch):
    monkeypatch.setattr(xnb_pages, "KEPT", 6)

    async def check(r, front):
        for page in range(6):
            front.post(page)
        front.push()
        await until(lambda: len(r.back._links[0].rx._posted) == 6)
        for n in range(100):
            front.post((n + 6) % DATA_PAGES)
            front.push()
            await r.far.put(frame(60 + n), 5)
            await asyncio.sleep(0)  # mappings come and go in between
        await until(lambda: len(front.received) == 100)
        assert [size for *_, size in front.received] == [60 + n for n in range(100)]
        assert not r.back.counters.tx_errors

    with_raw_front(check)


def test_frames_longer_than_the_mtu_are_refused_and_long_tcp_is_not():
    """1500 bytes behind the header, and a VLAN's tag."""

    async def check(r, front):
        front.data.view[:5000] = (ether(ipv4(tcp(bytes(6000)), 6)))[:5000]
        front.put(1518, ident=1)
        front.put(1519, ident=2)
        front.put(5000, ident=3, flags=TX_MORE_DATA)
        front.put(904, page=1, ident=4)
        front.put(5000, ident=5, flags=TX_MORE_DATA | TX_EXTRA_INFO | 3)
        front.put_extra(GSO.ljust(netif.TX_SLOT_SIZE, b"\0"))
        front.put(904, page=1, ident=6)
        front.push()
        bad = NETIF_RSP_ERROR
        assert await front.answered(7) == [
            (1, 0),
            (2, bad),
            (3, bad),
            (4, bad),
            (5, 0),
            (0, NETIF_RSP_NULL),
            (6, 0),
        ]
        assert [len((await r.far.get(5)).data) for _ in range(2)] == [1518, 5000]
        assert r.back.counters.rx_length_errors == r.back.counters.rx_errors == 2

    with_raw_front(check)


SILENT = lying(lies={"feature-rx-notify": None})


def test_without_rx_notify_packets_wait_for_a_moment_only():
    """It may never say that there is room: what waits is dropped soon; what it posts is found."""

    async def check(r, front):
        front.post(0)
        front.push()
        await until(lambda: r.back._links[0].rx._posted)
        await r.far.put(frame(60))
        await r.far.put(frame(61))  # once the first wait is over
        await until(lambda: r.back.counters.tx_dropped == 1)
        assert r.back.counters.tx_stalls == 1 and r.back.cable.waiting == 0
        for size in (62, 63):
            front.post(0)
            front.rx.push_requests()  # and no kick
            await r.far.put(frame(size))
        await until(lambda: len(front.received) == 3)
        assert [size for *_, size in front.received] == [60, 62, 63]
        await still_serves(r, front)

    with_raw_front(check, front=SILENT)


def test_without_rx_notify_a_front_that_kicks_loses_nothing(monkeypatch):
    """As mini-os's does."""
    monkeypatch.setattr(cable, "STALL_SILENT", 5.0)

    async def check(r, front):
        task = asyncio.ensure_future(transfer(r))
        for n in range(20):
            front.post(n)
            front.push()
            await until(lambda n=n: len(front.received) == n + 1)
        await task
        assert not r.back.counters.tx_dropped

    async def transfer(r):
        for n in range(20):
            await r.far.put(frame(60 + n))

    with_raw_front(check, front=SILENT)


def test_a_front_without_sg_gets_no_chains():
    async def check(r, front):
        assert r.far.peer.mtu == 1500
        await r.far.put(Packet(frame(9000), True, True, Gso.TCPV4, 1448))
        await r.far.put(frame(9000))
        await still_serves(r, front)
        assert len(front.received) == 1
        assert r.back.counters.tx_errors == 2

    with_raw_front(check, front=lying(lies={"feature-sg": 0}), mtu="9000")


def test_groups_are_bounded():
    async def check(r, front):
        for n in range(100):
            front.put(0, flags=TX_EXTRA_INFO, ident=n)
            front.put_extra(extra(ADD[:6] + n.to_bytes(2, "big")))
            front.push()
            await front.answered(2 * n + 2)
        answers = [status for _, status in front.answers]
        assert answers[::2] == [NETIF_RSP_OKAY] * 64 + [NETIF_RSP_ERROR] * 36
        assert answers[1::2] == [NETIF_RSP_NULL] * 100
        assert len(r.back.multicast.groups) == 64
        await still_serves(r, front)

    with_raw_front(check)
