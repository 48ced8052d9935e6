"""Attach and detach a split device as a toolstack does: both halves' nodes, permissions included, in one
transaction; then wait, with a deadline, for what the two drivers make of it. Knows no kind of device.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from xenbus.bus import XenbusState, parse_state
from xenbus.errors import DeadlineError, Denied, NoEntry, NotFound, PeerError, UsageError, XenbusError
from xenbus.toolstack.atomic import atomically
from xenbus.toolstack.paths import DevicePaths, domain_path, libxl_path
from xenbus.xenstore.client import Client, Transaction, Watch
from xenbus.xenstore.wire import Access, Perm

ATTACH_DEADLINE = 30.0  # seconds, as libxl waits for a device
DETACH_DEADLINE = 10.0  # libxl's LIBXL_DESTROY_TIMEOUT

_CLOSING = frozenset({XenbusState.CLOSING, XenbusState.CLOSED})
_Changed = Callable[[float], Awaitable[bool]]


class DeviceFailed(XenbusError):
    """A driver refused a device; the message holds its own words."""


class DeviceThere(UsageError):
    """The domain has a device of that kind and number."""


@dataclass(slots=True)
class DeviceSpec:
    """One split device before it exists: where it goes, and what either half's directory says.

    told: what the front's directory says besides, in nodes of the back end's domain that the guest can only
          read (libxl's ro_front)
    """

    paths: DevicePaths
    front: Mapping[str, str] = field(default_factory=dict)
    back: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, str] = field(default_factory=dict)

    def rehomed(self, *, front_domid: int, back_domid: int | None = None) -> DeviceSpec:
        """The same device for another domain, and from another one if that is said."""
        old = self.paths
        home = old.back_domid if back_domid is None else back_domid
        paths = DevicePaths(old.kind, old.devid, front_domid, home, old.back_kind)
        return DeviceSpec(paths, self.front, self.back, self.told)


def _perms(owner: int, reader: int) -> list[Perm]:
    """Nobody but the owner, and the other end may read: `n<owner> r<reader>`."""
    return [Perm(Access.NONE, owner), Perm(Access.READ, reader)]


async def write_device(store: Client, spec: DeviceSpec) -> None:
    """Both halves and the toolstack's record appear at once. DeviceThere, UsageError."""
    paths = spec.paths

    async def write(tx: Transaction) -> None:
        for domid in {paths.front_domid, paths.back_domid}:
            if not await tx.exists(f"{domain_path(domid)}/name"):
                raise UsageError(f"no domain {domid}")
        if await tx.exists(paths.front):
            raise DeviceThere(f"domain {paths.front_domid} has a {paths.kind} {paths.devid} already")
        front = {
            "backend": paths.back,
            "backend-id": str(paths.back_domid),
            "state": str(int(XenbusState.INITIALISING)),
            **spec.front,
        }
        back = {
            "frontend": paths.front,
            "frontend-id": str(paths.front_domid),
            "online": "1",
            "state": str(int(XenbusState.INITIALISING)),
            **spec.back,
        }
        await _write_directory(tx, paths.front, _perms(paths.front_domid, paths.back_domid), front)
        for key, value in spec.told.items():
            await tx.write(f"{paths.front}/{key}", value)
            await tx.set_perms(f"{paths.front}/{key}", _perms(paths.back_domid, paths.front_domid))
        await _write_directory(tx, paths.back, _perms(paths.back_domid, paths.front_domid), back)
        await tx.mkdir(paths.record)
        for key, value in {"frontend": paths.front, "backend": paths.back, **_recorded(spec)}.items():
            await tx.write(f"{paths.record}/{key}", value)

    await atomically(store, write)


async def write_numbered(store: Client, make: Callable[[], Awaitable[DeviceSpec]]) -> DeviceSpec:
    """`write_device` of one whose number `make` found to be free. Another operator may look at the same time:
    then it is asked for the next one. DeviceThere if it says the same again."""
    refused = None
    while True:
        spec = await make()
        try:
            await write_device(store, spec)
            return spec
        except DeviceThere:
            if spec.paths == refused:
                raise
            refused = spec.paths


def _recorded(spec: DeviceSpec) -> dict[str, str]:
    """What it takes to make the device again after a reboot or restore: the specification itself."""
    sides = {"front": spec.front, "back": spec.back, "told": spec.told}
    return {f"{side}/{key}": value for side, values in sides.items() for key, value in values.items()}


async def _write_directory(tx: Transaction, path: str, perms: list[Perm], values: Mapping[str, str]) -> None:
    await tx.mkdir(path)
    try:
        await tx.set_perms(path, perms)  # before the children: a new node keeps its parent's entries
    except NoEntry:  # the store knows nobody of that number: the domain is dead, and not yet buried
        raise UsageError(f"no domain {perms[0].domid} (any more)") from None
    for key, value in values.items():
        await tx.write(f"{path}/{key}", value)


async def list_devices(store: Client, domid: int) -> list[DeviceSpec]:
    """The devices of a domain by the toolstack's record: what to remake, close or show."""
    root = f"{libxl_path(domid)}/device"
    found = []
    for kind in await _directory(store, root):
        for devid in await _directory(store, f"{root}/{kind}"):
            try:
                found.append(await _read_record(store, f"{root}/{kind}/{devid}", kind))
            except (NoEntry, ValueError):
                continue  # removed while we looked, or nothing that has two halves
    return found


async def _read_record(store: Client, record: str, kind: str) -> DeviceSpec:
    paths = DevicePaths.of_back(kind, await store.read_str(f"{record}/backend"))
    front, back, told = [
        {
            key: await store.read_str(f"{record}/{side}/{key}")
            for key in await _directory(store, f"{record}/{side}")
        }
        for side in ("front", "back", "told")
    ]
    return DeviceSpec(paths, front, back, told)


async def _directory(store: Client, path: str) -> list[str]:
    try:
        return await store.directory(path)
    except (NoEntry, Denied):  # no record is a guest's to read
        return []


async def read_state(store: Client, node: str) -> XenbusState | None:
    """A device directory's state; None if the node is gone, UNKNOWN for what is no state."""
    try:
        return parse_state(await store.read(f"{node}/state"))
    except NoEntry:
        return None
    except PeerError:
        return XenbusState.UNKNOWN


async def _error(store: Client, paths: DevicePaths) -> str:
    """A driver's own words from its error node, without the errno before them (xenbus_dev_error)."""
    for side, path in (("back", paths.back_error), ("front", paths.front_error)):
        number, _, words = (await _text(store, path)).partition(" ")
        if number:
            return (
                f"the {side} end says: {words}"
                if number.isdigit()
                else f"the {side} end says: {number} {words}"
            )
    return ""


async def _text(store: Client, path: str) -> str:
    try:
        return await store.read_str(path)
    except NoEntry:
        return ""


async def wait_connected(store: Client, paths: DevicePaths, timeout: float = ATTACH_DEADLINE) -> None:
    """Until both ends are Connected. DeviceFailed with the driver's words, DeadlineError naming who owed."""
    async with _Watched(store, (paths.back, paths.front, paths.back_error, paths.front_error)) as changed:
        end = time.monotonic() + timeout
        while True:
            back, front = await read_state(store, paths.back), await read_state(store, paths.front)
            if back is front is XenbusState.CONNECTED:
                return
            error = await _error(store, paths)
            if error or any(state is None or state in _CLOSING for state in (back, front)):
                raise DeviceFailed(
                    error or f"{paths.front}: closed (back {_name(back)}, front {_name(front)})"
                )
            if not await changed(end - time.monotonic()):
                raise DeadlineError(
                    f"{paths.kind} {paths.devid} to connect (back {_name(back)}, front {_name(front)})",
                    _owes(paths, back, front),
                    timeout,
                )


def _name(state: XenbusState | None) -> str:
    return "gone" if state is None else state.name


def _owes(paths: DevicePaths, back: XenbusState | None, front: XenbusState | None) -> str:
    """Whose turn it is in the handshake of blkif.h and netif.h: back 2, front 3 (or 4), back 4, front 4."""
    if back in (None, XenbusState.UNKNOWN, XenbusState.INITIALISING):
        return f"the back end in domain {paths.back_domid} ({paths.back})"
    if front not in (XenbusState.INITIALISED, XenbusState.CONNECTED) or back is XenbusState.CONNECTED:
        return f"the front end in domain {paths.front_domid} ({paths.front})"
    return f"the back end in domain {paths.back_domid} ({paths.back})"


async def detach_device(
    store: Client, paths: DevicePaths, *, timeout: float = DETACH_DEADLINE, force: bool = False
) -> bool:
    """Ask the back end to close, wait until it has, remove all nodes. True if it was orderly.

    When the deadline passes: DeadlineError with nothing removed, or with `force` the nodes go anyway, which
    both buses take as the device's removal.
    """
    if not await store.exists(paths.record) and not await store.exists(paths.front):
        raise NotFound(f"domain {paths.front_domid} has no {paths.kind} {paths.devid}")

    await atomically(store, lambda tx: ask_to_close(tx, paths))
    orderly = await wait_closed(store, paths, timeout)
    if not orderly and not force:
        back, front = await read_state(store, paths.back), await read_state(store, paths.front)
        raise DeadlineError(
            f"{paths.kind} {paths.devid} to close (back {_name(back)}, front {_name(front)})",
            f"the front end in domain {paths.front_domid}"
            if front not in (None, XenbusState.CLOSED)
            else f"the back end in domain {paths.back_domid}",
            timeout,
        )
    await remove_device(store, paths)
    return orderly


async def ask_to_close(tx: Transaction, paths: DevicePaths, *, dead: bool = False) -> None:
    """The back end hears it from its own nodes, as libxl says it: whatever became of the front end.

    One that no driver has touched is Closed at once: nobody would answer. So is one whose front end is `dead`
    before they were connected: there is no ring to let go of, and the removal of the node does the rest.
    """
    if not await tx.exists(f"{paths.back}/state"):
        return
    await tx.write(f"{paths.back}/online", "0")
    try:
        state = parse_state(await tx.read(f"{paths.back}/state"))
    except PeerError:  # what is no state is overwritten: the device has to be got rid of
        state = XenbusState.UNKNOWN
    if state not in _CLOSING:
        at_once = state is XenbusState.INITIALISING or (dead and state is not XenbusState.CONNECTED)
        wanted = XenbusState.CLOSED if at_once else XenbusState.CLOSING
        await tx.write(f"{paths.back}/state", str(int(wanted)))


async def wait_closed(store: Client, paths: DevicePaths, timeout: float) -> bool:
    """Whether the back end reached Closed, or is gone, in time."""
    async with _Watched(store, (paths.back,)) as changed:
        end = time.monotonic() + timeout
        while await read_state(store, paths.back) not in (None, XenbusState.CLOSED):
            if not await changed(end - time.monotonic()):
                return False
        return True


async def remove_device(store: Client, paths: DevicePaths) -> None:
    """Every node of the device: both halves, their error nodes, the record, and parents left empty."""
    front, back = domain_path(paths.front_domid), domain_path(paths.back_domid)
    # With the directories that the domain builder makes, which stay when they are empty.
    nodes = (
        (paths.back, f"{back}/backend"),
        (paths.front, f"{front}/device"),
        (paths.back_error.removesuffix("/error"), f"{back}/error"),
        (paths.front_error.removesuffix("/error"), f"{front}/error"),
        (paths.record, libxl_path(paths.front_domid)),
    )

    async def remove(tx: Transaction) -> None:
        for path, kept in nodes:
            await _remove_upwards(tx, path, kept)

    await atomically(store, remove)


async def _remove_upwards(tx: Transaction, path: str, kept: str) -> None:
    if not await tx.exists(path):
        return
    await tx.rm(path)
    while (path := path.rpartition("/")[0]) != kept and not await tx.directory(path):
        await tx.rm(path)


class _Watched:
    """`async with _Watched(store, paths) as changed`: `await changed(seconds)` is False when time is up."""

    def __init__(self, store: Client, paths: tuple[str, ...]) -> None:
        self._store = store
        self._paths = paths
        self._event = asyncio.Event()
        self._watches: list[Watch] = []

    async def __aenter__(self) -> _Changed:
        try:
            for path in self._paths:
                self._watches.append(await self._store.watch(path, lambda _path: self._event.set()))
        except BaseException:
            await self.__aexit__()
            raise
        return self._wait

    async def _wait(self, seconds: float) -> bool:
        if seconds <= 0:
            return False
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True

    async def __aexit__(self, *_: object) -> None:
        for watch in self._watches:
            await watch.close()
