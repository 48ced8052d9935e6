"""The bus: finds split devices in the store, keeps the tree, hands devices their events. Front and back
alike.

What FreeBSD's xenbusb.c does; front.py and back.py override what differs. The tree changes only in the bus's
own mailbox and never across an await; the life of a single device is led by life.py in that device's mailbox.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from xenbus.bus import life
from xenbus.bus.device import DeviceGone, XenbusDevice, is_within
from xenbus.bus.discovery import Found, look_at
from xenbus.bus.driver import DriverRegistry, XenbusDriver, drivers
from xenbus.bus.error_nodes import ErrorNodes
from xenbus.bus.incarnation import Verdict, look, read_links
from xenbus.bus.index import Index
from xenbus.bus.ivars import child_sysctl
from xenbus.bus.peer import refresh_own
from xenbus.bus.state import Side, XenbusState
from xenbus.errors import DeadlineError, LinkDown, NoEntry, XenbusError
from xenbus.hypervisor.interface import Hypervisor
from xenbus.newbus import Device, Leaf, NoMatch, choose
from xenbus.newbus.runtime import Mailbox, sync_limit, wait_boot
from xenbus.xenstore.client import Client, Transaction, Watch

log = logging.getLogger("xenbus.bus")
T = TypeVar("T")
# Paths that one pass of the bus looks at together: their reads share round trips.
BATCH = 64
# Seconds before a node is looked at again after a passing error; then it is left until its next event.
RETRIES = (0.05, 0.5, 2.0)
_ENDS = (Verdict.GONE, Verdict.REPLACED)


@dataclass(slots=True, frozen=True)
class Settings:
    """Deadlines in seconds, and what a bus may use of a guest's quotas.

    probe:        all probes of one device, which block the loop while they run
    callback:     one callback of a driver (a driver's own `deadline` wins)
    detach:       an orderly detach in all, before it is forced
    boot:         how long one device holds boot
    transactions: open at a time
    attempts:     of one transaction that meets EAGAIN, with a growing pause between them
    journals:     the directory in which drivers keep what another process needs to go on after this one was
                  killed (bus/journals.py); None: they keep nothing
    """

    probe: float = 1.0
    callback: float = 30.0
    detach: float = 10.0
    boot: float = 30.0
    transactions: int = 4
    attempts: int = 20
    journals: Path | None = None


class XenBus(ABC):
    """One bus on one domain's xenstore0. `devices` by node; `device` is its own place in the tree."""

    side: ClassVar[Side]
    root: ClassVar[str]
    id_components: ClassVar[int]
    otherend_keys: ClassVar[tuple[str, str]]
    name: ClassVar[str]
    description: ClassVar[str]
    holds_boot: ClassVar[bool]

    def __init__(
        self,
        store: Client,
        hv: Hypervisor,
        parent: Device,
        registry: DriverRegistry = drivers,
        settings: Settings | None = None,
        *,
        inherits: bool = False,
    ) -> None:
        """Identifies itself on `parent` (xenstore0); `attach` does the rest. seed: xenbusb_identify.

        inherits: devices that are there at `attach` and not Initialising are a former process's, and this bus
        goes on with them (see `inheritable`). Otherwise they are left alone.
        """
        self.store = store
        self.hv = hv
        self.registry = registry
        self.settings = settings or Settings()
        self.newbus = parent.tree
        self.device = self.newbus.add_child(parent, name=self.name, unit=0, desc=self.description)
        self.device.softc = self
        self.chosen: dict[XenbusDevice, type[XenbusDriver] | Exception] = {}
        self.counters: Counter[str] = Counter()
        self.serial = 0
        self._index = Index(self.root, self.id_components)
        self.devices = self._index.devices
        self._loop = asyncio.get_running_loop()
        self.slots = asyncio.Semaphore(self.settings.transactions)
        self._queue: dict[str, int] = {}
        self._retried: Counter[str] = Counter()
        self._inherits = inherits
        self.left: set[str] = set()  # what may be a former process's, until it was looked at
        self._mailbox = Mailbox(self.name, self._handle)
        self._watch: Watch | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._errors = ErrorNodes(self.transaction)
        self._observers: list[Callable[[XenbusDevice, str], None]] = []
        self._boot_timer: asyncio.TimerHandle | None = None
        self._quiet: asyncio.Event = asyncio.Event()
        self._rooted = asyncio.Event()
        self._closed = False
        # Asked before the store's word is taken for the end of a device: whether this whole domain was
        # restored meanwhile, so that a resume is on its way. Linux tells its processes nothing of it.
        self.restored: Callable[[], Awaitable[bool]] | None = None

    # ---- what newbus asks of it (BusMethods) ----

    def child_location(self, child: Device) -> str:
        """seed: xenbusb_print_child."""
        return child.ivars.node if isinstance(child.ivars, XenbusDevice) else ""

    def child_pnpinfo(self, child: Device) -> str:
        return f"type={child.ivars.type}" if isinstance(child.ivars, XenbusDevice) else ""

    def child_sysctl(self, child: Device) -> Mapping[str, Leaf]:
        return child_sysctl(child.ivars) if isinstance(child.ivars, XenbusDevice) else {}

    def sysctl(self) -> Mapping[str, Leaf]:
        """The bus's own leaves: how many devices, and what it came across."""
        found: dict[str, Leaf] = {"devices": lambda: len(self.devices)}
        for name in sorted(self.counters):
            found[f"count.{name}"] = partial(self.counters.__getitem__, name)
        return found

    # ---- overrides ----

    @abstractmethod
    async def enumerate_type(self, device_type: str) -> list[str]:
        """The nodes of one type. StoreError."""

    async def otherend_changed(self, dev: XenbusDevice, state: XenbusState) -> None:
        """seed: xenbusb_otherend_changed: the driver's."""
        if dev.driver is not None:
            await life.call(dev, "otherend_changed", dev.driver.otherend_changed(state))

    async def localend_changed(self, dev: XenbusDevice, path: str) -> None:
        """seed: xenbusb_localend_changed, with its test the right way round (B6)."""
        if path in ("", "/state"):
            if await self.is_restored():
                return
            await refresh_own(dev)
        if dev.hears_local and dev.driver is not None:
            await life.call(dev, "localend_changed", dev.driver.localend_changed(path))

    async def closed(self, dev: XenbusDevice) -> None:  # noqa: B027 - the back bus alone does something
        """An orderly detach has put the device to Closed."""

    async def is_restored(self) -> bool:
        """See `restored`."""
        return self.restored is not None and await self.restored()

    async def inheritable(self, node: str, state: XenbusState) -> bool:
        """Whether to go on with what a former process left in that state. StoreError."""
        return False

    # ---- attach, detach ----

    async def attach(self) -> None:
        """Watch first, then look (B11). Returns when every device that was there has been seen; its driver's
        attach may go on: `wait_boot`. A subtree that is not there yet is fine; a watch refused is raised."""
        bias = self.newbus.boot.hold(self.name, self.now() + self.settings.boot)
        try:
            self.registry.load_entry_points()
            self._watch = await self.store.watch(self.root, self._root_event)
            self._post(self.root)
            await self.quiet()
        finally:
            bias.release()

    async def quiet(self) -> None:
        """Until the bus has looked at everything it heard of. Devices may still be attaching."""
        self._quiet.clear()
        self._mailbox.post("scan")
        while not self._closed:
            await self._quiet.wait()
            if not self._queue:
                return
            self._quiet.clear()

    async def detach(self) -> None:
        """Every device in an orderly way, together, each within the detach deadline; then the bus itself."""
        await self._stop_looking()
        await asyncio.gather(*(self._bury(dev) for dev in list(self.devices.values())))
        await self._end()

    async def release(self) -> dict[str, Exception]:
        """The end for a bus whose devices another process will go on with (one that `inherits`): every
        driver's release, together, and no state is written. What could not end, by node."""
        await self._stop_looking()
        devs = list(self.devices.values())
        failures = self._failures(devs, await self._together(devs, life.release), "release")
        await self._end()
        return failures

    async def _stop_looking(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            await watch.close()
        self._closed = True
        self._quiet.set()
        self._queue.clear()

    async def _end(self) -> None:
        while self._tasks:
            await asyncio.wait(list(self._tasks))
        for dev in list(self.devices.values()):
            self._forget(dev)
        task = self._mailbox.cancel()
        if task is not None:
            await asyncio.wait({task})
        if self._boot_timer is not None:
            self._boot_timer.cancel()
            self._boot_timer = None
        self.newbus.delete(self.device)

    async def _bury(self, dev: XenbusDevice) -> None:
        try:
            await life.detach(dev)
        except LinkDown as exc:
            dev.log.warning("detached without the store: %s", exc)

    async def wait_boot(self, timeout: float) -> list[str]:
        """Until no device holds boot. Who was too slow (`Settings.boot`); DeadlineError after `timeout` s."""
        return await wait_boot(self.newbus.boot, timeout)

    # ---- events of the root ----

    async def _watch_root(self) -> None:
        """Returns after the first event, which counts as a touch of every device: one that is adopted before
        it would be taken for another that was made in its place."""
        self._rooted.clear()
        self._watch = await self.store.watch(self.root, self._root_event)
        try:
            async with asyncio.timeout(self.settings.callback):
                await self._rooted.wait()
        except TimeoutError:
            raise DeadlineError(
                f"the first event of the watch on {self.root}", "the store", self.settings.callback
            ) from None

    def _root_event(self, path: str) -> None:
        """seed: xenbusb_devices_changed. Synchronous, so that what a device knows of itself is never behind
        the store's answers (incarnation.py)."""
        if not is_within(path, self.root):
            self.counters["short_events"] += 1
            log.warning("%s: event at %r ignored", self.name, path)
            return
        self.serial += 1
        self._rooted.set()
        node, below = self._index.split(path)
        if below:
            dev = self.devices.get(node)
            # A property of a device that we have is that device's own business (B12).
            if dev is None or below == "state":
                self._post(node)
            return
        for dev in self._index.under(node):
            dev.touched = self.serial
        self._post(node)

    def _post(self, path: str) -> None:
        self._queue.pop(path, None)
        self._queue[path] = self.serial
        self._mailbox.post("scan")

    # ---- the bus's own task: the tree changes here alone ----

    async def _handle(self, event: Hashable) -> None:
        match event:
            case "scan":
                await self._scan()
            case ("forget", XenbusDevice() as dev):
                self._forget(dev)

    async def _scan(self) -> None:
        nodes: dict[str, None] = {}
        while self._queue and len(nodes) < BATCH:
            path = next(iter(self._queue))
            del self._queue[path]
            if self._index.is_node(path):
                nodes[path] = None
                continue
            known = [dev.node for dev in self._index.under(path)]
            if path == self.root:
                there = await self._enumerate()
                known += there
                if self._inherits:  # the first look: what comes later was not left to us
                    self._inherits = False
                    self.left.update(there)
            # B10: what is at or below a removed parent is looked at, each by itself.
            for node in known:
                self._queue.setdefault(node, self.serial)
        try:
            seen = await asyncio.gather(*(look_at(self, node) for node in nodes))
            if any(found.verdict in _ENDS for found in seen) and await self.is_restored():
                return  # these nodes are another domain's; the resume looks at all of them
            for found in seen:
                self._apply(found)
        finally:
            if self._queue:
                self._mailbox.post("scan")
            else:
                self._quiet.set()

    async def _enumerate(self) -> list[str]:
        """seed: xenbusb_enumerate_bus. A type that cannot be listed does not stop the rest."""
        nodes: list[str] = []
        try:
            types = await self.store.directory(self.root)
        except NoEntry:
            return nodes
        except XenbusError as exc:
            log.warning("%s: %s", self.name, exc)
            return nodes
        for device_type in types:
            try:
                nodes += await self.enumerate_type(device_type)
            except XenbusError as exc:
                log.info("%s: type %s: %s", self.name, device_type, exc)
        return nodes

    def _apply(self, found: Found) -> None:
        node, dev = found.node, self.devices.get(found.node)
        if found.again:
            self._again(node)
            return
        self._retried.pop(node, None)
        if dev is not None and found.verdict in (Verdict.GONE, Verdict.REPLACED) and not dev.gone:
            self.counters[found.verdict.value] += 1
            dev.log.info("%s: %s", dev.node, found.verdict.value)
            dev.gone = True
            self.task(life.vanish(dev))
        elif dev is None and found.missing:
            if node in self._errors:
                self.task(self._errors.clear(node))
        elif dev is None and not self._touched_since(node, found.serial):
            self.left.discard(node)
            if found.links is not None:
                self._add(node, found.links, found.state, found.serial)

    def _touched_since(self, node: str, serial: int) -> bool:
        """An event at or above the node came while we read it: what we read may be of another incarnation,
        and the event will have the node read again."""
        return any(self._queue.get(path, 0) > serial for path in self._index.at_or_above(node))

    def _again(self, node: str) -> None:
        attempt = self._retried[node]
        self._retried[node] += 1
        if attempt < len(RETRIES) and not self._closed:
            self._loop.call_later(RETRIES[attempt], self._retry, node)
        else:
            del self._retried[node]

    def _retry(self, node: str) -> None:
        if not self._closed:
            self._post(node)

    def _add(self, node: str, links: tuple[int, str], state: XenbusState, serial: int) -> None:
        """The child, its driver by probe, its unit, its hold on boot; the rest is up to its own mailbox."""
        device = self.newbus.add_child(self.device)
        dev = XenbusDevice(self, device, node, node.split("/", 2)[1], serial, state)
        if state is not XenbusState.INITIALISING:
            self.counters["inherited"] += 1
        dev.otherend_id, dev.otherend_path = links
        device.ivars = dev
        self._index.add(dev)
        if node in self._errors:
            self.task(self._errors.clear(node))
        self._hold_boot(dev)
        try:
            with sync_limit(self.settings.probe, f"probe of {node}", "its driver's probe()"):
                cls = choose(self.registry.candidates(self.side, dev.type), dev)
            self.newbus.name(device, cls.name, cls.unit(dev), cls.description)
        except NoMatch:
            # Forgotten, and the store left alone: an emulated twin may share the backend.
            self.counters["no_driver"] += 1
            dev.release_hold()
            self._forget(dev)
            return
        except Exception as exc:
            log.exception("%s: no driver could be chosen", node)
            self.chosen[dev] = exc
        else:
            self.chosen[dev] = cls
        dev.mailbox.post("attach")

    def _hold_boot(self, dev: XenbusDevice) -> None:
        if not self.holds_boot:
            return
        dev.hold = self.newbus.boot.hold(dev.node, self.now() + self.settings.boot)
        if self._boot_timer is None:
            self._boot_timer = self._loop.call_later(self.settings.boot, self._boot_expired)

    def _boot_expired(self) -> None:
        """No device holds boot for longer than its deadline, whether or not somebody waits for it (B3)."""
        self._boot_timer = None
        for what in self.newbus.boot.expire(self.now()):
            log.warning("%s: boot does not wait any longer for %s", self.name, what)
        due = self.newbus.boot.next_expiry()
        if due is not None:
            self._boot_timer = self._loop.call_at(due, self._boot_expired)

    def _forget(self, dev: XenbusDevice) -> None:
        """Out of the tree. Idempotent. One that was replaced or removed is looked for again."""
        if self.devices.get(dev.node) is not dev:
            return
        self._index.remove(dev)
        self.chosen.pop(dev, None)
        dev.release_hold()
        dev.mailbox.clear()
        self.newbus.delete(dev.device)
        self.changed(dev, "gone")
        if dev.gone and not self._closed:
            self._post(dev.node)

    # ---- what devices ask of their bus ----

    def now(self) -> float:
        return self._loop.time()

    def handle(self, dev: XenbusDevice, event: Hashable) -> Awaitable[None]:
        return life.handle(dev, event)

    async def transaction(self, function: Callable[[Transaction], Awaitable[T]]) -> T:
        """One of at most `Settings.transactions` that are open at a time: a guest has 10 for everything."""
        async with self.slots:
            return await self.transact(function)

    def transact(self, function: Callable[[Transaction], Awaitable[T]]) -> Awaitable[T]:
        """With a slot held. The client retries EAGAIN alone, a bounded number of times, and aborts only what
        was started (B2, B5)."""
        return self.store.transaction(function, attempts=self.settings.attempts)

    async def check_incarnation(self, dev: XenbusDevice, tx: Transaction) -> bool:
        """DeviceGone unless the node is still this device; the bus then looks for itself. True if it was told
        to close."""
        verdict = await look(dev, tx.read)
        if verdict in (Verdict.GONE, Verdict.REPLACED):
            self._post(dev.node)
            raise DeviceGone(f"{dev.node} is {verdict.value}")
        return verdict is Verdict.TOLD_TO_CLOSE

    async def adopt(self, dev: XenbusDevice) -> None:
        """After a restore: the node in the new store is this device, whatever it says; Initialising is
        written and the peer read anew, for it may have moved. DeviceGone if there is no such node."""

        async def write(tx: Transaction) -> None:
            await tx.read(f"{dev.node}/state")
            await tx.write(f"{dev.node}/state", str(int(XenbusState.INITIALISING)))

        async with dev.locked():
            serial = self.serial
            try:
                await self.transaction(write)
                links = await read_links(dev.node, self.otherend_keys, self.store.read)
            except NoEntry as exc:
                raise DeviceGone(f"{dev.node} is not in the restored store") from exc
            dev.moved(XenbusState.INITIALISING)
            dev.otherend_id, dev.otherend_path = links
            dev.born = serial

    async def write_error(self, node: str, value: bytes) -> None:
        await self._errors.write(self.store, node, value)

    def refused(self, dev: XenbusDevice, exc: Exception) -> None:
        self.counters["attach_failures"] += 1
        dev.log.error("attach: %s", exc)

    def post_forget(self, dev: XenbusDevice) -> None:
        self._mailbox.post(("forget", dev))

    def post_detach(self, dev: XenbusDevice) -> None:
        if not self._closed and not dev.detaching:
            self.task(life.detach(dev))

    def post_fatal(self, dev: XenbusDevice, exc: BaseException) -> None:
        self.task(dev.fatal(exc))

    def task(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """A task of the bus itself: it ends before `detach` does."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("%s: %s", self.name, exc, exc_info=exc)

    def observe(self, callback: Callable[[XenbusDevice, str], None]) -> Callable[[], None]:
        """`callback(device, what)` for every move: "state", "otherend", "attached", "detaching", "failed",
        "gone". Synchronous. Returns what ends it."""
        self._observers.append(callback)
        return lambda: self._observers.remove(callback) if callback in self._observers else None

    def changed(self, dev: XenbusDevice, what: str) -> None:
        for callback in list(self._observers):
            try:
                callback(dev, what)
            except Exception:
                log.exception("an observer of %s", self.name)

    # ---- suspend and resume ----

    async def stand_still(self) -> None:
        """Events wait until `resume`, and no driver is asked: this domain was suspended before we knew."""
        await self._mailbox.stand_still()
        await asyncio.gather(*(dev.mailbox.stand_still() for dev in self.devices.values()))

    async def suspend(self) -> dict[str, Exception]:
        """Every driver's suspend, together (B13); events wait from then on. The failures by node."""
        await self._mailbox.stand_still()
        devs = list(self.devices.values())
        orders = [life.Suspend() for _ in devs]
        for dev, order in zip(devs, orders, strict=True):
            dev.mailbox.post(order)
        return self._failures(devs, await asyncio.gather(*(order.done for order in orders)), "suspend")

    async def resume(
        self, cancelled: bool, *, store: Client | None = None, hv: Hypervisor | None = None
    ) -> dict[str, Exception]:
        """Every device, together; one that fails stops no other (B13). The failures by node.

        cancelled: only the drivers are told. Otherwise this is another domain now: `store` and `hv` are the
        new ones, and everything that belonged to the old ones is dropped without being touched.
        """
        devs = [dev for dev in self.devices.values() if dev.device.attached and not dev.gone]
        others = [dev for dev in self.devices.values() if dev not in devs]
        if cancelled:
            results = await self._together(devs, life.resume_cancelled)
        else:
            self.store = store or self.store
            self.hv = hv or self.hv
            self._errors.forget_all()
            await self._watch_root()
            results = await self._together(devs, life.resume)
            await self._together(others, life.drop)
        failures = self._failures(devs, results, "resume")
        await self._together(
            [self.devices[node] for node in failures], lambda dev: life.resume_failed(dev, failures[dev.node])
        )
        for dev in self.devices.values():
            dev.mailbox.go_on()
        self._mailbox.go_on()
        return failures

    async def _together(
        self, devs: Iterable[XenbusDevice], action: Callable[[XenbusDevice], Coroutine[Any, Any, None]]
    ) -> list[Exception | None]:
        return list(await asyncio.gather(*(life.attempt(action(dev)) for dev in devs)))

    def _failures(
        self, devs: Iterable[XenbusDevice], results: Iterable[Exception | None], what: str
    ) -> dict[str, Exception]:
        failures = {dev.node: exc for dev, exc in zip(devs, results, strict=True) if exc is not None}
        for node, exc in failures.items():
            log.error("%s of %s: %s", what, node, exc)
        return failures
