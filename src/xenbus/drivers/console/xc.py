"""xc, the front half of a `console`: a page and a port for the back end, and the stream that comes of it.

Knows its device and its keys; bytes are moved by link.py, and are the stream's.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping
from contextlib import suppress

from xenbus.bus import XenbusDevice, XenbusState, front_driver
from xenbus.bus.operations import Operation, OperatorCall
from xenbus.drivers.console.consif import KIND, PORT_KEY, PROTOCOL, RING_REF_KEY, ConsoleRing
from xenbus.drivers.console.link import ConsoleLink
from xenbus.drivers.console.stream import BUFFER, ConsoleStream
from xenbus.drivers.halves import QuietFrontEnd
from xenbus.errors import PeerError, XenbusError
from xenbus.hypervisor.interface import Channel, GrantedPages
from xenbus.newbus import NoMatch

# Seconds that the back end has to take what is on the ring, when we close or are suspended.
DRAIN_TIMEOUT = 1.0


@front_driver(KIND)
class Xc(QuietFrontEnd):
    """Its `stream` is there from the start; what is written waits for the connection."""

    name = "xc"
    description = "Xen Console"

    @classmethod
    def probe(cls, dev: XenbusDevice) -> int:
        """`device/console/0` would be the first console, which is no device."""
        if dev.id == "0":
            raise NoMatch("the first console is no device")
        return 0

    @classmethod
    def unit(cls, dev: XenbusDevice) -> int | None:
        return int(dev.id) if dev.id.isdigit() else None

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self.stream = ConsoleStream(lambda: dev.otherend, self._moved)
        self._link: ConsoleLink | None = None
        self._page: GrantedPages | None = None
        self._channel: Channel | None = None
        self._states = {
            XenbusState.INITIALISING: self._back_restarted,
            XenbusState.INIT_WAIT: self._initialise,
            XenbusState.INITIALISED: self._initialise,
            XenbusState.CONNECTED: self._connect,
            XenbusState.CLOSING: self._close,
            XenbusState.CLOSED: self._closed,
        }

    @property
    def _granted(self) -> bool:
        return self._page is not None

    # -- callbacks of the bus

    async def suspend(self) -> None:
        """What is on the ring has time to be read: whoever restores us may look at the console first."""
        await self._drain()
        if self._link is not None:
            self._link.hold()

    async def resume(self, cancelled: bool) -> None:
        link = self._link
        if link is None:
            return
        if cancelled:
            if self._channel is not None:
                link.start(self._channel)
            return
        self._let_go(link)
        self._link = self._page = self._channel = None
        self._refuses, self._tries = False, 0

    async def detach(self) -> None:
        dev = self.dev
        try:
            if not dev.gone and dev.state is not XenbusState.CLOSED:
                await self._drain()
                await self._close()
                await self._unmapped()
        finally:
            await self._tear_down()
            self.stream.end(f"{dev.nameunit or dev.node} is gone")

    def sysctl(self) -> Mapping[str, Callable[[], object]]:
        stream = self.stream
        return {
            "rx_bytes": lambda: stream.rx_bytes,
            "tx_bytes": lambda: stream.tx_bytes,
            "tx_waiting": lambda: len(stream.peek()),
        }

    def operations(self) -> Mapping[str, Operation]:
        """See xenbus.bus.operations: what the guest reads and writes, for whoever has no program there."""
        return {"read": self._op_read, "write": self._op_write}

    async def _op_read(self, call: OperatorCall) -> object:
        data = await self.stream.read(call.number("limit", BUFFER), call.number("seconds", 10))
        return base64.b64encode(data).decode()

    async def _op_write(self, call: OperatorCall) -> object:
        data = base64.b64decode(call.text("data"), validate=True)
        await self.stream.write(data, call.number("seconds", 10))
        return len(data)

    # -- the handshake

    async def _initialise(self) -> None:
        """The back end waits for us: a page and a port. One that was away and is here again gets new ones."""
        dev = self.dev
        if dev.state is XenbusState.CLOSED and not self._refuses:
            await self._begin_anew()
        if dev.state is not XenbusState.INITIALISING or self._link is not None:
            return
        self._page = await dev.grant_ring(1)
        self._link = ConsoleLink(ConsoleRing(self._page.view, front=True), self.stream, self._broken)
        self._channel = await dev.alloc_evtchn(self._link.kicked)
        values = {RING_REF_KEY: self._page.refs[0], PORT_KEY: self._channel.port, "protocol": PROTOCOL}
        await dev.set_state(XenbusState.INITIALISED, values)

    async def _connect(self) -> None:
        dev = self.dev
        if dev.state is not XenbusState.CONNECTED:
            await self._initialise()  # it may have skipped InitWait
        link, channel = self._link, self._channel
        if dev.state is not XenbusState.INITIALISED or link is None or channel is None:
            return
        if await dev.set_state(XenbusState.CONNECTED):
            self._tries = 0
            link.start(channel)

    async def _back_restarted(self) -> None:
        """It begins anew without having closed: the page is nobody's."""
        if self.dev.state is XenbusState.CONNECTED:
            await self._tear_down()
            await self.dev.set_state(XenbusState.INITIALISING)

    # -- the end

    async def _stop(self) -> None:
        if self._link is not None:
            self._link.hold()

    async def _drain(self) -> None:
        """Until the back end has read what is on the ring and behind it, or has had its time."""
        link = self._link
        if link is None or self.dev.state is not XenbusState.CONNECTED:
            return
        empty = asyncio.get_running_loop().create_future()

        def drained() -> None:
            if not empty.done() and not self.stream.peek():
                empty.set_result(None)

        link.on_drained = drained
        try:
            link.pump()
            await asyncio.wait([empty], timeout=DRAIN_TIMEOUT)
        finally:
            link.on_drained = None

    async def _tear_down(self) -> None:
        """Page and port are given back. Idempotent."""
        link, self._link = self._link, None
        channel, self._channel = self._channel, None
        page, self._page = self._page, None
        if link is not None:
            self._let_go(link)
        if channel is not None:
            await self.dev.close_evtchn(channel)
        if page is not None:
            await self.dev.revoke(page)

    def _let_go(self, link: ConsoleLink) -> None:
        """The other end has gone: what it put there came, what it did not read is for the next one."""
        with suppress(PeerError):
            self.stream.unsent(link.unread())
            self.stream.put(link.take_rest())
        link.stop()

    def _moved(self) -> None:
        if self._link is not None:
            self._link.pump()

    def _broken(self, error: PeerError) -> None:
        """The back end put nonsense into the page: nothing it says there is believed any more."""
        self._refuses = True
        self.dev.spawn(self._give_up(error), name=f"{self.dev.nameunit} gives up")

    async def _give_up(self, error: XenbusError) -> None:
        await self.dev.fatal(error)
        await self._tear_down()
