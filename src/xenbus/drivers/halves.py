"""What the drivers of one side have in common, whatever the interface: BackEnd of those that serve a front,
FrontEnd and QuietFrontEnd of those that are served.

Knows states, deadlines and the order of things; knows no ring and no key. A driver need not be one of these:
XenbusDriver is all that the bus asks for.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from re import Pattern
from typing import Any, ClassVar, Generic, TypeVar

from xenbus.bus import XenbusDevice, XenbusDriver, XenbusState
from xenbus.bus.journals import JournalBusy
from xenbus.drivers.nodes import text
from xenbus.errors import DeadlineError, HypervisorError, LinkDown, NoEntry, PeerError, XenbusError
from xenbus.newbus import NoMatch

_ENDING = (XenbusState.CLOSING, XenbusState.CLOSED)
# A back end that stands there may have pages of its front mapped.
_MAPS = (XenbusState.CONNECTED, XenbusState.CLOSING)
# Seconds that a back end has to unmap our pages once we are Closed and being detached.
UNMAP_TIMEOUT = 3.0
# How often a back end that closed is asked for a new connection, before one of them was served.
TRIES = 5
# Seconds for a process that we go on for to be gone: its journals unlocked, and then its ports unbound.
BUSY_TIMEOUT = 10.0
PORT_TIMEOUT = 2.0
P = TypeVar("P")


class _Half(XenbusDriver, ABC):
    """states: what a driver does about each state of its peer"""

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self._states: Mapping[XenbusState, Callable[[], Awaitable[None]]] = {}

    async def otherend_changed(self, state: XenbusState) -> None:
        act = self._states.get(state)
        if act is not None:
            await act()


class BackEnd(_Half, Generic[P]):
    """A far side, opened once, and one connection at a time of a front to it. P: what fronts publish of one.

    detach_timeout: seconds for the front to close when we are detached; with those that `_give_back` may take
                    less than the bus gives a detach
    connects_at:    the states of a front that has published its parameters; in the first of them they may be
                    others than those that we are connected to
    """

    detach_timeout: ClassVar[float] = 6.0
    connects_at: ClassVar[tuple[XenbusState, ...]] = (XenbusState.INITIALISED, XenbusState.CONNECTED)

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self._parameters: P | None = None
        self._busy = asyncio.Lock()  # connecting and disconnecting: detach may run beside otherend_changed
        self._states = {
            XenbusState.INITIALISING: self._front_restarted,
            **dict.fromkeys(self.connects_at, self._connect),
            XenbusState.CLOSING: self._front_closing,
            XenbusState.CLOSED: self._front_closed,
        }

    # -- what a driver has of its own

    @property
    @abstractmethod
    def _linked(self) -> bool:
        """A front is connected, or about to be."""

    async def _read_options(self) -> None:
        """What the toolstack's nodes say of this device, before anything else. UsageError."""

    @abstractmethod
    async def _open(self) -> object:
        """The far side, as the toolstack's nodes name it, if it is not open yet."""

    @abstractmethod
    async def _close_far_side(self) -> None:
        """Idempotent."""

    def _offer(self) -> dict[str, object]:
        """What goes into our node with InitWait; the far side is open."""
        return {}

    @abstractmethod
    async def _front_parameters(self) -> P:
        """What the front published, or PeerError that names what is wrong with it."""

    @abstractmethod
    async def _build(self, parameters: P, *, resumes: bool = False) -> None:
        """Map and bind it all; `_give_back` whatever came of it. resumes: a former process's connection; the
        far side may not be open then"""

    @abstractmethod
    async def _built(self) -> None:
        """To Connected, and serve."""

    @abstractmethod
    async def _give_back(self, *, keep: bool = False) -> object:
        """Rings, ports and pages, under `_busy`. Idempotent. keep: this connection goes on"""

    @property
    @abstractmethod
    def _left_linked(self) -> bool:
        """Whether a former process left a connection, as far as both states say."""

    @abstractmethod
    async def _resumed(self) -> None:
        """Serve what was taken over."""

    def _patience(self, error: XenbusError) -> float:
        """Seconds to try again after this, when a former process's connection is taken over."""
        if isinstance(error, JournalBusy):
            return BUSY_TIMEOUT
        return PORT_TIMEOUT if isinstance(error, HypervisorError) else 0.0

    # -- callbacks of the bus

    async def attach(self) -> None:
        try:
            await self._read_options()
            await self._open()
            await self.dev.set_state(XenbusState.INIT_WAIT, self._offer())
        except BaseException:
            await self._close_far_side()  # a device that was not attached is not detached
            raise

    async def recover(self) -> None:
        """Goes on with the connection of a process that was killed."""
        dev, peer = self.dev, self.dev.otherend_state
        await self._read_options()
        if dev.state is XenbusState.CONNECTED and peer is XenbusState.INITIALISING:
            await self.attach()  # it began anew, and waits for us to do so
        elif self._left_linked:
            await self._resume()
        elif peer is XenbusState.UNKNOWN:
            raise PeerError(f"{dev.otherend}: its state cannot be read")

    async def release(self) -> None:
        """Another process goes on: what runs ends, and the front is told nothing."""
        await self._disconnect()
        await self._close_far_side()

    async def detach(self) -> None:
        dev = self.dev
        try:
            if not dev.gone and dev.state is not XenbusState.CLOSED:
                try:
                    await dev.set_state(XenbusState.CLOSING)
                    await dev.wait_otherend(XenbusState.CLOSED, timeout=self.detach_timeout)
                except DeadlineError as error:
                    dev.log.warning("detached by force: %s", error)
        finally:
            # Also when the bus's deadline ended it: the far side must not stay open.
            try:
                await self._disconnect()
            finally:
                await self._close_far_side()
        if not dev.gone:
            await dev.set_state(XenbusState.CLOSED)

    # -- the handshake

    async def _connect(self) -> None:
        dev = self.dev
        async with self._busy:
            if dev.state in _ENDING:
                return
            if self._linked and dev.otherend_state is not self.connects_at[0]:
                return  # Connected, as we are
            parameters = await self._front_parameters()
            if self._linked:
                if parameters == self._parameters:
                    return
                await self._give_back()  # it began anew, so fast that its Initialising was never seen
                if dev.state is XenbusState.CONNECTED:
                    await dev.set_state(XenbusState.INIT_WAIT)
            await self._open()
            self._parameters = parameters
            try:
                await self._build(parameters)
            except BaseException:
                await self._give_back()
                raise
            await self._built()

    async def _resume(self) -> None:
        """From `recover`. Raises what makes it impossible; NoMatch if another process that lives is there."""
        async with self._busy:
            try:
                await self._take_over(await self._front_parameters())
                self.dev.log.info("goes on for a process that ended")
                await self._resumed()
            except BaseException as error:
                await self._give_back()
                await self._close_far_side()
                if not isinstance(error, JournalBusy):
                    raise
                self.dev.log.error("left alone: %s", error)
                raise NoMatch(str(error)) from None

    async def _take_over(self, parameters: P) -> None:
        """`_build` of what a process left that ended, under `_busy`. The kernel may still be at its end: its
        threads in system calls, its ports."""
        now = asyncio.get_running_loop().time
        began = now()
        self._parameters = parameters
        while True:
            try:
                await self._build(parameters, resumes=True)
                return
            except XenbusError as error:
                if now() - began >= self._patience(error):
                    raise
            await self._give_back(keep=True)
            await asyncio.sleep(0.05)

    async def _front_restarted(self) -> None:
        """It begins anew without having closed (a guest that was reset): the old rings are nobody's."""
        if self._linked:
            await self._disconnect()
            if self.dev.state is XenbusState.CONNECTED:
                await self.dev.set_state(XenbusState.INIT_WAIT)

    async def _front_closing(self) -> None:
        """It may still have requests in flight: they are served until it is Closed."""
        if self.dev.state is not XenbusState.CLOSED:
            await self.dev.set_state(XenbusState.CLOSING)

    async def _front_closed(self) -> None:
        """Closed, or its node is gone. The far side stays for a front that comes back."""
        await self._disconnect()
        await self.dev.set_state(XenbusState.CLOSED)

    # -- the end

    async def _disconnect(self) -> None:
        """Let what runs end, then give back rings, ports and pages. Idempotent."""
        async with self._busy:
            await self._give_back()

    def _broken(self, error: PeerError) -> None:
        """The front broke its ring: this device is over, the others go on."""
        self.dev.spawn(self._give_up(error), name=f"{self.dev.nameunit} gives up")

    async def _give_up(self, error: PeerError) -> None:
        await self.dev.fatal(error)
        await self._disconnect()


