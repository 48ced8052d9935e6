"""The device tree, usable without Xen."""

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
    "Sysctl",
    "Token",
    "choose",
    "leaves",
]
