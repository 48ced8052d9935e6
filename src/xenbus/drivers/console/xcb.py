"""xcb, the back half of a `console`: a guest's page on one side, a PTY and a log on the other.

Knows its device, its peer's keys, its terminal and its log; bytes are moved by link.py. Serves no first
console (`/local/domain/N/console`): that is xenconsoled's.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final

from xenbus.bus import XenbusDevice, XenbusState, back_driver
from xenbus.drivers.console import consif
from xenbus.drivers.console.consif import ConsoleRing
from xenbus.drivers.console.link import ConsoleLink
from xenbus.drivers.console.logfile import LogFile
from xenbus.drivers.console.terminal import Terminal
from xenbus.drivers.halves import BackEnd
from xenbus.drivers.nodes import number32
from xenbus.errors import Denied, NoEntry, UsageError
from xenbus.hypervisor.interface import Channel
from xenbus.hypervisor.interface import Mapping as PageMapping
from xenbus.newbus import NoMatch
from xenbus.xenstore.client import Transaction

_HAS_RING: Final = (XenbusState.INITIALISED, XenbusState.CONNECTED)


@back_driver(consif.KIND, "xcb")
class Xcb(BackEnd[tuple[int, int]]):
    """limit: bytes that are kept for whoever attaches; what is older is discarded"""

    name = "xcb"
    description = "Backend Xen Console"
    detach_timeout = 5.0
    limit: ClassVar[int] = consif.LIMIT

    @classmethod
    def probe(cls, dev: XenbusDevice) -> int:
        if dev.id.rpartition("/")[2] == "0":
            raise NoMatch("the first console is xenconsoled's")
        return 0

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self._opened = False
        self._terminal: Terminal | None = None
        self._log: LogFile | None = None
        self._link: ConsoleLink | None = None
        self._mapping: PageMapping | None = None
        self._channel: Channel | None = None
        self.rx_bytes = self.tx_bytes = self._throttled = 0

    @property
    def _linked(self) -> bool:
        return self._link is not None

    # -- callbacks of the bus

    async def recover(self) -> None:
        """Goes on with the page of a process that ended: what is on it says how far that one came."""
        try:
            await self._open()  # there is something to read, whatever became of the front
            if self.dev.otherend_state is not XenbusState.UNKNOWN:
                await super().recover()
        except BaseException:
            await self._close_far_side()
            raise

    @property
    def _left_linked(self) -> bool:
        return self.dev.state is XenbusState.CONNECTED and self.dev.otherend_state in _HAS_RING

    async def _resumed(self) -> None:
        self._start()

    async def suspend(self) -> None:
        if self._link is not None:
            self._link.hold()

    async def resume(self, cancelled: bool) -> None:
        async with self._busy:
            link = self._link
            if cancelled:
                if link is not None and self._channel is not None:
                    link.start(self._channel)
                return
            if link is not None:
                link.stop()
            self._link = self._mapping = self._channel = None
        await self.dev.set_state(XenbusState.INIT_WAIT)

    def sysctl(self) -> Mapping[str, Callable[[], object]]:
        def of_terminal(what: str) -> Callable[[], object]:
            return lambda: getattr(self._terminal, what) if self._terminal is not None else 0

        return {
            "tty": lambda: self._terminal.path if self._terminal is not None else "",
            "log": lambda: str(self._log.path) if self._log is not None else "",
            "rx_bytes": lambda: self.rx_bytes,
            "tx_bytes": lambda: self.tx_bytes,
            "waiting": of_terminal("waiting"),
            "discarded": of_terminal("discarded"),
            "throttled": lambda: self._throttled + (self._link.throttled if self._link is not None else 0),
        }

    # -- the far side

    async def _open(self) -> None:
        """PTY and log, as the toolstack's nodes say, once. UsageError, TerminalError."""
        if self._opened:
            return
        said = await self.dev.gather(
            {consif.OUTPUT_KEY: bytes.decode, consif.LOG_KEY: bytes.decode, consif.LOG_SIZE_KEY: number32},
            {consif.OUTPUT_KEY: "pty", consif.LOG_KEY: "", consif.LOG_SIZE_KEY: consif.LOG_SIZE},
        )
        output, path, size = said[consif.OUTPUT_KEY], said[consif.LOG_KEY], said[consif.LOG_SIZE_KEY]
        if output not in ("pty", "null"):
            raise UsageError(f"{self.dev.node}/{consif.OUTPUT_KEY}: {output!r} is neither pty nor null")
        if not consif.LOG_SIZE_MIN <= size <= consif.LOG_SIZE_MAX:
            raise UsageError(f"{self.dev.node}/{consif.LOG_SIZE_KEY}: {size}, {consif.LOG_SIZE_MIN} or more")
        if path:
            try:
                self._log = LogFile(Path(path), size)
            except (OSError, ValueError) as error:
                code = errno.errorcode.get(getattr(error, "errno", 0) or 0, "EINVAL")
                why = getattr(error, "strerror", None) or error
                raise UsageError(f"{self.dev.node}/{consif.LOG_KEY}: {path!r}: {code}: {why}") from None
        if output == "pty":
            self._terminal = Terminal(self._typed, self.limit)
            await self._tell_path(self._terminal.path)
        self._opened = True

    async def _tell_path(self, path: str) -> None:
        """In our node, and in the front's, if that is there and ours to write: `xl console` looks there."""
        await self.dev.write(consif.TTY_KEY, path)
        front = self.dev.otherend_path

        async def write(tx: Transaction) -> None:
            if await tx.exists(f"{front}/state"):
                await tx.write(f"{front}/{consif.TTY_KEY}", path)

        with suppress(Denied, NoEntry):
            await self.dev.store.transaction(write)

    async def _close_far_side(self) -> None:
        self._opened = False
        terminal, self._terminal = self._terminal, None
        if terminal is not None:
            try:
                await terminal.last_words()
            finally:
                terminal.close()
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def _typed(self) -> None:
        if self._link is not None:
            self._link.pump()

    # -- Behind

    def room(self) -> int:
        """All is taken always: a guest that prints is never held up by who reads."""
        return 1 << 16

    def put(self, data: bytes) -> None:
        self.rx_bytes += len(data)
        if self._log is not None:
            self._log.write(data)
        if self._terminal is not None:
            self._terminal.show(data)

    def peek(self) -> bytearray | bytes:
        return self._terminal.keys if self._terminal is not None else b""

    def sent(self, count: int) -> None:
        self.tx_bytes += count
        if self._terminal is not None:
            self._terminal.taken(count)

    # -- the handshake

    async def _built(self) -> None:
        if await self.dev.set_state(XenbusState.CONNECTED):
            self._start()

    async def _front_parameters(self) -> tuple[int, int]:
        """(grant reference, port). PeerError."""
        keys = (consif.RING_REF_KEY, consif.PORT_KEY)
        said = await self.dev.otherend_gather(dict.fromkeys(keys, number32))
        return said[consif.RING_REF_KEY], said[consif.PORT_KEY]

    async def _build(self, parameters: tuple[int, int], *, resumes: bool = False) -> None:
        ref, port = parameters
        self._mapping = await self.dev.map_ring([ref])
        ring = ConsoleRing(self._mapping.view, front=False)
        self._link = ConsoleLink(ring, self, self._broken)
        self._channel = await self.dev.bind_evtchn(port, self._link.kicked)

    def _start(self) -> None:
        if self._link is not None and self._channel is not None:
            self._link.start(self._channel)

    # -- the end

    async def _disconnect(self) -> None:
        """What is on the page is taken off it, then page and port are given back. Idempotent."""
        async with self._busy:
            if self._link is not None:
                self._link.pump()
            await self._give_back()

    async def _give_back(self, *, keep: bool = False) -> None:
        link, self._link = self._link, None
        channel, self._channel = self._channel, None
        mapping, self._mapping = self._mapping, None
        if link is not None:
            self._throttled += link.throttled
            link.stop()
        if channel is not None:
            await self.dev.close_evtchn(channel)
        if mapping is not None:
            await self.dev.unmap(mapping)
