"""One half of a split device, as its driver holds it: its node, its peer, its state, and what it takes.

Everything that a driver asks for goes through here, so that all of it can be given back. Knows the store's
client and the hypervisor's interface; the bus beneath it only as what finds, watches and buries devices.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from collections.abc import Mapping as MappingT
from typing import TYPE_CHECKING, Any

from xenbus.bus.device_lock import Locked, PassingLock
from xenbus.bus.device_log import Allowance, DeviceLog
from xenbus.bus.driver import XenbusDriver
from xenbus.bus.error_nodes import ERROR_TEXT_MAX, Doing, errno_of
from xenbus.bus.features import Negotiated
from xenbus.bus.owned import Owned
from xenbus.bus.state import Side, XenbusState, parse_state, strstate, usual_move
from xenbus.errors import (
    DeadlineError,
    LinkDown,
    NoEntry,
    PeerError,
    StoreError,
    XenbusError,
)
from xenbus.hypervisor.interface import Channel, GrantedPages, Hypervisor, Mapping
from xenbus.newbus import Device, Token
from xenbus.newbus.runtime import Mailbox
from xenbus.xenstore.client import Client, Transaction, Watch

if TYPE_CHECKING:
    from xenbus.bus.xenbusb import XenBus

log = logging.getLogger("xenbus.bus")
_ENDING = (XenbusState.CLOSING, XenbusState.CLOSED)
# What may change below our own node that concerns the bus itself.
OWN_EVENTS = frozenset({"", "/state", "/online"})


class DeviceGone(XenbusError):
    """Our node was removed (or is another device's by now): nothing may be written there any more."""


class _ToldToClose(XenbusError):
    """A toolstack wrote Closing into our node, which we had yet to see."""


class XenbusDevice:
    """See the module. Made by its bus, handed to `probe` and to the driver's constructor.

    node:           relative to our domain: "device/vbd/51712", "backend/vbd/7/51712"; it survives a restore
    otherend_path:  the peer's node, absolute; otherend_id: its domain
    otherend_state: the last state that the peer said and that is one
    gone:           the node vanished; there is nobody to wait for
    failed:         why the bus gave up on the driver, or ""
    since:          the loop's time of the last move of either end
    features:       what was negotiated, if the driver says so: shown in sysctl and tree
    """

    __slots__ = (
        "_allowance",
        "_fatal",
        "_owned",
        "_state",
        "_tally",
        "_waiters",
        "born",
        "bus",
        "detaching",
        "device",
        "driver",
        "failed",
        "features",
        "gone",
        "hold",
        "local_watch",
        "lock",
        "mailbox",
        "node",
        "otherend_id",
        "otherend_path",
        "otherend_state",
        "peer_watch",
        "queued",
        "queued_since",
        "since",
        "touched",
        "type",
    )

    def __init__(
        self,
        bus: XenBus,
        device: Device,
        node: str,
        device_type: str,
        born: int,
        state: XenbusState = XenbusState.INITIALISING,
    ) -> None:
        """state: as it stands in the node; a former process's, unless it is INITIALISING."""
        self.bus = bus
        self.device = device
        self.node = node
        self.type = device_type
        self.otherend_id = -1
        self.otherend_path = ""
        self.otherend_state = XenbusState.UNKNOWN
        self.driver: XenbusDriver | None = None
        self.features: Negotiated | None = None
        self.since = bus.now()
        self.gone = False
        self.failed = ""
        self.detaching = False
        self.mailbox = Mailbox(node, self._handle)
        self.hold: Token | None = None
        self.peer_watch: Watch | None = None
        self.local_watch: Watch | None = None
        # In the bus's count of events: when this incarnation was last seen for sure, and the last event at or
        # above our node, which may mean that it was removed and made again since (see incarnation.py).
        self.born = born
        self.touched = born
        # Seconds that our writes waited for a transaction's turn, and since when one is waiting now: with
        # thousands of devices that is not the driver's fault, and not counted as its time.
        self.queued = 0.0
        self.queued_since = 0.0
        self._state = state
        self._fatal = False
        self.lock: PassingLock | None = None
        self._owned: Owned | None = None
        self._tally: dict[str, int] | None = None
        self._allowance: Allowance | None = None
        self._waiters: set[asyncio.Future[None]] | None = None

    def _handle(self, event: Hashable) -> Awaitable[None]:
        return self.bus.handle(self, event)

    # ---- what it is ----

    @property
    def id(self) -> str:
        """What follows the type in the node: "51712", "7/51712"."""
        return self.node.split("/", 2)[2]

    @property
    def side(self) -> Side:
        return self.bus.side

    @property
    def state(self) -> XenbusState:
        """Our own state as last written or seen."""
        return self._state

    @property
    def nameunit(self) -> str:
        return self.device.nameunit

    @property
    def store(self) -> Client:
        return self.bus.store

    @property
    def hv(self) -> Hypervisor:
        return self.bus.hv

    @property
    def log(self) -> DeviceLog:
        if self._allowance is None:
            self._allowance = Allowance()
        name = f"{self.nameunit or self.node} (domain {self.otherend_id})"
        return DeviceLog(log, name, self._allowance, self.bus.now)

    def __repr__(self) -> str:
        return f"<XenbusDevice {self.nameunit or '?'} at {self.node} {self._state.name}>"

    # ---- states ----

    async def set_state(self, state: XenbusState, values: MappingT[str, object] | None = None) -> bool:
        """Writes `state`, and `values` (key -> value) with it, in one transaction. True if it stands there.

        The state that we have already: nothing is written, unless there are `values`. False: the node is gone
        or another device's by now, nothing was written (a removed node is never made again); or a toolstack
        wrote Closing meanwhile, which only Closed may follow: that stays, and is our state from now on. Any
        other error is raised after the device was put to CLOSING with an error node (xenbusb_write_ivar).
        """
        async with self.locked():
            if self.gone:
                return False
            if self._state is state and not values:
                return True
            entries = {key: _text(value) for key, value in (values or {}).items()}
            try:
                await self._write({**entries, "state": str(int(state))}, opens=state not in _ENDING)
            except _ToldToClose:
                self.moved(XenbusState.CLOSING)
                return False
            except (DeviceGone, NoEntry):
                return False
            except (StoreError, DeadlineError) as exc:
                failure: XenbusError = exc
            else:
                self.moved(state)
                return True
        # Outside of the lock and the transaction, and not for Closing itself: B4.
        if state is not XenbusState.CLOSING:
            await self.fatal(failure, doing=f"writing state {strstate(state)}")
        raise failure

    def moved(self, state: XenbusState) -> None:
        """Our state stands in the store as `state`."""
        if not usual_move(self._state, state):
            self.count("odd_moves")
        if self._state is not state:
            self.since = self.bus.now()
        self._state = state
        if self.hold is not None and state in (XenbusState.CONNECTED, XenbusState.CLOSED):
            self.release_hold()
        self.bus.changed(self, "state")

    def release_hold(self) -> None:
        hold, self.hold = self.hold, None
        if hold is not None:
            hold.release()

    async def _write(self, entries: MappingT[str, str], *, opens: bool = False) -> None:
        """DeviceGone unless the node is still there and still ours, which the transaction itself looks at.

        opens: a step towards Connected, which may not undo somebody's Closing (_ToldToClose)
        """

        async def write(tx: Transaction) -> None:
            if await self.bus.check_incarnation(self, tx) and opens:
                raise _ToldToClose
            replies = await asyncio.gather(
                *(tx.write(f"{self.node}/{key}", value) for key, value in entries.items()),
                return_exceptions=True,
            )
            for reply in replies:
                if isinstance(reply, BaseException):
                    raise reply

        self.queued_since = self.bus.now()
        try:
            async with self.bus.slots:
                self._turn()
                await self.bus.transact(write)
        finally:
            self._turn()

    def _turn(self) -> None:
        if self.queued_since:
            self.queued += self.bus.now() - self.queued_since
            self.queued_since = 0.0

    def queueing(self) -> float:
        """Seconds that our writes have waited for their turn so far."""
        return self.queued + (self.bus.now() - self.queued_since if self.queued_since else 0.0)

    async def wait_otherend(self, *states: XenbusState, timeout: float) -> XenbusState:
        """Until the peer is in one of `states`; CLOSED at once if our node is gone. DeadlineError, LinkDown.

        For `detach` and spawned tasks: in `otherend_changed` it would wait for an event behind itself.
        """
        end = self.bus.now() + timeout
        while not self.gone and self.otherend_state not in states:
            if self.store.closed:
                raise LinkDown(f"{self.nameunit}: without the store the peer cannot be seen")
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters = (self._waiters or set()) | {waiter}
            try:
                async with asyncio.timeout_at(end):
                    await waiter
            except TimeoutError:
                wanted = " or ".join(strstate(state) for state in states)
                raise DeadlineError(
                    f"{self.side.peer.value} state {wanted}", self.otherend, timeout
                ) from None
            finally:
                if self._waiters is not None:
                    self._waiters.discard(waiter)
        return XenbusState.CLOSED if self.gone else self.otherend_state

    def peer_moved(self, state: XenbusState) -> None:
        """The peer's state was read as `state`."""
        if self.otherend_state is not state:
            if self.otherend_state is not XenbusState.UNKNOWN and not usual_move(self.otherend_state, state):
                self.count("peer_odd_moves")
            self.since = self.bus.now()
        self.otherend_state = state
        self.wake()
        self.bus.changed(self, "otherend")

    def wake(self) -> None:
        waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    @property
    def otherend(self) -> str:
        """Who the peer is, for messages."""
        return f"domain {self.otherend_id}, {self.otherend_path}"

    # ---- our own node ----

    async def read(self, key: str) -> str:
        """NoEntry if it is not there."""
        return await self.store.read_str(f"{self.node}/{key}")

    async def read_opt(self, key: str) -> str | None:
        """None if it is not there; any other error is raised."""
        return await _optional(self.read(key))

    async def gather(
        self, wanted: MappingT[str, Callable[[bytes], Any]], defaults: MappingT[str, Any] | None = None
    ) -> dict[str, Any]:
        """`{key: converter}` of our node, in one go. See Client.gather."""
        return await self.store.gather(self.node, wanted, defaults)

    async def write(self, key: str, value: object) -> None:
        await self.write_many({key: value})

    async def write_many(self, values: MappingT[str, object]) -> None:
        """All in one transaction. DeviceGone if the node was removed or made anew: never made again by us."""
        async with self.locked():
            if self.gone:
                raise DeviceGone(f"{self.node} is gone")
            try:
                await self._write({key: _text(value) for key, value in values.items()})
            except NoEntry as exc:
                raise DeviceGone(f"{self.node} was removed") from exc

    async def remove(self, key: str) -> None:
        """Quiet if it is not there."""
        try:
            await self.store.rm(f"{self.node}/{key}")
        except NoEntry:
            pass

    async def online(self) -> bool:
        """xenbus_dev_is_online: our `online` is a number and not 0; an error is False."""
        try:
            return int(await self.read("online")) != 0
        except (XenbusError, ValueError):
            return False

    # ---- the peer's node ----

    async def otherend_read(self, key: str) -> str:
        return await self.store.read_str(f"{self.otherend_path}/{key}")

    async def otherend_read_opt(self, key: str) -> str | None:
        """None if it is not there; any other error is raised."""
        return await _optional(self.otherend_read(key))

    async def otherend_gather(
        self, wanted: MappingT[str, Callable[[bytes], Any]], defaults: MappingT[str, Any] | None = None
    ) -> dict[str, Any]:
        """A value that a converter refuses is PeerError."""
        return await self.store.gather(self.otherend_path, wanted, defaults)

    # ---- what it takes ----

    @property
    def owned(self) -> Owned:
        if self._owned is None:
            self._owned = Owned(self.hv)
        if self._owned.closed:
            raise DeviceGone(f"{self.nameunit or self.node} is detached: it can take nothing more")
        return self._owned

    async def grant_ring(self, pages: int, *, writable: bool = True) -> GrantedPages:
        """`pages` zeroed pages in a row for the peer to map (xenbus_grant_ring). HypervisorError."""
        owned = self.owned
        return await owned.acquire(
            self.hv.grants.alloc(self.otherend_id, pages, writable=writable),
            owned.grants,
            self.hv.grants.revoke,
        )

    async def revoke(self, pages: GrantedPages) -> None:
        if self._owned is not None and self._owned.grants.pop(id(pages), None) is not None:
            await self.hv.grants.revoke(pages)

    async def map_ring(self, refs: list[int] | tuple[int, ...], writable: bool = True) -> Mapping:
        """The peer's pages, in a row. HypervisorError for a ref that it never granted."""
        owned = self.owned
        return await owned.acquire(
            self.hv.gntdev.map(self.otherend_id, refs, writable=writable),
            owned.mappings,
            self.hv.gntdev.unmap,
        )

    async def unmap(self, mapping: Mapping) -> None:
        if self._owned is not None and self._owned.mappings.pop(id(mapping), None) is not None:
            await self.hv.gntdev.unmap(mapping)

    async def alloc_evtchn(self, handler: Callable[[], None]) -> Channel:
        """An unbound port that the peer alone may bind (xenbus_alloc_evtchn)."""
        return await self._take_channel(self.hv.evtchn.alloc_unbound(self.otherend_id, handler))

    async def bind_evtchn(self, port: int, handler: Callable[[], None]) -> Channel:
        """The peer's port. HypervisorError if it is not meant for us."""
        return await self._take_channel(self.hv.evtchn.bind_interdomain(self.otherend_id, port, handler))

    async def _take_channel(self, taking: Coroutine[Any, Any, Channel]) -> Channel:
        """The handler, which may use the channel, does not run before the driver has it: a fresh binding
        fires at once, and a peer may guess a port."""
        owned = self.owned
        channel = await owned.acquire(_masked(taking), owned.channels, _close)
        asyncio.get_running_loop().call_soon(channel.unmask)
        return channel

    async def close_evtchn(self, channel: Channel) -> None:
        if self._owned is not None and self._owned.channels.pop(id(channel), None) is not None:
            await channel.close()

    def spawn(self, coroutine: Coroutine[Any, Any, Any], *, name: str = "") -> asyncio.Task[Any]:
        """A task that ends with the device. What it raises is `fatal`."""
        try:
            owned = self.owned
        except DeviceGone:
            coroutine.close()
            raise
        task = owned.spawn(coroutine, name or f"{self.nameunit} task")
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (exc := task.exception()) is not None and not self._closed:
            self.bus.post_fatal(self, exc)

    @property
    def _closed(self) -> bool:
        return self._owned is not None and self._owned.closed

    async def watch(self, path: str, callback: Callable[[str], None]) -> Watch:
        """Counts against the domain's watches (128 for a guest, and each device has two)."""
        owned = self.owned
        return await owned.acquire(self.store.watch(path, callback), owned.watches, _close)

    async def unwatch(self, watch: Watch) -> None:
        if self._owned is not None:
            self._owned.watches.pop(id(watch), None)
        await watch.close()

    def counts(self) -> dict[str, int]:
        """How many are held: tasks, watches (not the bus's two), channels, mapped and granted pages."""
        return self._owned.counts() if self._owned is not None else dict.fromkeys(_COUNTS, 0)

    async def give_back(self) -> None:
        if self._owned is not None:
            await self._owned.give_back()

    async def drop_all(self) -> None:
        """What was taken is gone with the old hypervisor: forget it, and be ready to take anew."""
        owned, self._owned = self._owned, None
        if owned is not None:
            await owned.drop()

    def renew(self) -> None:
        """May be fatal once more: another connection begins."""
        self._fatal = False

    # ---- trouble ----

    async def error(self, what: BaseException | str) -> None:
        """xenbus_dev_error: logged, and `error/<node>/error` says it with an errno. Never raises."""
        text = str(what) or type(what).__name__
        self.log.error("%s", text)
        self.count("errors")
        value = f"{errno_of(what)} {text}".encode("utf-8", "surrogateescape")[:ERROR_TEXT_MAX]
        try:
            await self.bus.write_error(self.node, value)
        except (StoreError, LinkDown, DeadlineError) as exc:
            self.log.error("the error node could not be written: %s", exc)

    async def fatal(self, what: BaseException | str, *, doing: str = "") -> None:
        """xenbus_dev_fatal: `error`, then CLOSING, once until the device starts anew. Never raises."""
        if self._fatal:
            self.log.error("%s (closing already)", what)
            return
        self._fatal = True
        if doing:
            await self.error(Doing(what, doing))
        else:
            await self.error(what)
        if self._state in (XenbusState.CLOSING, XenbusState.CLOSED):
            return
        try:
            await self.set_state(XenbusState.CLOSING)
        except XenbusError as exc:
            self.log.error("cannot go to Closing: %s", exc)

    def request_detach(self) -> None:
        """Posted, not awaited: the bus detaches this device in an orderly way, in its own time."""
        self.bus.post_detach(self)

    # ---- events: the two watches' callbacks, which the bus registers ----

    def peer_event(self, path: str) -> None:
        """seed: xenbusb_otherend_watch_cb. One event waits at most, however fast the peer flaps."""
        if self.otherend_path and is_within(path, self.otherend_path):
            self.mailbox.post("otherend")

    def local_event(self, path: str) -> None:
        """seed: xenbusb_local_watch_cb. Hands on what follows our node in the path."""
        if is_within(path, self.node):
            rest = path[len(self.node) :]
            if rest in OWN_EVENTS or self.hears_local:
                self.mailbox.post(("local", rest))

    @property
    def hears_local(self) -> bool:
        """Whether the driver has a `localend_changed` of its own."""
        driver = self.driver
        return driver is not None and type(driver).localend_changed is not XenbusDriver.localend_changed

    def count(self, what: str) -> None:
        """A counter of this device, shown in sysctl and tree."""
        if self._tally is None:
            self._tally = {}
        self._tally[what] = self._tally.get(what, 0) + 1

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._tally or {})

    def peer_garbage(self, exc: PeerError) -> None:
        """The peer's `state` is none: recorded, the last state stays."""
        self.count("peer_garbage")
        self.log.warning("%s: %s; taken as still %s", self.otherend, exc, strstate(self.otherend_state))

    # ---- the lock for writing and refreshing our state ----

    def locked(self) -> Locked:
        return Locked(self)

    async def refresh_state(self) -> None:
        """Our state from the store, under the lock: a refresh that read the old value must not overwrite a
        newer write. A node that is gone or re-armed is the bus's to deal with. StoreError."""
        async with self.locked():
            try:
                state = parse_state(await self.store.read(f"{self.node}/state"))
            except NoEntry:
                return
            except PeerError as exc:
                self.count("garbage")
                self.log.warning("%s/state: %s; still %s", self.node, exc, strstate(self._state))
                return
            if state is not self._state and state is not XenbusState.INITIALISING:
                self.moved(state)


def is_within(path: str, root: str) -> bool:
    """Whether `path` is `root` or below it, by whole components (B15: ".../5" is no root of ".../51")."""
    return path == root or path.startswith(root + "/")


_COUNTS = ("tasks", "watches", "channels", "mapped_pages", "granted_pages")


async def _masked(taking: Coroutine[Any, Any, Channel]) -> Channel:
    channel = await taking
    channel.mask()
    return channel


async def _close(thing: Channel | Watch) -> None:
    await thing.close()


async def _optional(reading: Coroutine[Any, Any, str]) -> str | None:
    try:
        return await reading
    except NoEntry:
        return None


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, int) else str(value)
