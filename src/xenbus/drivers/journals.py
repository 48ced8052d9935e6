"""Which journals a back end's device has: new ones, those that a former process left, or none, and why.

Knows the bus's setting and files by bus/journals.py; knows no ring and no states.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbus.bus import XenbusDevice, journals
from xenbus.bus.journals import J, JournalBusy, JournalFile, Layout
from xenbus.ring.journal import JournalError


class Journals:
    """Those of one device. `state` tells people how it stands: "kept", or why not."""

    __slots__ = ("_dev", "state")

    def __init__(self, dev: XenbusDevice) -> None:
        self._dev = dev
        self.state = "none"

    def open(
        self,
        name: str,
        layout: Layout[J],
        whose: bytes,
        begin: Callable[[J], None],
        *,
        resumes: bool,
        why_not: str = "",
    ) -> JournalFile[J] | None:
        """The journal of that name, of this connection. None: it has none.

        begin: makes a zeroed one `whose`; why_not: it would be of no use
        resumes: go on with a former process's; JournalError if there can be none. Otherwise what no journal
        can be made for is served without, which `state` and the log say; JournalBusy all the same
        """
        dev, directory = self._dev, self._dev.bus.settings.journals
        if directory is None or why_not:
            self.state = f"none: {why_not}" if directory is not None else "none"
            if resumes:
                raise JournalError(f"no journal to go on with ({self.state})")
            return None
        if resumes:
            file = journals.resume(directory, dev.node, name, layout, whose)
        else:
            try:
                file = journals.create(directory, dev.node, name, layout)
            except JournalBusy:
                raise
            except JournalError as error:
                self.state = f"none: {error}"
                dev.log.warning("no journal; its guest will not survive the end of this process: %s", error)
                return None
            begin(file.journal)
        self.state = "kept"
        return file

    def discard(self) -> None:
        """The connection is over: also what a former process left of it, and nobody opened, goes."""
        directory = self._dev.bus.settings.journals
        if directory is not None:
            try:
                journals.discard(directory, self._dev.node)
            except JournalError as error:
                self._dev.log.warning("%s", error)