class FrontEnd(_Half):
    """Rings granted to a back end, and a new connection asked for where one is to be had."""

    def __init__(self, dev: XenbusDevice) -> None:
        super().__init__(dev)
        self._tries = 0  # new connections that were asked for since one was served
        self._refuses = False  # the back end broke a ring: no more of it

    # -- what a driver has of its own

    @property
    @abstractmethod
    def _granted(self) -> bool:
        """Whether the back end has pages of ours."""

    # -- the handshake

    async def _said(self, keys: Iterable[str]) -> dict[str, Any]:
        """These keys of the back end's node, as text; None where there is none."""
        keys = tuple(keys)
        return await self.dev.otherend_gather(dict.fromkeys(keys, text), dict.fromkeys(keys))

    async def _clear(self, values: Mapping[str, object], transport: Pattern[str]) -> None:
        """Away with what an earlier connection published and this one (`values`) does not.

        transport: the keys that say where rings are
        """
        dev = self.dev
        ours = {key.partition("/")[0] for key in values}
        try:
            there = await dev.store.directory(dev.node)
        except NoEntry:
            return  # the node is gone: the bus will say so
        for key in there:
            # An earlier queue-N may hold more than this one's: all of it goes.
            if transport.fullmatch(key) and (key not in ours or key.startswith("queue-")):
                await dev.remove(key)

    async def _begin_anew(self) -> None:
        self.dev.renew()
        await self.dev.set_state(XenbusState.INITIALISING)

    async def _ask_again(self) -> None:
        """The back end closed, and nobody has our pages any more. If it is to go on serving (`online`), it is
        asked for a new connection, as xenbusb_back offers one to a front that comes back."""
        dev = self.dev
        if self._refuses or self._tries >= TRIES or dev.detaching or dev.gone:
            return
        try:
            online = await dev.otherend_read_opt("online")
        except XenbusError:
            return  # gone, and nobody may look where it was
        if online == "1":
            self._tries += 1
            await self._begin_anew()

    # -- the end

    async def _unmapped(self) -> None:
        """Until the back end has let go of our pages, which it does when it sees us Closed, or has had its
        time: what is revoked while it is mapped Linux gives back ten pages a second, all others behind it."""
        dev = self.dev
        if dev.otherend_state not in _MAPS or not self._granted:
            return
        try:
            await dev.wait_otherend(XenbusState.CLOSED, timeout=UNMAP_TIMEOUT)
        except (DeadlineError, LinkDown) as error:
            dev.log.warning("its pages are revoked though they may be mapped: %s", error)


class QuietFrontEnd(FrontEnd):
    """One whose callers wait for the next connection, and need not be told why this one closes."""

    # -- what a driver has of its own

    @abstractmethod
    async def _stop(self) -> None:
        """Nothing more goes out or comes in. The pages stay granted. Idempotent."""

    @abstractmethod
    async def _tear_down(self) -> None:
        """The same, and every page is given back. Idempotent."""

    # -- the end

    async def _close(self) -> None:
        dev = self.dev
        if dev.state is XenbusState.CLOSED:
            return
        await dev.set_state(XenbusState.CLOSING)
        await self._stop()
        await dev.set_state(XenbusState.CLOSED)

    async def _closed(self) -> None:
        """The back end is, or its node is gone: nobody has our pages any more."""
        if self.dev.state is not XenbusState.INITIALISING:
            await self._close()
            await self._tear_down()
            await self._ask_again()
