"""Drivers as the device tree sees them: what probing asks, what a bus tells of its children, who is chosen.

Pure. May import nothing but errors; knows no Xen, no loop, no clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from xenbus.errors import XenbusError

if TYPE_CHECKING:
    from xenbus.newbus.device import Device

log = logging.getLogger("xenbus.newbus")

# FreeBSD sys/sys/bus.h: what probe returns. Only 0 and below are matches.
BUS_PROBE_SPECIFIC = 0
BUS_PROBE_VENDOR = -10
BUS_PROBE_DEFAULT = -20
BUS_PROBE_LOW_PRIORITY = -40
BUS_PROBE_GENERIC = -100
BUS_PROBE_HOOVER = -1000000

Leaf = Callable[[], object]


class NoMatch(XenbusError):
    """ENXIO of a probe: this driver (or, from `choose`, no driver at all) is for this device."""


class ProbeFailed(XenbusError):
    """A probe raised something besides NoMatch (its cause), or answered what is no priority."""


class Probed(Protocol):
    """What `choose` needs of a driver class. `subject` is what its bus hands to drivers."""

    name: str
    description: str

    def probe(self, subject: Any) -> int: ...
    def unit(self, subject: Any) -> int | None: ...


class Driver:
    """A driver on a plain bus (see the package's own page): one instance an attached device, its softc."""

    name = ""
    description = ""

    @classmethod
    def probe(cls, dev: Device) -> int:
        """0 wins at once, below 0 is a bid (highest wins), NoMatch is no. Synchronous, touches nothing."""
        return BUS_PROBE_SPECIFIC

    @classmethod
    def unit(cls, dev: Device) -> int | None:
        return None

    def __init__(self, dev: Device) -> None:
        self.dev = dev

    async def attach(self) -> None: ...
    async def detach(self) -> None: ...
    async def suspend(self) -> None: ...
    async def resume(self, cancelled: bool) -> None: ...

    def sysctl(self) -> Mapping[str, Leaf]:
        """Extra read-only leaves of this device."""
        return {}


@runtime_checkable
class HasSysctl(Protocol):
    def sysctl(self) -> Mapping[str, Leaf]: ...


@runtime_checkable
class BusMethods(Protocol):
    """What the softc of a bus says of the bus's children (FreeBSD's bus_if.m)."""

    def child_location(self, child: Device) -> str:
        """Where on the bus: the text after "at" when the child is printed. May be empty."""
        ...

    def child_pnpinfo(self, child: Device) -> str:
        """What it is, by itself, as `key=value ...`."""
        ...

    def child_sysctl(self, child: Device) -> Mapping[str, Leaf]:
        """Leaves that every attached child of this bus has."""
        ...


P = TypeVar("P", bound=Probed)


def choose(candidates: Iterable[P], subject: object) -> P:
    """The best driver for a device: 0 at once, otherwise the highest bid; the earlier one of equals.

    NoMatch if nobody bids. A probe that raises anything else is logged and its driver passed over;
    ProbeFailed if no other driver bids, so that a broken driver is not taken for a missing one.
    """
    best: P | None = None
    highest = 0
    failure: ProbeFailed | None = None
    for driver in candidates:
        try:
            bid = driver.probe(subject)
        except NoMatch:
            continue
        except Exception as exc:
            log.exception("probe of %s failed", driver.name)
            if failure is None:
                failure = ProbeFailed(f"probe of {driver.name}: {exc!r}")
                failure.__cause__ = exc
            continue
        if not isinstance(bid, int) or bid > 0:
            failure = failure or ProbeFailed(f"probe of {driver.name} returned {bid!r}, not 0 or below")
        elif bid == 0:
            return driver
        elif best is None or bid > highest:
            best, highest = driver, bid
    if best is not None:
        return best
    raise failure or NoMatch("no driver")
