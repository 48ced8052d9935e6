"""Frames: headers found, checksums and segments, each beside a computation of its own."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.ip_frames import ETHER, V4, V6, ether, ipv4, ipv6, summed, tcp, udp, words

from xenbus.drivers.net.frames import (
    LOWERED_MAX,
    SEGMENTS_MAX,
    blank_value,
    checksum_at,
    complete,
    is_valid,
    layout_of,
    lower,
    lower_all,
    network_of,
    ones_sum,
    segment,
    segments_of,
)
from xenbus.drivers.net.packet import ALL, PLAIN, Gso, Offloads, Packet

LENGTHS = st.binary(min_size=0, max_size=600)
TAGS = st.sampled_from([(), (0x8100,), (0x88A8, 0x8100)])
OPTIONS = st.integers(0, 10).map(lambda n: b"\1" * 4 * n)


@given(LENGTHS)
def test_the_sum_is_that_of_the_words(data):
    assert ones_sum(data) == words(data) % 0xFFFF


@given(LENGTHS, TAGS, OPTIONS, OPTIONS, st.booleans(), st.binary(max_size=20))
def test_a_completed_checksum_is_right_by_the_book(payload, tags, ip_options, options, is_tcp, padding):
    for addresses, make in ((V4, lambda t, p: ipv4(t, p, ip_options)), (V6, ipv6)):
        protocol = 6 if is_tcp else 17
        transport = tcp(payload, options=options) if is_tcp else udp(payload)
        data = bytearray(ether(make(transport, protocol), tags) + padding)
        layout = layout_of(data)
        assert layout.protocol == protocol and layout.end == len(data) - len(padding)
        complete(data, layout)
        done = bytes(data[layout.transport : layout.end])
        assert summed(data, addresses[0] + addresses[1], protocol, done) == 0xFFFF
        assert is_valid(data) is True
        assert bytes(data[: layout.checksum]) == ether(make(transport, protocol), tags)[: layout.checksum]
        # The kernel goes on from the blank value, and has to come to the same.
        field = slice(layout.checksum, layout.checksum + 2)
        final, data[field] = bytes(data[field]), struct.pack(">H", blank_value(data, layout))
        went_on = 0xFFFF ^ words(bytes(data[layout.transport : layout.end]))
        assert went_on % 0xFFFF == int.from_bytes(final, "big") % 0xFFFF


@given(LENGTHS.filter(len), st.data())
def test_one_wrong_bit_is_seen(payload, data):
    sent = bytearray(ether(ipv6(tcp(payload), 6)))
    complete(sent, layout_of(sent))
    at = data.draw(st.integers(len(sent) - len(payload), len(sent) - 1))
    sent[at] ^= 1 << data.draw(st.integers(0, 7))
    assert is_valid(sent) is False


def test_udp_whose_sum_is_zero_is_sent_as_ffff():
    def datagram(value):
        return bytearray(ether(ipv4(udp(struct.pack(">H", value)), 17)))

    def total(data):
        return words(V4[0] + V4[1] + struct.pack(">II", 10, 17) + bytes(data[34:]))

    data = datagram(0xFFFF - total(datagram(0)))
    assert total(data) == 0xFFFF
    complete(data, layout_of(data))
    assert data[40:42] == b"\xff\xff" and is_valid(data)


def test_udp_without_a_checksum():
    assert is_valid(ether(ipv4(udp(b"x"), 17))) is None
    assert is_valid(ether(ipv6(udp(b"x"), 17))) is False


def test_udp_that_is_shorter_than_its_packet():
    data = bytearray(ether(ipv4(udp(b"abcdef", length=10), 17)))
    complete(data, layout_of(data))
    assert summed(data, V4[0] + V4[1], 17, bytes(data[34:44])) == 0xFFFF


@pytest.mark.parametrize(
    "extensions",
    [
        [(0, bytes([0]) + bytes(6))],
        [(60, bytes([2]) + bytes(22)), (43, bytes([0, 4, 0]) + bytes(4))],
        [(51, bytes([4]) + bytes(22))],  # AH counts in fours
        [(0, bytes([0]) + bytes(6)), (60, bytes([0]) + bytes(6)), (135, bytes([1]) + bytes(14))],
    ],
)
def test_extension_headers_are_passed_over(extensions):
    data = bytearray(ether(ipv6(tcp(b"payload"), 6, extensions)))
    layout = layout_of(data)
    assert data[layout.transport : layout.transport + 4] == b"\0\1\0\2"
    complete(data, layout)
    assert summed(data, V6[0] + V6[1], 6, bytes(data[layout.transport :])) == 0xFFFF


@pytest.mark.parametrize(("kind", "last_first"), [(0, False), (2, False), (4, True)])
def test_a_routing_header_names_the_destination_that_is_summed(kind, last_first):
    final, other = bytes(range(32, 48)), bytes(range(48, 64))
    hops = final + other if last_first else other + final
    data = bytearray(ether(ipv6(udp(b"on its way"), 17, [(43, bytes([4, kind, 1, 0, 0, 0, 0]) + hops)])))
    layout = layout_of(data)
    complete(data, layout)
    assert summed(data, V6[0] + final, 17, bytes(data[layout.transport :])) == 0xFFFF


@pytest.mark.parametrize(
    "data",
    [
        b"",
        ETHER,
        ETHER + b"\x08\x06" + bytes(40),  # ARP
        ether(ipv4(tcp(b""), 6))[:30],
        ether(ipv4(tcp(b""), 6))[:-1],  # IP's length is more than there is
        ether(ipv4(tcp(b""), 6, length=30)),  # and too short for TCP
        ether(ipv4(b"ping", 1)),
        ether(ipv4(tcp(b"x"), 6))[:20] + b"\x20\0" + ether(ipv4(tcp(b"x"), 6))[22:],  # a fragment
        ether(b"\x41" + ipv4(tcp(b""), 6)[1:]),  # a header of four bytes
        ether(ipv6(bytes(8) + tcp(b""), 6, [(44, bytes(7))])),
        ether(ipv6(tcp(b""), 6, [(60, bytes([255]) + bytes(6))])),  # an extension longer than the packet
        ether(ipv6(tcp(b""), 6, [(60, bytes([0]) + bytes(6))] * 17)),  # a chain that does not end
        ether(ipv6(tcp(b""), 6), tags=(0x8100,) * 3),
    ],
)
def test_what_is_no_whole_tcp_or_udp_has_no_layout(data):
    assert layout_of(data) is None and is_valid(data) is None
    assert list(lower(Packet(data, csum_blank=True), PLAIN)) == []
    assert list(lower(Packet(data, csum_blank=True, gso=Gso.TCPV4, gso_size=100), PLAIN)) == []


@given(st.binary(max_size=120), st.booleans())
def test_no_bytes_make_it_raise(data, gso):
    for bytes_like in (data, bytearray(data), memoryview(ETHER + b"\x86\xdd\x60" + data)):
        layout = layout_of(bytes_like, gso=gso)
        assert layout is None or layout.transport < layout.end <= len(bytes_like)
        network_of(bytes_like)
        is_valid(bytes_like)
        for kind in Gso:
            for each in lower(Packet(bytes_like, True, gso=kind, gso_size=7), PLAIN):
                assert not each.csum_blank and each.gso is Gso.NONE


@given(
    st.binary(max_size=5000),
    st.integers(1, 3000),
    st.sampled_from([Gso.TCPV4, Gso.TCPV6]),
    st.integers(0, 0xFF),
    OPTIONS,
    TAGS,
    st.booleans(),
)
def test_segments_are_the_packet_cut(payload, size, gso, flags, options, tags, stays_blank):
    build = ipv4 if gso is Gso.TCPV4 else ipv6
    long = ether(build(tcp(payload, flags, options=options), 6), tags)
    taken = Offloads(csum=stays_blank, csum6=stays_blank)
    parts = list(lower(Packet(memoryview(long), True, gso=gso, gso_size=size), taken))
    assert len(parts) == max(1, -(-len(payload) // size))
    addresses = b"".join(V4 if gso is Gso.TCPV4 else V6)
    sequence, found = 0xFFFFFF00, b""
    for index, part in enumerate(parts):
        assert part.csum_blank is stays_blank and part.gso is Gso.NONE
        layout = layout_of(part.data)
        assert layout.end == len(part.data)
        transport = bytes(part.data[layout.transport :])
        body = transport[(transport[12] >> 4) * 4 :]
        assert struct.unpack_from(">I", transport, 4)[0] == (sequence + index * size) & 0xFFFFFFFF
        last = index == len(parts) - 1
        assert transport[13] == flags & (0xFF if last else 0xF6) & (0xFF if index == 0 else 0x7F)
        if stays_blank:
            assert struct.unpack_from(">H", transport, 16)[0] == blank_value(part.data, layout)
        else:
            assert summed(part.data, addresses, 6, transport) == 0xFFFF
        if gso is Gso.TCPV4:
            head = bytes(part.data[layout.network : layout.transport])
            assert words(head) == 0xFFFF
            assert struct.unpack_from(">H", head, 4)[0] == (0x1234 + index) & 0xFFFF
        assert len(body) == size or last
        found += body
    assert found == payload


def test_a_gso_packet_whose_length_ip_cannot_say():
    payload = bytes(60_000)
    for gso, data in (
        (Gso.TCPV4, ether(ipv4(tcp(payload), 6, length=0))),
        (Gso.TCPV6, ether(ipv6(tcp(payload), 6, length=0))),
    ):
        assert layout_of(data) is None
        parts = lower(Packet(data, True, gso=gso, gso_size=1448), PLAIN)
        assert sum(len(part.data) for part in parts) == 60_000 + len(parts) * (len(data) - 60_000)


@given(
    st.booleans(),
    st.booleans(),
    st.binary(max_size=40),
    st.integers(0, 60),
    st.integers(0, 255),
    st.booleans(),
)
def test_the_short_way_to_a_checksum_is_the_long_one(is_tcp, is_v4, payload, at, value, gso):
    """With any one byte changed, and cut anywhere."""
    transport = tcp(payload) if is_tcp else udp(payload)
    data = bytearray(ether((ipv4 if is_v4 else ipv6)(transport, 6 if is_tcp else 17)))
    data[min(at, len(data) - 1)] = value
    layout = layout_of(data, gso=gso)
    found = checksum_at(data, gso=gso)
    if layout is not None:
        assert found == (layout.version, layout.transport, layout.checksum - layout.transport)
    elif found is not None:  # the one thing that it does not look at is IP's length
        version, start, _ = found
        length = slice(16, 18) if version == 4 else slice(18, 20)
        data[length] = (len(data) - (14 if version == 4 else 54)).to_bytes(2, "big")
        data[14] = data[14] if version == 4 else 0x60
        assert layout_of(data, gso=gso).transport == start
    for short in range(len(data)):
        if (found := checksum_at(data[:short])) is not None:
            assert found[1] + found[2] + 2 <= short


def test_only_what_is_not_taken_is_touched():
    v4, v6 = ether(ipv4(tcp(b"abc"), 6)), ether(ipv6(udp(b"abc"), 17))
    plain = Packet(v4)
    assert lower(plain, PLAIN) == (plain,)
    for data, taken in ((v4, Offloads(csum=True)), (v6, Offloads(csum6=True))):
        packet = Packet(data, csum_blank=True)
        assert lower(packet, taken) == (packet,) and lower(packet, ALL) == (packet,)
        for other in (PLAIN, Offloads(csum=not taken.csum, csum6=not taken.csum6)):
            [made] = lower(packet, other)
            assert is_valid(made.data) and made.data_validated and not made.csum_blank
    long = Packet(v4, True, gso=Gso.TCPV4, gso_size=1)
    assert lower(long, ALL) == (long,)
    assert len(lower(long, Offloads(csum=True, tso6=True))) == 3


def test_a_gso_packet_of_another_kind_than_it_says_is_nothing():
    v4, v6 = ether(ipv4(tcp(b"abc"), 6)), ether(ipv6(tcp(b"abc"), 6))
    for data, gso, size in (
        (v4, Gso.TCPV6, 1),
        (v6, Gso.TCPV4, 1),
        (v4, Gso.TCPV4, 0),
        (ether(ipv4(udp(b"abc"), 17)), Gso.TCPV4, 1),
        (v4[:46] + b"\xf0" + v4[47:], Gso.TCPV4, 1),  # TCP's header longer than the packet
        (v4[:46] + b"\x40" + v4[47:], Gso.TCPV4, 1),  # and shorter than one
    ):
        assert list(lower(Packet(data, True, gso=gso, gso_size=size), PLAIN)) == []


def test_segment_of_no_payload_is_the_packet():
    data = ether(ipv4(tcp(b"", flags=0x12), 6))
    [one] = segment(data, layout_of(data), 100)
    assert is_valid(one) and len(one) == len(data)


def long_packet(payload, size):
    return Packet(ether(ipv4(tcp(bytes(payload)), 6)), True, True, Gso.TCPV4, size)


def test_tiny_segments_are_no_packet():
    """One of 64 KiB would be as many packets as it has bytes: a guest's way to keep a host at work."""
    for payload, size in ((65000, 1), (65000, 47), (4000, 1), (1400, 1)):
        packet = long_packet(payload, size)
        assert segments_of(packet) > SEGMENTS_MAX
        assert lower(packet, PLAIN) == []
    assert len(lower(long_packet(65000, 48), PLAIN)) == -(-65000 // 48)
    assert segments_of(Packet(bytes(60))) == 1


def test_a_batch_is_lowered_as_far_as_anybody_keeps_it():
    plain, wrong = Packet(bytes(60)), Packet(bytes(60), csum_blank=True)
    legs = [long_packet(4000, 4)] * 10
    found = lower_all([plain, wrong, *legs, plain], PLAIN)
    assert LOWERED_MAX <= len(found.packets) <= LOWERED_MAX + SEGMENTS_MAX
    assert (found.wrong, found.left) == (1, 9)
    # What sockets send in one batch is nothing near it.
    usual = lower_all([long_packet(65000, 1448)] * 4 + [plain], PLAIN)
    assert (len(usual.packets), usual.wrong, usual.left) == (4 * 45 + 1, 0, 0)
    taken = lower_all(legs, ALL)
    assert (list(taken.packets), taken.wrong, taken.left) == (legs, 0, 0)
