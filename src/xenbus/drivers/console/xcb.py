"""xcb, the back half of a `console`: a guest's page on one side, a PTY and a log on the other.

Knows its device, its peer's keys, its terminal and its log; bytes are moved by link.py. Serves no first
console (`/local/domain/N/console`): that is xenconsoled's.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final

from xenbus.bus import XenbusDevice, XenbusDriver, XenbusState, back_driver
from xenbus.drivers.console import consif
from xenbus.drivers.console.consif import ConsoleRing, number
from xenbus.drivers.console.link import ConsoleLink
from xenbus.drivers.console.logfile import LogFile
from xenbus.drivers.console.terminal import Terminal
from xenbus.errors import Denied, HypervisorError, NoEntry, PeerError, UsageError, XenbusError
from xenbus.hypervisor.interface import Channel
from xenbus.hypervisor.interface import Mapping as PageMapping
from xenbus.newbus import NoMatch
from xenbus.xenstore.client import Transaction

# Seconds that a front has to close when we are detached.
DETACH_TIMEOUT = 5.0
# Seconds after which the port of a process that was killed has to be free.
PORT_TIMEOUT = 2.0
_HAS_RING: Final = (XenbusState.INITIALISED, XenbusState.CONNECTED)


@back_driver(consif.KIND, "xcb")
class Xcb(XenbusDriver):
    """limit: bytes that are kept for whoever attaches; what is older is discarded"""

    name = "xcb"
    description = "Backend Xen Console"
    limit: ClassVar[int] = consif.LIMIT

    @classmethod
    def probe(cls, dev: XenbusDevice) -> int:
        if dev.id.rpartition("/")[2] == "0":
            raise NoMatch("the first console is xenconsoled's")
        return 0

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self._terminal: Terminal | None = None
        self._log: LogFile | None = None
        self._link: ConsoleLink | None = None
        self._mapping: PageMapping | None = None
        self._channel: Channel | None = None
        self._parameters: tuple[int, int] | None = None
        self._busy = asyncio.Lock()  # connecting and disconnecting: detach may run beside otherend_changed
        self.rx_bytes = self.tx_bytes = self._throttled = 0
        self._states: dict[XenbusState, Callable[[], Awaitable[None]]] = {
            XenbusState.INITIALISING: self._front_restarted,
            XenbusState.INITIALISED: self._connect,
            XenbusState.CONNECTED: self._connect,
            XenbusState.CLOSING: self._front_closing,
            XenbusState.CLOSED: self._front_closed,
        }

    # -- callbacks of the bus

    async def attach(self) -> None:
        try:
            await self._open()
            await self.dev.set_state(XenbusState.INIT_WAIT)
        except BaseException:
            self._close_far_side()  # a device that was not attached is not detached
            raise

    async def recover(self) -> None:
        """Goes on with the page of a process that ended: what is on it says how far that one came."""
        dev, peer = self.dev, self.dev.otherend_state
        try:
            await self._open()
            if dev.state is XenbusState.CONNECTED and peer is XenbusState.INITIALISING:
                await dev.set_state(XenbusState.INIT_WAIT)
            elif dev.state is XenbusState.CONNECTED and peer in _HAS_RING:
                await self._take_over()
        except BaseException:
            await self._disconnect()
            self._close_far_side()
            raise

    async def release(self) -> None:
        """Another process goes on with the page."""
        await self._disconnect()
        self._close_far_side()

    async def otherend_changed(self, state: XenbusState) -> None:
        act = self._states.get(state)
        if act is not None:
            await act()

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
            self._link = self._mapping = self._channel = self._parameters = None
        await self.dev.set_state(XenbusState.INIT_WAIT)

    async def detach(self) -> None:
        dev = self.dev
        try:
            if not dev.gone and dev.state is not XenbusState.CLOSED:
                try:
                    await dev.set_state(XenbusState.CLOSING)
                    await dev.wait_otherend(XenbusState.CLOSED, timeout=DETACH_TIMEOUT)
                except TimeoutError as error:
                    dev.log.warning("detached by force: %s", error)
        finally:
            await self._disconnect()
            self._close_far_side()
        if not dev.gone:
            await dev.set_state(XenbusState.CLOSED)

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
        """PTY and log, as the toolstack's nodes say. UsageError, TerminalError."""
        said = await self.dev.gather(
            {consif.OUTPUT_KEY: bytes.decode, consif.LOG_KEY: bytes.decode, consif.LOG_SIZE_KEY: number},
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
                raise UsageError(f"{self.dev.node}/{consif.LOG_KEY}: {path!r}: {code}") from None
        if output == "pty":
            self._terminal = Terminal(self._typed, self.limit)
            await self._tell_path(self._terminal.path)

    async def _tell_path(self, path: str) -> None:
        """In our node, and in the front's, if that is there and ours to write: `xl console` looks there."""
        await self.dev.write(consif.TTY_KEY, path)
        front = self.dev.otherend_path

        async def write(tx: Transaction) -> None:
            if await tx.exists(f"{front}/state"):
                await tx.write(f"{front}/{consif.TTY_KEY}", path)

        with suppress(Denied, NoEntry):
            await self.dev.store.transaction(write)

    def _close_far_side(self) -> None:
        terminal, self._terminal = self._terminal, None
        if terminal is not None:
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

    async def _connect(self) -> None:
        dev = self.dev
        async with self._busy:
            if dev.state in (XenbusState.CLOSING, XenbusState.CLOSED):
                return
            if self._link is not None and dev.otherend_state is not XenbusState.INITIALISED:
                return  # Connected, as we are
            parameters = await self._front_parameters()
            if self._link is not None:
                if parameters == self._parameters:
                    return
                await self._give_back()  # it began anew, so fast that its Initialising was never seen
            try:
                await self._build(parameters)
            except BaseException:
                await self._give_back()
                raise
            if await dev.set_state(XenbusState.CONNECTED):
                self._start()

    async def _front_parameters(self) -> tuple[int, int]:
        """(grant reference, port). PeerError."""
        keys = (consif.RING_REF_KEY, consif.PORT_KEY)
        said = await self.dev.otherend_gather(dict.fromkeys(keys, number))
        return said[consif.RING_REF_KEY], said[consif.PORT_KEY]

    async def _build(self, parameters: tuple[int, int]) -> None:
        ref, port = self._parameters = parameters
        self._mapping = await self.dev.map_ring([ref])
        ring = ConsoleRing(self._mapping.view, front=False)
        self._link = ConsoleLink(ring, self, self._broken)
        self._channel = await self.dev.bind_evtchn(port, self._link.kicked)

    def _start(self) -> None:
        if self._link is not None and self._channel is not None:
            self._link.start(self._channel)

    async def _take_over(self) -> None:
        """The kernel may still be at the former process's end."""
        now = asyncio.get_running_loop().time
        began = now()
        async with self._busy:
            parameters = await self._front_parameters()
            while True:
                try:
                    await self._build(parameters)
                    break
                except HypervisorError:
                    await self._give_back()
                    if now() - began >= PORT_TIMEOUT:
                        raise
                await asyncio.sleep(0.05)
            self._start()

    async def _front_restarted(self) -> None:
        """It begins anew without having closed (a guest that was reset): the old page is nobody's."""
        if self._link is not None:
            await self._disconnect()
            if self.dev.state is XenbusState.CONNECTED:
                await self.dev.set_state(XenbusState.INIT_WAIT)

    async def _front_closing(self) -> None:
        if self.dev.state is not XenbusState.CLOSED:
            await self.dev.set_state(XenbusState.CLOSING)

    async def _front_closed(self) -> None:
        """Closed, or its node is gone. The terminal stays: its last words are to be read."""
        await self._disconnect()
        await self.dev.set_state(XenbusState.CLOSED)

    # -- the end

    async def _disconnect(self) -> None:
        """What is on the page is taken off it, then page and port are given back. Idempotent."""
        async with self._busy:
            if self._link is not None:
                self._link.pump()
            await self._give_back()

    async def _give_back(self) -> None:
        link, self._link = self._link, None
        channel, self._channel = self._channel, None
        mapping, self._mapping = self._mapping, None
        self._parameters = None
        if link is not None:
            self._throttled += link.throttled
            link.stop()
        if channel is not None:
            await self.dev.close_evtchn(channel)
        if mapping is not None:
            await self.dev.unmap(mapping)

    def _broken(self, error: PeerError) -> None:
        """The front put nonsense into its page: this console is over, the others go on."""
        self.dev.spawn(self._give_up(error), name=f"{self.dev.nameunit} gives up")

    async def _give_up(self, error: XenbusError) -> None:
        await self.dev.fatal(error)
        await self._disconnect()
