"""One queue of xbbd: its ring mapped, its port bound, its BackQueue between them; and all of it given back.

Knows a device as what maps and binds, and what a front published of one queue; knows no store and no states.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbus.bus import XenbusDevice
from xenbus.bus.journals import JournalFile
from xenbus.drivers.block.blkif import Abi
from xenbus.drivers.block.xbbd_front import QueueKeys
from xenbus.drivers.block.xbbd_io import BackQueue
from xenbus.hypervisor.interface import Channel, Mapping
from xenbus.ring.journal import Journal, JournalledRing
from xenbus.ring.shared import BackRing

# A new journal, or the one that a former process left, for a ring of so many slots that stands at that index.
OpenJournal = Callable[[int, int], JournalFile[Journal] | None]

# Journals of rings that were left with requests that did not end: locked until this process has.
_locked: list[JournalFile[Journal]] = []


class QueueLink:
    """The connection to one queue of a front: `build`, `start`, and `give_back` whatever came of them.

    again: requests that a former process took and did not answer
    """

    __slots__ = ("_channel", "_dev", "_journal", "_mapping", "again", "keys", "queue")

    def __init__(self, dev: XenbusDevice, keys: QueueKeys) -> None:
        self._dev = dev
        self.keys = keys
        self.queue: BackQueue | None = None
        self._mapping: Mapping | None = None
        self._channel: Channel | None = None
        self._journal: JournalFile[Journal] | None = None
        self.again = 0

    @property
    def ring_pages(self) -> int:
        return len(self._mapping.refs) if self._mapping is not None else 0

    @property
    def inflight(self) -> int:
        """Requests that were taken and not answered."""
        return self.queue.inflight if self.queue is not None else 0

    async def build(
        self, abi: Abi, serve: Callable[[BackRing], BackQueue], open_journal: OpenJournal
    ) -> None:
        """Map the ring, make its queue, bind the port. HypervisorError, RingError, JournalError; `give_back`
        all the same. serve: makes the queue of a ring"""
        self._mapping = await self._dev.map_ring(self.keys.refs)
        ring = BackRing(self._mapping.view, abi.request_size)
        if (journal := open_journal(ring.size, ring.req_cons)) is not None:
            self._journal = journal
            ring.release()
            ring = JournalledRing(self._mapping.view, abi.request_size, journal.journal, abi.id_at)
            self.again = ring.again
        self.queue = serve(ring)
        ring.unconsumed_requests()  # RingError now rather than in the first kick
        self._channel = await self._dev.bind_evtchn(self.keys.port, self.queue.kick)

    def start(self) -> None:
        """Serve from now on; what is on the ring already is served at once."""
        if self.queue is not None and self._channel is not None:
            self.queue.start(self._channel)

    def kick_front(self) -> None:
        """A former process may have published responses and not have come to say so."""
        if self._channel is not None:
            self._channel.notify()

    async def pause(self, seconds: float) -> None:
        """Take nothing more, and let what runs end within that time."""
        if self.queue is not None:
            await self.queue.pause(seconds)

    def unpause(self) -> None:
        if self.queue is not None:
            self.queue.unpause()

    async def abandon(self) -> None:
        """After a real suspend: ring and port went with the old life of this domain."""
        if self.queue is not None:
            await self.queue.stop(0)
        self._end_journal(keep=False)

    async def give_back(self, seconds: float, *, keep: bool = False) -> int:
        """Let what runs end, then give back port and ring. Returns how many requests did not end. Once.

        keep: another process is to go on with this ring. With requests that did not end the journal stays
        locked for as long as this process lives: until then they may still write.
        """
        dev, queue, left = self._dev, self.queue, 0
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.mask()
        if queue is not None and not await queue.stop(seconds):
            left = queue.inflight
        if channel is not None:
            await dev.close_evtchn(channel)
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            await dev.unmap(mapping)
        self._end_journal(keep=keep, busy=left > 0)
        return left

    def _end_journal(self, *, keep: bool, busy: bool = False) -> None:
        journal, self._journal = self._journal, None
        if journal is None:
            return
        if keep and busy:
            _locked.append(journal)
        elif keep:
            journal.close()
        else:
            journal.remove()
