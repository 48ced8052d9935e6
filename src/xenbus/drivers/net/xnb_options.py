"""What xnb offers of what it can, device by device: one table of the nodes that a toolstack may write.

Knows names, ranges and defaults; knows no ring. docs/net.md has the table for operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from xenbus.drivers.net import netif, offers
from xenbus.drivers.options import Option, read_options

OPTIONS: Final = (
    Option("max_queues", "xnb-max-queues", 1, netif.MAX_QUEUES),
    Option("split_event_channels", "xnb-split-event-channels"),
    Option("sg", "xnb-sg"),
    Option("csum", "xnb-csum"),
    Option("ipv6_csum", "xnb-ipv6-csum"),
    Option("gso_tcpv4", "xnb-gso-tcpv4"),
    Option("gso_tcpv6", "xnb-gso-tcpv6"),
    Option("multicast_control", "xnb-multicast-control"),
    Option("dynamic_multicast_control", "xnb-dynamic-multicast-control"),
)


@dataclass(slots=True, frozen=True)
class Options:
    """An offers.Offer, of both directions, and what is a back end's alone. Flags are 0 or 1."""

    max_queues: int
    split_event_channels: int
    sg: int
    csum: int
    ipv6_csum: int
    gso_tcpv4: int
    gso_tcpv6: int
    multicast_control: int
    dynamic_multicast_control: int

    @classmethod
    def of(cls, driver: type, node: str, said: Mapping[str, bytes | None]) -> Options:
        """See read_options. UsageError that names the node, and what it may be."""
        return cls(**read_options(OPTIONS, driver, node, said))

    @property
    def dynamic(self) -> bool:
        """Whether a guest may change its filter while it is connected."""
        return bool(self.multicast_control and self.dynamic_multicast_control)

    def nodes(self) -> dict[str, object]:
        """What to publish: netif.h's names, as Linux's netback writes them."""
        return {
            **offers.nodes(self),
            "feature-rx-copy": 1,
            "feature-rx-flip": 0,
            "feature-multicast-control": self.multicast_control,
            "feature-dynamic-multicast-control": int(self.dynamic),
            "feature-split-event-channels": self.split_event_channels,
            netif.MAX_QUEUES_KEY: self.max_queues,
        }
