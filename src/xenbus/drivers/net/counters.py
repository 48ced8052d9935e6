"""What a net device counts in its life, over all its connections: the names of `ip -s -s link` and ethtool.

Knows numbers. rx is what came off the rings and went to the port, tx the other way, in either half: as an
interface of this domain has it, so that a guest's tx is the rx of its back end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

NAMES = (
    "rx_packets",
    "rx_bytes",
    "rx_errors",
    "rx_dropped",
    "rx_length_errors",
    "rx_frame_errors",
    "rx_copy_errors",
    "tx_packets",
    "tx_bytes",
    "tx_errors",
    "tx_dropped",
    "tx_length_errors",
    "tx_copy_errors",
    "tx_stalls",
    "rx_gso_checksum_fixup",
    "multicast_filtered",
)


class Counters:
    """rx_errors:   packets that the peer sent wrong, among them rx_length_errors (too short, too long),
                 rx_frame_errors (chains and extra info that lie), rx_copy_errors (unreadable pages)
    rx_dropped:  good packets that the port did not want
    tx_errors:   packets that the peer cannot take or answered with an error, among them tx_length_errors and
                 tx_copy_errors (pages that it posted and that may not be written)
    tx_dropped:  packets for which there was no connection, no room, or no page
    tx_stalls:   how often the peer took nothing for so long that packets for it were dropped
    rx_gso_checksum_fixup: GSO packets whose checksum was not blank, as it has to be
    multicast_filtered:    packets for groups that the guest did not ask for
    last_error:  what was wrong with the last packet that was
    """

    __slots__ = (*NAMES, "last_error")

    def __init__(self) -> None:
        self.rx_packets = self.rx_bytes = self.rx_errors = self.rx_dropped = 0
        self.rx_length_errors = self.rx_frame_errors = self.rx_copy_errors = 0
        self.tx_packets = self.tx_bytes = self.tx_errors = self.tx_dropped = 0
        self.tx_length_errors = self.tx_copy_errors = self.tx_stalls = 0
        self.rx_gso_checksum_fixup = self.multicast_filtered = 0
        self.last_error = ""

    def bad_rx(self, kind: str, what: str) -> None:
        """One packet of the peer's. kind: "length", "frame" or "copy"."""
        self.rx_errors += 1
        name = f"rx_{kind}_errors"
        setattr(self, name, getattr(self, name) + 1)
        self.last_error = what

    def bad_tx(self, kind: str, what: str) -> None:
        """One packet for the peer. kind: "length" or "copy"; "" for neither."""
        self.tx_errors += 1
        if kind:
            name = f"tx_{kind}_errors"
            setattr(self, name, getattr(self, name) + 1)
        self.last_error = what

    def leaves(self) -> Mapping[str, Callable[[], object]]:
        """For sysctl."""
        return {name: lambda name=name: getattr(self, name) for name in (*NAMES, "last_error")}  # type: ignore[misc]
