"""A guest's data pages copied by the hypervisor, for a front that grants each page anew for each request.

Mapping a page for one request costs more than a copy of it: two changes of page tables, and the flush of all
CPUs' translations with the second (why blkif.h has persistent grants). Knows segment words, a storage and a
buffer of ours; knows no ring. For use at once: the next copy is over the last one's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from xenbus.drivers.block.blkif import SECTOR_SHIFT
from xenbus.drivers.block.storage import Storage
from xenbus.hypervisor.interface import GrantMap, PageCopier
from xenbus.hypervisor.memory import Region

BUFFER: Final = 1 << 20  # bytes: as long as an indirect request that we offer can be
# After a write that was copied and had to wait, so many are not copied first.
IN_VAIN: Final = 32


class Copies:
    """copier: its `copy_run`; domid: the guest's."""

    __slots__ = ("_copier", "_domid", "_in_vain", "_region")

    def __init__(self, copier: PageCopier, domid: int) -> None:
        self._copier = copier
        self._domid = domid
        self._region = Region(BUFFER, shared=False)
        self._in_vain = 0

    def move(self, storage: Storage, read: bool, offset: int, words: Sequence[int], sectors: int) -> bool:
        """A transfer of segments with so many sectors in all. False: the storage would wait, or the
        hypervisor refused a page (a mapping of it says why). StorageError."""
        if read:
            buffer = self._region.view[: sectors << SECTOR_SHIFT]
            return storage.try_read_into(offset, buffer) and self._run(words, to_remote=True)
        if self._in_vain:
            self._in_vain -= 1
            return False
        data = self.fetch(words, sectors)
        if data is None:
            return False
        done = storage.try_writev(offset, (data,))
        self._in_vain = 0 if done else IN_VAIN
        return done

    def fetch(self, words: Sequence[int], sectors: int) -> memoryview | None:
        """The segments' bytes, of so many sectors in all. None: the hypervisor refused one of them."""
        return self._region.view[: sectors << SECTOR_SHIFT] if self._run(words, to_remote=False) else None

    def _run(self, words: Sequence[int], *, to_remote: bool) -> bool:
        pieces = []
        for word in words:
            first, last = word >> 32 & 0xFF, word >> 40 & 0xFF
            pieces.append((word & 0xFFFFFFFF, first << SECTOR_SHIFT, last - first + 1 << SECTOR_SHIFT))
        return self._copier.copy_run(self._domid, pieces, self._region, to_remote=to_remote)

    def close(self) -> None:
        self._region.close()


def copies_for(pages: GrantMap, domid: int) -> Copies | None:
    """None where there is no copying at once: pages are mapped then."""
    return Copies(pages, domid) if isinstance(pages, PageCopier) else None
