"""Slots of the transmit ring taken apart: whatever a guest puts there, every packet that xn could make."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenbus.drivers.net import netif
from xenbus.drivers.net.netif import TX_EXTRA_INFO, TX_MORE_DATA, TX_REQUEST, BadPacket
from xenbus.drivers.net.packet import Gso
from xenbus.drivers.net.xnb_chain import EXTRA, split
from xenbus.errors import PeerError

SLOT = netif.TX_SLOT_SIZE
HEADER = Path("/usr/include/xen/io/netif.h")


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


LAYOUT = """
#include <stdint.h>
#include <stdio.h>
#include <stddef.h>
typedef uint32_t grant_ref_t;
typedef unsigned int RING_IDX;
#define xen_mb()
#define xen_wmb()
#define xen_rmb()
#include <xen/xen.h>
#include <xen/io/netif.h>
#define O(s, f) printf(#s "." #f " %zu\\n", offsetof(struct s, f))
int main(void) {
  printf("tx %zu\\nrx %zu\\nextra %zu\\n", sizeof(union netif_tx_sring_entry),
         sizeof(union netif_rx_sring_entry), sizeof(struct netif_extra_info));
  O(netif_tx_request, gref); O(netif_tx_request, offset); O(netif_tx_request, flags);
  O(netif_tx_request, id); O(netif_tx_request, size); O(netif_rx_request, gref);
  O(netif_rx_response, offset); O(netif_rx_response, flags); O(netif_rx_response, status);
  O(netif_extra_info, u.gso.size); O(netif_extra_info, u.gso.type); O(netif_extra_info, u.mcast.addr);
  return 0;
}
"""


def test_layout_is_the_header_s(tmp_path):
    """What a compiler makes of Debian's header."""
    if not HEADER.exists():
        pytest.skip("libxen-dev is not installed")
    (tmp_path / "layout.c").write_text(LAYOUT)
    built = subprocess.run(["cc", "-o", "layout", "layout.c"], cwd=tmp_path, capture_output=True, text=True)
    assert not built.returncode, built.stderr
    said = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    found = dict(line.split() for line in said.splitlines())
    assert found["tx"] == str(netif.TX_SLOT_SIZE) == str(TX_REQUEST.size)
    assert found["rx"] == str(netif.RX_SLOT_SIZE) == str(netif.RX_RESPONSE.size)
    assert found["extra"] == str(netif.EXTRA_SIZE) == str(len(GSO)) == str(len(ADD))
    order = ["gref", "offset", "flags", "id", "size"]
    assert [found[f"netif_tx_request.{name}"] for name in order] == ["0", "4", "6", "8", "10"]
    assert found["netif_rx_request.gref"] == "4"
    assert [found[f"netif_rx_response.{name}"] for name in ("offset", "flags", "status")] == ["2", "4", "6"]
    assert (GSO[2:4], GSO[4]) == ((1448).to_bytes(2, "little"), 1)
    assert (found["netif_extra_info.u.gso.size"], found["netif_extra_info.u.gso.type"]) == ("2", "4")
    assert found["netif_extra_info.u.mcast.addr"] == "2"
