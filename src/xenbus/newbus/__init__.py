"""The device tree: devices, drivers, units, probe and attach, sysctl, the hold on boot. Usable without Xen.

A bus is a device whose softc tells about its children (`BusMethods`). It makes children, lets drivers bid for
them, and leads their lives. A toy one, in whole (a test runs this text):

    import asyncio
    from xenbus.newbus import Driver, Newbus, NoMatch, detach, probe_and_attach

    class ToyBus:                       # the softc of the bus: what it says of its children
        def child_location(self, child):
            return f"slot {child.ivars['slot']}"
        def child_pnpinfo(self, child):
            return f"kind={child.ivars['kind']}"
        def child_sysctl(self, child):
            return {"slot": lambda: child.ivars["slot"]}

    class Lamp(Driver):
        name, description = "lamp", "A lamp"
        @classmethod
        def probe(cls, dev):
            if dev.ivars["kind"] != "light":
                raise NoMatch("no light")
            return 0
        async def attach(self):
            self.on = True
        async def detach(self):
            self.on = False
        def sysctl(self):
            return {"on": lambda: self.on}

    async def main():
        tree = Newbus()
        bus = tree.add_child(tree.root, name="toybus", desc="Toy bus")
        bus.softc = ToyBus()
        lamp = tree.add_child(bus, ivars={"slot": 3, "kind": "light"})
        await probe_and_attach(lamp, [Lamp])
        print(lamp)                                      # lamp0: <A lamp> at slot 3 on toybus0
        print(*tree.sysctl.show("dev.lamp.0.on"))        # dev.lamp.0.on: True
        await detach(lamp)
        tree.delete(lamp)

    asyncio.run(main())

The same calls in a bus of many devices belong into the bus's own task, and a device's callbacks into its
mailbox: `runtime.py` has what that takes, and the XenBus of `xenbus.bus` is built so.
"""

from xenbus.newbus.attach import detach, probe_and_attach, resume, suspend
from xenbus.newbus.boot import BootHold, Token
from xenbus.newbus.device import Device, DeviceClass, DeviceState, Newbus
from xenbus.newbus.driver import (
    BUS_PROBE_DEFAULT,
    BUS_PROBE_GENERIC,
    BUS_PROBE_LOW_PRIORITY,
    BUS_PROBE_SPECIFIC,
    BUS_PROBE_VENDOR,
    BusMethods,
    Driver,
    Leaf,
    NoMatch,
    ProbeFailed,
    choose,
)
from xenbus.newbus.sysctl import NoSuchName, Sysctl, leaves

__all__ = [
    "BUS_PROBE_DEFAULT",
    "BUS_PROBE_GENERIC",
    "BUS_PROBE_LOW_PRIORITY",
    "BUS_PROBE_SPECIFIC",
    "BUS_PROBE_VENDOR",
    "BootHold",
    "BusMethods",
    "Device",
    "DeviceClass",
    "DeviceState",
    "Driver",
    "Leaf",
    "Newbus",
    "NoMatch",
    "NoSuchName",
    "ProbeFailed",
    "Sysctl",
    "Token",
    "choose",
    "detach",
    "leaves",
    "probe_and_attach",
    "resume",
    "suspend",
]
