"""Which journal a queue of xbbd gets: a new one, the one that a former process left, or none, and why.

Knows the bus's setting and files by bus/journals.py; knows no ring and no states.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from xenbus.bus import XenbusDevice, journals
from xenbus.bus.journals import JournalBusy, JournalFile
from xenbus.drivers.block.storage import Storage
from xenbus.drivers.block.xbbd_queue import OpenJournal
from xenbus.ring.journal import JournalError

Where = tuple[Path, str, int, bytes]  # what `journals.create` and `resume` begin with


class Journals:
    """Those of one device. `state` tells people how it stands: "kept", or why not."""

    __slots__ = ("_dev", "state")

    def __init__(self, dev: XenbusDevice) -> None:
        self._dev = dev
        self.state = "none"

    def opener(
        self, storage: Storage, queue: int, whose: bytes, slot_size: int, *, resumes: bool
    ) -> OpenJournal | None:
        """How to get that queue's. None: it has none.

        resumes: go on with a former process's; JournalError if there can be none. Otherwise a queue for which
        no journal can be made is served without, which `state` and the log say; JournalBusy all the same.
        """
        directory = self._dev.bus.settings.journals
        self.state = ""
        if directory is None:
            self.state = "none"
        elif not storage.outlives:
            self.state = f"none: {storage.target} does not outlive this process"
        if self.state:
            if resumes:
                raise JournalError(f"no journal to go on with ({self.state})")
            return None
        assert directory is not None
        act = self._resume if resumes else self._create
        return partial(act, (directory, self._dev.node, queue, whose), slot_size)

    def discard(self) -> None:
        """The connection is over: also what a former process left of it, and nobody opened, goes."""
        directory = self._dev.bus.settings.journals
        if directory is not None:
            try:
                journals.discard(directory, self._dev.node)
            except JournalError as error:
                self._dev.log.warning("%s", error)

    def _resume(self, where: Where, slot_size: int, entries: int, index: int) -> JournalFile | None:
        found = journals.resume(*where, entries, slot_size)
        self.state = "kept"
        return found

    def _create(self, where: Where, slot_size: int, entries: int, index: int) -> JournalFile | None:
        try:
            made = journals.create(*where, index, entries, slot_size)
        except JournalBusy:
            raise
        except JournalError as error:
            self.state = f"none: {error}"
            self._dev.log.warning("no journal; its guest will not survive the end of this process: %s", error)
            return None
        self.state = "kept"
        return made
