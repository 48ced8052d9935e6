"""What a guest put on its transmit ring, taken apart into packets: the slots of each, and what is wrong.

Pure: slots in, chains out. Knows the layouts of netif.h; knows no ring and no page. Nothing in a slot is
believed: sizes and offsets are those of pages, and a chain ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from xenbus.drivers.net import netif
from xenbus.drivers.net.netif import (
    EXTRAS_MAX,
    NR_SLOTS_MIN,
    PAGE_SIZE,
    TX_CSUM_BLANK,
    TX_DATA_VALIDATED,
    TX_EXTRA_INFO,
    TX_MORE_DATA,
    TX_REQUEST,
    TX_SLOT_SIZE,
    BadPacket,
)
from xenbus.drivers.net.packet import ETH_HLEN, Gso
from xenbus.errors import PeerError

# A chain with more slots of data than this is no mistake (netback's fatal_skb_slots): the ring is given up.
FATAL_SLOTS: Final = 20
# In `Chain.idents`, where extra info stood: it is answered NETIF_RSP_NULL.
EXTRA: Final = -1
_KNOWN: Final = TX_CSUM_BLANK | TX_DATA_VALIDATED | TX_MORE_DATA | TX_EXTRA_INFO


@dataclass(slots=True)
class Chain:
    """One packet, or a request that only changes the multicast filter (no pieces).

    pieces: (gref, offset, length) of its data, in order
    size:   bytes in all
    flags:  the first request's
    idents: of its slots, in the ring's order; EXTRA for extra info
    groups: (add, address), in order
    wrong:  why it is dropped
    """

    pieces: Sequence[tuple[int, int, int]]
    size: int
    flags: int
    idents: Sequence[int]
    gso: Gso = Gso.NONE
    gso_size: int = 0
    groups: list[tuple[bool, bytes]] = field(default_factory=list)
    wrong: BadPacket | None = None


def split(slots: bytes) -> tuple[list[Chain], int]:
    """The whole chains in these slots, and how many bytes those are: the rest is a chain that goes on.

    PeerError for a chain that is too long to be one.
    """
    chains: list[Chain] = []
    at, end = 0, len(slots)
    unpack, append = TX_REQUEST.unpack_from, chains.append
    while at < end:
        gref, offset, flags, ident, size = unpack(slots, at)
        if flags <= TX_CSUM_BLANK | TX_DATA_VALIDATED and size >= ETH_HLEN and offset + size <= PAGE_SIZE:
            append(Chain(((gref, offset, size),), size, flags, (ident,)))
            at += TX_SLOT_SIZE
            continue
        found = _long(slots, at)
        if found is None:
            break
        chain, at = found
        append(chain)
    return chains, at


def _long(slots: bytes, at: int) -> tuple[Chain, int] | None:
    """The chain that begins at this slot, and where the next one does; None if it does not end here."""
    gref, offset, flags, ident, size = TX_REQUEST.unpack_from(slots, at)
    chain = Chain((), size, flags, (), wrong=_wrong_flags(flags))
    idents = [ident]
    at += TX_SLOT_SIZE
    if flags & TX_EXTRA_INFO:
        end = _extras(slots, at, chain, idents)
        if end is None:
            return None
        at = end
    rest: list[tuple[int, int, int]] = []
    more = flags & TX_MORE_DATA
    while more:
        if len(rest) + 1 > FATAL_SLOTS:
            raise PeerError(f"a packet that does not end within {FATAL_SLOTS} slots")
        if at >= len(slots):
            return None
        piece_ref, start, more, ident, length = TX_REQUEST.unpack_from(slots, at)
        rest.append((piece_ref, start, length))
        idents.append(ident)
        more &= TX_MORE_DATA
        at += TX_SLOT_SIZE
    chain.idents = idents
    # The first request has the size of the whole: what is not in the others is in it.
    first = size - sum(length for _, _, length in rest)
    chain.pieces = [(gref, offset, first), *rest]
    if chain.wrong is None:
        chain.wrong = _wrong(chain, first)
    if chain.wrong is None and chain.groups and not size:
        chain.pieces = ()
    return chain, at


def _extras(slots: bytes, at: int, chain: Chain, idents: list[int]) -> int | None:
    """Reads extra info from there on. Where it ends; None if that is not here."""
    kinds = set()
    more = True
    while more:
        if len(idents) > EXTRAS_MAX * 2:
            raise PeerError(f"extra info that does not end within {len(idents) - 1} slots")
        if at >= len(slots):
            return None
        raw = slots[at : at + netif.EXTRA_SIZE]
        more = netif.extra_more(raw)
        at += TX_SLOT_SIZE
        idents.append(EXTRA)
        try:
            extra = netif.parse_extra(raw)
        except BadPacket as error:
            chain.wrong = chain.wrong or error
            continue
        if extra.kind in kinds:
            chain.wrong = chain.wrong or BadPacket("frame", f"extra info of type {extra.kind} twice")
        kinds.add(extra.kind)
        if extra.kind == netif.EXTRA_TYPE_GSO:
            chain.gso, chain.gso_size = extra.gso, extra.gso_size
        else:
            chain.groups.append((extra.kind == netif.EXTRA_TYPE_MCAST_ADD, extra.address))
    return at


def _wrong_flags(flags: int) -> BadPacket | None:
    return BadPacket("frame", f"flags {flags:#x}") if flags & ~_KNOWN else None


def _wrong(chain: Chain, first: int) -> BadPacket | None:
    size, slots = chain.size, len(chain.pieces)
    if chain.groups and not size and slots == 1:
        return None
    if size < ETH_HLEN:
        return BadPacket("length", f"a packet of {size} bytes: its header has {ETH_HLEN}")
    if slots > NR_SLOTS_MIN:
        return BadPacket("length", f"a packet of {slots} slots: {NR_SLOTS_MIN} it may have")
    if first < 0:
        return BadPacket("frame", f"a packet of {size} bytes in slots of {size - first}")
    for _, offset, length in chain.pieces:
        if offset + length > PAGE_SIZE:
            return BadPacket("frame", f"{length} bytes at {offset} of a page")
    return None
