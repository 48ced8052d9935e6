"""What xnb offers of what it can, device by device: one table of the nodes that a toolstack may write.

Knows names, ranges and defaults; knows no ring. docs/net.md has the table for operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from xenbus.drivers.net import netif, offers
from xenbus.errors import UsageError


@dataclass(slots=True, frozen=True)
class Option:
    """name: of the field of Options, and of the driver's class attribute that has the default
    key: of the node in the back end's directory; least, most: what it may be"""

    name: str
    key: str
    least: int = 0
    most: int = 1


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
        """driver: has the defaults; said: the values of every key of OPTIONS, None where there is none.

        UsageError that names the node, and what it may be.
        """
        values: dict[str, int] = {}
        for option in OPTIONS:
            raw = said[option.key]
            if raw is None:
                values[option.name] = int(getattr(driver, option.name))
                continue
            try:
                value = netif.number(raw)
            except ValueError as error:
                raise UsageError(f"{node}/{option.key}: {error}") from None
            if not option.least <= value <= option.most:
                raise UsageError(f"{node}/{option.key}: {value}, {option.least} to {option.most} it can be")
            values[option.name] = value
        return cls(**values)

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
