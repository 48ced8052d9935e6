"""What either half of a `vif` offers to take, and what comes of both offers: one table for xn and xnb.

Knows the names of netif.h's features; knows no store and no ring. An offer is of one direction: what the one
who makes it can be sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from xenbus.bus.features import Feature, Merge, Negotiated, negotiate
from xenbus.drivers.net.packet import ETH_DATA_LEN, Link, Offloads


class Offer(Protocol):
    """sg: packets of several slots; csum, ipv6_csum: blank checksums; gso_tcpv4, gso_tcpv6: long TCP packets,
    which come with sg and the checksum of that family. For a driver's own sending: what it makes use of."""

    @property
    def sg(self) -> int: ...
    @property
    def csum(self) -> int: ...
    @property
    def ipv6_csum(self) -> int: ...
    @property
    def gso_tcpv4(self) -> int: ...
    @property
    def gso_tcpv6(self) -> int: ...


FEATURES: Final = (
    Feature("sg", Merge.BOTH, peer_key="feature-sg"),
    Feature("no-csum-offload", Merge.EITHER, peer_key="feature-no-csum-offload"),
    Feature("ipv6-csum-offload", Merge.BOTH, peer_key="feature-ipv6-csum-offload"),
    Feature("gso-tcpv4", Merge.BOTH, peer_key="feature-gso-tcpv4"),
    Feature("gso-tcpv6", Merge.BOTH, peer_key="feature-gso-tcpv6"),
)
KEYS: Final = tuple(feature.peer_key for feature in FEATURES)


def offered(offer: Offer) -> dict[str, int]:
    """By the names of FEATURES."""
    return {
        "sg": int(offer.sg),
        "no-csum-offload": int(not offer.csum),
        "ipv6-csum-offload": int(offer.ipv6_csum),
        "gso-tcpv4": int(offer.gso_tcpv4 and offer.sg and offer.csum),
        "gso-tcpv6": int(offer.gso_tcpv6 and offer.sg and offer.ipv6_csum),
    }


def nodes(offer: Offer) -> dict[str, object]:
    """What to publish of it."""
    return {f"feature-{name}": value for name, value in offered(offer).items()}


def agree(ours: Offer, theirs: Mapping[str, str | None], *others: Feature, **more: int) -> Negotiated:
    """theirs: by key, as read; others: of this half alone, `more` having our part of them (`_` for `-`)"""
    mine = offered(ours) | {name.replace("_", "-"): value for name, value in more.items()}
    return negotiate((*FEATURES, *others), mine, theirs)


def link_of(agreed: Negotiated, mtu: int, mac: bytes | None) -> Link:
    """What the peer can be sent. Without sg no more than one page, and by Linux's rule not more than 1500."""
    sg = bool(agreed["sg"])
    csum, csum6 = not agreed["no-csum-offload"], bool(agreed["ipv6-csum-offload"])
    offloads = Offloads(
        csum=csum,
        csum6=csum6,
        tso4=sg and csum and bool(agreed["gso-tcpv4"]),
        tso6=sg and csum6 and bool(agreed["gso-tcpv6"]),
    )
    return Link(offloads, mtu if sg else min(mtu, ETH_DATA_LEN), mac)
