"""The device tree: devices, device classes with their unit numbers, and who changes them: one `Newbus`.

Pure and synchronous: every change is done when the call returns. Knows no Xen, no loop, no clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from enum import IntEnum

from xenbus.errors import UsageError
from xenbus.newbus.boot import BootHold
from xenbus.newbus.driver import BusMethods
from xenbus.newbus.sysctl import Sysctl


class DeviceState(IntEnum):
    """FreeBSD sys/sys/bus.h, device_state_t; DETACHING is ours, because a detach here takes time (B8)."""

    NOTPRESENT = 10
    ALIVE = 20
    ATTACHING = 25
    ATTACHED = 30
    DETACHING = 35


class DeviceClass:
    """All devices of one driver's name, by unit number."""

    __slots__ = ("_free", "_next", "name", "units")

    def __init__(self, name: str) -> None:
        self.name = name
        self.units: dict[int, Device] = {}
        # Every free number below _next is in the heap, so the lowest free one costs O(log n). A number that
        # was asked for may be in use above _next, or still be in the heap: checked when it comes up.
        self._free: list[int] = []
        self._next = 0

    def take(self, device: Device, wanted: int | None = None) -> int:
        """The unit it got: `wanted` if that is free, otherwise the lowest free one."""
        if wanted is not None and wanted < 0:
            raise UsageError(f"{self.name}: unit numbers are not negative: {wanted}")
        unit = wanted if wanted is not None and wanted not in self.units else self._lowest()
        self.units[unit] = device
        return unit

    def _lowest(self) -> int:
        while self._free:
            unit = heapq.heappop(self._free)
            if unit not in self.units:
                return unit
        while self._next in self.units:
            self._next += 1
        self._next += 1
        return self._next - 1

    def give_back(self, unit: int) -> None:
        del self.units[unit]
        if unit < self._next:
            heapq.heappush(self._free, unit)


class Device:
    """A node of the tree. Made and changed by a `Newbus` alone, but for `desc`, `ivars` and `softc`.

    ivars: what its bus knows of it; softc: its driver's instance, once attached
    """

    __slots__ = ("_children", "desc", "devclass", "ivars", "parent", "softc", "state", "unit")

    def __init__(self, parent: Device | None, ivars: object = None) -> None:
        self.parent = parent
        self.devclass: DeviceClass | None = None
        self.unit = -1
        self.state = DeviceState.NOTPRESENT
        self.desc = ""
        self.ivars = ivars
        self.softc: object = None
        self._children: dict[Device, None] | None = None

    @property
    def name(self) -> str:
        return "" if self.devclass is None else self.devclass.name

    @property
    def nameunit(self) -> str:
        """`xbd0`; empty before a driver bid for it."""
        return "" if self.devclass is None else f"{self.devclass.name}{self.unit}"

    @property
    def path(self) -> str:
        """`xenstore0/xenbusb_front0/xbd0`: without the root."""
        names: list[str] = []
        device = self
        while device.parent is not None:
            names.append(device.nameunit or "?")
            device = device.parent
        return "/".join(reversed(names))

    @property
    def tree(self) -> Newbus:
        """The tree that it is in (or was: a deleted device still knows its parent)."""
        device = self
        while device.parent is not None:
            device = device.parent
        assert isinstance(device.ivars, Newbus)
        return device.ivars

    @property
    def children(self) -> Collection[Device]:
        """In order of arrival."""
        return () if self._children is None else self._children.keys()

    @property
    def attached(self) -> bool:
        return self.state is DeviceState.ATTACHED

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Device]]:
        """(depth, device) of itself and all below, parents first."""
        yield depth, self
        for child in list(self.children):
            yield from child.walk(depth + 1)

    @property
    def bus(self) -> BusMethods | None:
        """What the parent says of its children, if it says anything."""
        softc = None if self.parent is None else self.parent.softc
        return softc if isinstance(softc, BusMethods) else None

    def __str__(self) -> str:
        """As FreeBSD's bus_print_child: `xbd0: <description> at device/vbd/51712 on xenbusb_front0`."""
        bus = self.bus
        where = bus.child_location(self) if bus is not None else ""
        text = self.nameunit or "(no driver)"
        if self.desc:
            text += f": <{self.desc}>"
        if where:
            text += f" at {where}"
        if self.parent is not None and self.parent.nameunit:
            text += f" on {self.parent.nameunit}"
        return text

    def __repr__(self) -> str:
        return f"<Device {self.path or '/'} {self.state.name}>"


class Newbus:
    """One tree with its classes, its sysctl tree and its hold on boot. `root` has no name and no driver."""

    __slots__ = ("boot", "classes", "root", "sysctl")

    def __init__(self) -> None:
        self.root = Device(None, ivars=self)
        self.classes: dict[str, DeviceClass] = {}
        self.boot = BootHold()
        self.sysctl = Sysctl(self.classes)

    def add_child(
        self, parent: Device, ivars: object = None, *, name: str = "", unit: int | None = None, desc: str = ""
    ) -> Device:
        """A child in state NOTPRESENT, without a class; with `name`, one that needs no driver: ATTACHED."""
        child = Device(parent, ivars)
        if name:
            self.name(child, name, unit, desc)
            child.state = DeviceState.ATTACHED
        if parent._children is None:
            parent._children = {}
        parent._children[child] = None
        return child

    def name(self, device: Device, name: str, unit: int | None = None, desc: str = "") -> None:
        """Gives it a class and a unit; ALIVE. A class or unit that it had is given up."""
        self.unname(device)
        devclass = self.classes.get(name)
        if devclass is None:
            devclass = self.classes[name] = DeviceClass(name)
        device.unit = devclass.take(device, unit)
        device.devclass = devclass
        device.desc = desc
        device.state = DeviceState.ALIVE

    def unname(self, device: Device) -> None:
        """Takes away driver, class and unit: NOTPRESENT, as it was added."""
        if device.devclass is not None:
            device.devclass.give_back(device.unit)
            device.devclass = None
            device.unit = -1
            device.desc = ""
        device.state = DeviceState.NOTPRESENT
        device.softc = None

    def delete(self, device: Device) -> None:
        """Takes it and all below it out of the tree; units are free again. Idempotent. Detaches nothing."""
        for child in list(device.children):
            self.delete(child)
        if device.parent is not None and device.parent._children is not None:
            device.parent._children.pop(device, None)
        self.unname(device)

    def find(self, nameunit: str) -> Device | None:
        """By `xbd0`."""
        name = nameunit.rstrip("0123456789")
        number = nameunit[len(name) :]
        devclass = self.classes.get(name)
        return devclass.units.get(int(number)) if devclass is not None and number else None
