"""What xbbd offers of what it can, device by device: one table of the nodes that a toolstack may write.

Knows names, ranges and defaults; knows no storage and no ring. docs/block.md has the table for operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from xenbus.drivers.block.blkif import Op
from xenbus.drivers.options import Option, read_options

MAX_QUEUES: Final = 16
MAX_RING_PAGE_ORDER: Final = 4
MAX_INDIRECT_SEGMENTS: Final = 256


OPTIONS: Final = (
    Option("max_queues", "xbbd-max-queues", 1, MAX_QUEUES),
    Option("max_ring_page_order", "xbbd-max-ring-page-order", 0, MAX_RING_PAGE_ORDER),
    Option("max_persistent_grants", "xbbd-max-persistent-grants", 0, 1 << 16),
    Option("max_indirect_segments", "xbbd-max-indirect-segments", 0, MAX_INDIRECT_SEGMENTS),
    Option("flush", "xbbd-flush", 0, 1),
    Option("barrier", "xbbd-barrier", 0, 1),
    Option("discard", "discard-enable", 0, 1),  # blkif.h's own
)


@dataclass(slots=True, frozen=True)
class Options:
    """max_persistent_grants: pages that stay mapped, of all queues together; 0 is not to offer it
    max_indirect_segments: in one request; 0 is not to offer it
    flush, barrier, discard: 1 to offer it (discard only if the storage can)"""

    max_queues: int
    max_ring_page_order: int
    max_persistent_grants: int
    max_indirect_segments: int
    flush: int
    barrier: int
    discard: int

    @classmethod
    def of(cls, driver: type, node: str, said: Mapping[str, bytes | None]) -> Options:
        """See read_options. UsageError that names the node, and what it may be."""
        return cls(**read_options(OPTIONS, driver, node, said))

    def operations(self, *, discards: bool) -> frozenset[int]:
        """What a request may ask for. discards: whether the storage does, and may."""
        offered = {
            Op.READ: True,
            Op.WRITE: True,
            Op.WRITE_BARRIER: self.barrier,
            Op.FLUSH_DISKCACHE: self.flush,
            Op.DISCARD: discards and self.discard,
            Op.INDIRECT: self.max_indirect_segments,
        }
        return frozenset(int(op) for op, on in offered.items() if on)

    def nodes(self, *, discards: bool, sector_size: int) -> dict[str, object]:
        """What blkif.h calls features and transport parameters; both schemes of ring sizes (note 3)."""
        values: dict[str, object] = {
            "feature-barrier": self.barrier,
            "feature-flush-cache": self.flush,
            "feature-persistent": int(self.max_persistent_grants > 0),
            "max-ring-page-order": self.max_ring_page_order,
            "max-ring-pages": 1 << self.max_ring_page_order,
            "multi-queue-max-queues": self.max_queues,
        }
        if self.max_indirect_segments:
            values["feature-max-indirect-segments"] = self.max_indirect_segments
        if discards and self.discard:
            values["feature-discard"] = 1
            values["discard-granularity"] = sector_size
            values["discard-alignment"] = 0
            values["discard-secure"] = 0
        return values
