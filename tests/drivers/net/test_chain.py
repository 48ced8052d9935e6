"""Slots of the transmit ring taken apart: whatever a guest puts there, every packet that xn could make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import c_header

from xenbus.drivers.net import netif
from xenbus.drivers.net.netif import TX_EXTRA_INFO, TX_MORE_DATA, TX_REQUEST, BadPacket
from xenbus.drivers.net.packet import MAX_FRAME, Gso
from xenbus.drivers.net.xnb_chain import EXTRA, split
from xenbus.errors import PeerError

SLOT = netif.TX_SLOT_SIZE


def slot(gref=8, offset=0, flags=0, ident=0, size=60) -> bytes:
    return TX_REQUEST.pack(gref, offset, flags, ident, size)


def extra(raw: bytes, more: bool = False) -> bytes:
    return (raw[:1] + bytes([more]) + raw[2:]).ljust(SLOT, b"\0")


GSO = netif.gso_extra(Gso.TCPV4, 1448)
ADD = netif.multicast_extra(bytes.fromhex("01005e000001"), add=True)


@st.composite
def packets(draw):
    """(slots, pieces, gso) of one good packet."""
    lengths = draw(st.lists(st.integers(1, 4096), min_size=1, max_size=18))
    lengths[0] = max(lengths[0], 14)
    while sum(lengths) > 0xFFFF:
        lengths.pop()
    pieces = [(draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 4096 - n)), n) for n in lengths]
    gso = draw(st.sampled_from([Gso.NONE, Gso.TCPV4, Gso.TCPV6]))
    flags = draw(st.integers(0, 3))
    raw = b""
    for n, (ref, offset, length) in enumerate(pieces):
        more = TX_MORE_DATA if n + 1 < len(pieces) else 0
        first = (flags | (TX_EXTRA_INFO if gso else 0)) if not n else 0
        raw += slot(ref, offset, more | first, n, length if n else sum(lengths))
        if gso and not n:
            raw += extra(netif.gso_extra(gso, 1448))
    return raw, pieces, gso, flags


@given(st.lists(packets(), max_size=6), st.data())
def test_good_packets_are_found_however_they_come(made, data):
    raw = b"".join(one[0] for one in made)
    found, rest, at = [], b"", 0
    while at < len(raw):
        step = data.draw(st.integers(1, 64)) * SLOT
        rest += raw[at : at + step]
        at += step
        chains, end = split(rest)
        found += chains
        rest = rest[end:]
    assert rest == b""
    assert len(found) == len(made)
    for chain, (slots, pieces, gso, flags) in zip(found, made, strict=True):
        assert chain.wrong is None
        assert list(chain.pieces) == pieces
        assert chain.size == sum(length for _, _, length in pieces)
        assert (chain.gso, chain.flags & 3) == (gso, flags)
        assert len(chain.idents) * SLOT == len(slots)
        assert [ident for ident in chain.idents if ident != EXTRA] == list(range(len(pieces)))


@given(st.integers(0, 200).flatmap(lambda n: st.binary(min_size=n * SLOT, max_size=n * SLOT)))
def test_nonsense_is_a_bad_packet_or_the_end(raw):
    """Every slot is accounted for, every piece lies in its page, and what is kept for later is short."""
    try:
        chains, end = split(raw)
    except PeerError:
        return
    assert sum(len(chain.idents) for chain in chains) * SLOT == end
    assert len(raw) - end <= 30 * SLOT
    for chain in chains:
        if chain.wrong is None and chain.pieces:
            assert 14 <= chain.size <= 0xFFFF
            assert len(chain.pieces) <= 18
            assert sum(length for _, _, length in chain.pieces) == chain.size
            assert all(length >= 0 and offset + length <= 4096 for _, offset, length in chain.pieces)


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 4200), st.integers(0, 70)), max_size=60))
def test_nearly_good_chains(fields):
    """As above, with slots whose flags are those that there are."""
    raw = b"".join(slot(8, offset, flags, 1, size) for flags, offset, size in fields)
    try:
        chains, end = split(raw)
    except PeerError:
        return
    assert sum(len(chain.idents) for chain in chains) * SLOT == end


WRONG = [
    ("too short", slot(size=13), "length", "13 bytes"),
    ("over its page", slot(offset=4090, size=60), "frame", "60 bytes at 4090"),
    ("over its page by its length", slot(size=4097), "frame", "4097 bytes at 0"),
    ("unknown flags", slot(flags=0x80), "frame", "flags 0x80"),
    ("less than its parts", slot(flags=TX_MORE_DATA, size=60) + slot(size=61), "frame", "slots of 61"),
    (
        "19 slots",
        slot(flags=TX_MORE_DATA, size=1800) + slot(flags=TX_MORE_DATA) * 17 + slot(),
        "length",
        "19 slots",
    ),
    ("extra of no type", slot(flags=TX_EXTRA_INFO) + extra(bytes(8)), "frame", "type 0"),
    ("extra of the hash", slot(flags=TX_EXTRA_INFO) + extra(b"\4" + bytes(7)), "frame", "type 4"),
    ("GSO of no type", slot(flags=TX_EXTRA_INFO) + extra(b"\1\0\xa8\5\3\0\0\0"), "frame", "GSO type 3"),
    ("GSO of 0", slot(flags=TX_EXTRA_INFO) + extra(b"\1\0\0\0\1\0\0\0"), "frame", "0 bytes"),
    ("GSO twice", slot(flags=TX_EXTRA_INFO) + extra(GSO, True) + extra(GSO), "frame", "twice"),
    ("no group", slot(flags=TX_EXTRA_INFO, size=0) + extra(b"\2\0" + bytes(6)), "frame", "no multicast"),
]


@pytest.mark.parametrize(
    ("raw", "kind", "says"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)
def test_wrong_packets(raw, kind, says):
    chains, end = split(raw + slot(ident=77))
    assert end == len(raw) + SLOT
    bad, good = chains
    assert isinstance(bad.wrong, BadPacket)
    assert bad.wrong.kind == kind
    assert says in str(bad.wrong)
    assert len(bad.idents) * SLOT == len(raw)
    assert good.wrong is None


@pytest.mark.parametrize(
    "raw",
    [slot(flags=TX_MORE_DATA) * 40, slot(flags=TX_EXTRA_INFO) + extra(GSO, True) * 40],
    ids=["data", "extra info"],
)
def test_what_never_ends_is_no_packet(raw):
    with pytest.raises(PeerError, match="does not end"):
        split(raw)


def test_a_request_for_the_filter_alone():
    ((chain,), end) = split(slot(flags=TX_EXTRA_INFO, size=0, ident=3) + extra(ADD))
    assert end == 2 * SLOT
    assert (chain.wrong, chain.pieces, list(chain.idents)) == (None, (), [3, EXTRA])
    assert chain.groups == [(True, bytes.fromhex("01005e000001"))]


# Name of netif.h, its value there, ours. Both of our halves take these from one table: between themselves any
# numbers would do.
NUMBERS = [
    ("NETTXF_csum_blank", 1, netif.TX_CSUM_BLANK),
    ("NETTXF_data_validated", 2, netif.TX_DATA_VALIDATED),
    ("NETTXF_more_data", 4, netif.TX_MORE_DATA),
    ("NETTXF_extra_info", 8, netif.TX_EXTRA_INFO),
    ("NETRXF_data_validated", 1, netif.RX_DATA_VALIDATED),
    ("NETRXF_csum_blank", 2, netif.RX_CSUM_BLANK),
    ("NETRXF_more_data", 4, netif.RX_MORE_DATA),
    ("NETRXF_extra_info", 8, netif.RX_EXTRA_INFO),
    ("NETIF_RSP_DROPPED", -2, netif.NETIF_RSP_DROPPED),
    ("NETIF_RSP_ERROR", -1, netif.NETIF_RSP_ERROR),
    ("NETIF_RSP_OKAY", 0, netif.NETIF_RSP_OKAY),
    ("NETIF_RSP_NULL", 1, netif.NETIF_RSP_NULL),
    ("XEN_NETIF_EXTRA_TYPE_GSO", 1, netif.EXTRA_TYPE_GSO),
    ("XEN_NETIF_EXTRA_TYPE_MCAST_ADD", 2, netif.EXTRA_TYPE_MCAST_ADD),
    ("XEN_NETIF_EXTRA_TYPE_MCAST_DEL", 3, netif.EXTRA_TYPE_MCAST_DEL),
    ("XEN_NETIF_EXTRA_TYPE_MAX", 5, netif.EXTRA_TYPE_MAX),
    ("XEN_NETIF_EXTRA_FLAG_MORE", 1, netif.EXTRA_FLAG_MORE),
    ("XEN_NETIF_GSO_TYPE_NONE", 0, Gso.NONE),
    ("XEN_NETIF_GSO_TYPE_TCPV4", 1, Gso.TCPV4),
    ("XEN_NETIF_GSO_TYPE_TCPV6", 2, Gso.TCPV6),
    ("XEN_NETIF_NR_SLOTS_MIN", 18, netif.NR_SLOTS_MIN),
    ("XEN_NETIF_MAX_TX_SIZE", 0xFFFF, MAX_FRAME),
    ("sizeof(union netif_tx_sring_entry)", 12, netif.TX_SLOT_SIZE),
    ("sizeof(union netif_rx_sring_entry)", 8, netif.RX_SLOT_SIZE),
    ("sizeof(struct netif_extra_info)", 8, netif.EXTRA_SIZE),
]
# Where what is packed with these lies: each field is a byte that counts.
FIELDS = [
    ("netif_tx_request", "gref", 0, TX_REQUEST.pack(1, 0, 0, 0, 0)),
    ("netif_tx_request", "offset", 4, TX_REQUEST.pack(0, 1, 0, 0, 0)),
    ("netif_tx_request", "flags", 6, TX_REQUEST.pack(0, 0, 1, 0, 0)),
    ("netif_tx_request", "id", 8, TX_REQUEST.pack(0, 0, 0, 1, 0)),
    ("netif_tx_request", "size", 10, TX_REQUEST.pack(0, 0, 0, 0, 1)),
    ("netif_tx_response", "id", 0, netif.TX_RESPONSE.pack(1, 0)),
    ("netif_tx_response", "status", 2, netif.TX_RESPONSE.pack(0, 1)),
    ("netif_rx_request", "id", 0, netif.RX_REQUEST.pack(1, 0)),
    ("netif_rx_request", "gref", 4, netif.RX_REQUEST.pack(0, 1)),
    ("netif_rx_response", "id", 0, netif.RX_RESPONSE.pack(1, 0, 0, 0)),
    ("netif_rx_response", "offset", 2, netif.RX_RESPONSE.pack(0, 1, 0, 0)),
    ("netif_rx_response", "flags", 4, netif.RX_RESPONSE.pack(0, 0, 1, 0)),
    ("netif_rx_response", "status", 6, netif.RX_RESPONSE.pack(0, 0, 0, 1)),
    ("netif_extra_info", "type", 0, netif.EXTRA_GSO.pack(1, 0, 0, 0, 0)),
    ("netif_extra_info", "flags", 1, netif.EXTRA_GSO.pack(0, 1, 0, 0, 0)),
    ("netif_extra_info", "u.gso.size", 2, netif.EXTRA_GSO.pack(0, 0, 1, 0, 0)),
    ("netif_extra_info", "u.gso.type", 4, netif.EXTRA_GSO.pack(0, 0, 0, 1, 0)),
    ("netif_extra_info", "u.gso.features", 6, netif.EXTRA_GSO.pack(0, 0, 0, 0, 1)),
    ("netif_extra_info", "u.mcast.addr", 2, netif.EXTRA_MCAST.pack(0, 0, b"\1")),
]


def test_numbers_and_places_are_the_header_s():
    assert [ours for _, _, ours in NUMBERS] == [value for _, value, _ in NUMBERS]
    assert [raw.index(1) for *_, raw in FIELDS] == [place for _, _, place, _ in FIELDS]


def test_the_header_has_them(tmp_path):
    places = {f"offsetof(struct {kind}, {name})": place for kind, name, place, _ in FIELDS}
    wanted = places | {f"(int)({name})": value for name, value, _ in NUMBERS}
    assert c_header.values(tmp_path, "netif.h", wanted) == wanted
