"""What a driver of a split device is, and how one is found: a class, and one decorator that registers it.

Knows a device only by the type `XenbusDevice`; knows nothing of how a bus finds devices.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from xenbus.bus.state import Side, XenbusState
from xenbus.errors import UsageError

if TYPE_CHECKING:
    from xenbus.bus.device import XenbusDevice

log = logging.getLogger("xenbus.bus")

ENTRY_POINTS = "xenbus.drivers"


class XenbusDriver:
    """One instance an attached device (newbus's softc). Override what the device needs.

    Every async callback runs in the device's own mailbox, one at a time and in order, with a deadline; an
    exception out of `attach` closes and forgets the device, out of any other one it is `dev.fatal()`.
    Only `otherend_changed` and `localend_changed` also run while `detach` does, so that `detach` may wait
    for its peer (`dev.wait_otherend`).
    """

    name = ""  # the device class: units are `name` + number
    description = ""
    deadline: float | None = None  # seconds a callback may take; None: the bus's own

    @classmethod
    def probe(cls, dev: XenbusDevice) -> int:
        """0: mine for sure. Below 0: mine, unless somebody has a higher number. NoMatch: not mine.

        Synchronous and pure: it may look at `dev.type`, `dev.id`, `dev.node`, and do nothing.
        """
        return 0

    @classmethod
    def unit(cls, dev: XenbusDevice) -> int | None:
        """The unit number it would like; None: the lowest free one."""
        return None

    def __init__(self, dev: XenbusDevice) -> None:
        self.dev = dev

    async def attach(self) -> None:
        """The first thing called. The peer is not watched yet: `otherend_changed` follows.

        If it raises, or is cancelled because the node went, `detach` is not called: what it took other than
        through `dev` it must have let go by then.
        """

    async def detach(self) -> None:
        """The last thing called. What the device holds (grants, channels, tasks...) is given back after it.

        `dev.gone` tells that the node vanished: there is nobody left to wait for.
        """

    async def recover(self) -> None:
        """In place of `attach`, for a device that a former process left (see XenBus, `inherits`): `dev.state`
        is CONNECTED, CLOSING or CLOSED, `dev.otherend_state` the peer's. Go on from there and write no state,
        so that the peer sees nothing.

        If it raises, the device gets an error node and goes to CLOSING, and this driver hears the peer close
        as if it had been attached. This one can go on with no connection, but close what was left.
        """
        if self.dev.state is XenbusState.CONNECTED:
            raise UsageError(f"{self.name} does not go on with what a former process began")

    async def release(self) -> None:
        """In place of `detach`, when another process is to go on: let what runs end, leave the states alone.

        What the device holds is given back after it. Raise if something could not end.
        """

    async def otherend_changed(self, state: XenbusState) -> None:
        """The peer's state as it stands now; may repeat itself, may have skipped states."""

    async def localend_changed(self, path: str) -> None:
        """Something below our own node changed: "/state", "/online", ...; "" is the node itself."""

    async def suspend(self) -> None:
        """Stop touching the rings; what is in flight stays remembered until `resume`."""

    async def resume(self, cancelled: bool) -> None:
        """cancelled: nothing changed. Otherwise grants, mappings, channels, tasks and watches are gone, our
        state is INITIALISING, and the peer (which may be another one) is about to be watched anew."""

    def sysctl(self) -> Mapping[str, Callable[[], object]]:
        """Read-only leaves of one's own below `dev.<name>.<unit>`."""
        return {}


D = TypeVar("D", bound=type[XenbusDriver])
ANY_TYPE = "*"


class DriverRegistry:
    """Drivers by side and device type. A bus is handed one; the decorators below fill the common one."""

    __slots__ = ("_drivers", "_loaded")

    def __init__(self) -> None:
        self._drivers: dict[tuple[Side, str], list[type[XenbusDriver]]] = {}
        self._loaded = False

    def add(self, side: Side, device_type: str, driver: type[XenbusDriver]) -> None:
        """UsageError for a driver without a name. Adding the same one twice does nothing."""
        if not driver.name.isidentifier() or driver.name[-1].isdigit():
            raise UsageError(f"{driver.__qualname__}: {driver.name!r} is no name for units")
        known = self._drivers.setdefault((side, device_type), [])
        if driver not in known:
            known.append(driver)

    def remove(self, driver: type[XenbusDriver]) -> None:
        for known in self._drivers.values():
            if driver in known:
                known.remove(driver)

    def candidates(self, side: Side, device_type: str) -> Iterator[type[XenbusDriver]]:
        """Those for this type, then those for any type."""
        yield from self._drivers.get((side, device_type), ())
        yield from self._drivers.get((side, ANY_TYPE), ())

    def types(self, side: Side) -> list[str]:
        """The device types that some driver is for."""
        return sorted(name for known, name in self._drivers if known is side)

    def only(self, accepts: Callable[[Side, str], bool]) -> DriverRegistry:
        """The same drivers, also those that come later, for the device types that `accepts` says yes to."""
        return _Part(self, accepts)

    def load_entry_points(self) -> None:
        """Imports every installed package that names itself under `xenbus.drivers`, and ours: importing
        registers.

        A package that cannot be imported is logged; it must not take the others' devices down. Once.
        """
        if self._loaded:
            return
        self._loaded = True
        for entry in dict.fromkeys((*metadata.entry_points(group=ENTRY_POINTS), *_own())):
            try:
                entry.load()
            except Exception:
                log.exception("driver package %s (%s) cannot be loaded", entry.name, entry.value)


def _own() -> Iterator[metadata.EntryPoint]:
    """Those that come along: a source tree that is only on the path (PYTHONPATH) has no metadata."""
    package = importlib.import_module(ENTRY_POINTS)  # of the same name as the group
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:  # one folder an interface; a module is what they share
            yield metadata.EntryPoint(module.name, f"{ENTRY_POINTS}.{module.name}", ENTRY_POINTS)


class _Part(DriverRegistry):
    """A registry of which some types are another's: Linux has drivers of its own for them."""

    __slots__ = ("_accepts", "_whole")

    def __init__(self, whole: DriverRegistry, accepts: Callable[[Side, str], bool]) -> None:
        super().__init__()
        self._whole = whole
        self._accepts = accepts

    def add(self, side: Side, device_type: str, driver: type[XenbusDriver]) -> None:
        self._whole.add(side, device_type, driver)

    def remove(self, driver: type[XenbusDriver]) -> None:
        self._whole.remove(driver)

    def candidates(self, side: Side, device_type: str) -> Iterator[type[XenbusDriver]]:
        if self._accepts(side, device_type):
            yield from self._whole.candidates(side, device_type)

    def types(self, side: Side) -> list[str]:
        return [name for name in self._whole.types(side) if self._accepts(side, name)]

    def load_entry_points(self) -> None:
        self._whole.load_entry_points()


drivers = DriverRegistry()


def front_driver(*types: str) -> Callable[[D], D]:
    """`@front_driver("vbd")`: this class drives front ends of that type (`*`: of any)."""
    return _registering(Side.FRONT, types)


def back_driver(*types: str) -> Callable[[D], D]:
    """`@back_driver("vbd")`: this class drives back ends of that type."""
    return _registering(Side.BACK, types)


def _registering(side: Side, types: tuple[str, ...]) -> Callable[[D], D]:
    def register(cls: D) -> D:
        for device_type in types:
            drivers.add(side, device_type, cls)
        return cls

    return register
