"""The sysctl tree: read-only names to values, in FreeBSD's form (`dev.xbd.0.%desc`).

Pure. Nothing is stored per device: a name is resolved when asked for, so a tree nobody reads costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from xenbus.errors import UsageError
from xenbus.newbus.driver import HasSysctl, Leaf

if TYPE_CHECKING:
    from xenbus.newbus.device import Device, DeviceClass


class NoSuchName(UsageError):
    """There is no such sysctl."""


class Sysctl:
    """`dev.<driver>.<unit>.<leaf>` for every device that has a unit, and what was added by hand."""

    __slots__ = ("_classes", "_extra")

    def __init__(self, classes: Mapping[str, DeviceClass]) -> None:
        self._classes = classes
        self._extra: dict[str, Leaf] = {}

    def add(self, name: str, leaf: Leaf) -> None:
        """A name outside `dev.`. UsageError if it is taken."""
        if name in self._extra or name.startswith("dev."):
            raise UsageError(f"sysctl {name} is taken")
        self._extra[name] = leaf

    def remove(self, name: str) -> None:
        self._extra.pop(name, None)

    def read(self, name: str) -> object:
        """NoSuchName if nothing is called that."""
        leaf = self._extra.get(name) or self._device_leaf(name)
        if leaf is None:
            raise NoSuchName(f"sysctl: unknown oid '{name}'")
        return leaf()

    def _device_leaf(self, name: str) -> Leaf | None:
        match name.split(".", 3):
            case ["dev", driver, unit, leaf] if unit.isdecimal() and driver in self._classes:
                device = self._classes[driver].units.get(int(unit))
                return None if device is None else leaves(device).get(leaf)
        return None

    def names(self, prefix: str = "") -> Iterator[str]:
        """All names at or below `prefix` (whole components), sorted by class, unit, leaf."""
        for name in sorted(self._extra):
            if at_or_below(name, prefix):
                yield name
        for driver in sorted(self._classes):
            for unit, device in sorted(self._classes[driver].units.items()):
                base = f"dev.{driver}.{unit}"
                if not (at_or_below(base, prefix) or at_or_below(prefix, base)):
                    continue
                yield from (name for leaf in leaves(device) if at_or_below(name := f"{base}.{leaf}", prefix))

    def show(self, prefix: str = "") -> Iterator[str]:
        """Lines as sysctl(8) prints them: `dev.xbd.0.%driver: xbd`."""
        for name in self.names(prefix):
            yield f"{name}: {self.read(name)}"


def at_or_below(name: str, prefix: str) -> bool:
    """In whole components: `dev.xbd.1` is not above `dev.xbd.10`."""
    return not prefix or name == prefix or name.startswith(prefix + ".")


def leaves(device: Device) -> dict[str, Leaf]:
    """A device's leaves: newbus's five, then (once attached) its bus's, then its driver's."""
    bus = device.bus
    found: dict[str, Leaf] = {
        "%desc": lambda: device.desc,
        "%driver": lambda: device.name,
        "%location": lambda: bus.child_location(device) if bus is not None else "",
        "%pnpinfo": lambda: bus.child_pnpinfo(device) if bus is not None else "",
        "%parent": lambda: device.parent.nameunit if device.parent is not None else "",
    }
    if device.attached or device.softc is not None:
        if bus is not None:
            found.update(bus.child_sysctl(device))
        if isinstance(device.softc, HasSysctl):
            found.update(device.softc.sysctl())
    return found
