"""The bus of split devices: states, drivers, and the two buses that find devices and walk their handshake."""

from xenbus.bus.back import BackBus
from xenbus.bus.device import DeviceGone, XenbusDevice
from xenbus.bus.driver import ANY_TYPE, DriverRegistry, XenbusDriver, back_driver, drivers, front_driver
from xenbus.bus.features import Feature, Merge, Negotiated, Outcome, negotiate
from xenbus.bus.front import FrontBus
from xenbus.bus.ivars import Ivar, read_ivar, write_ivar
from xenbus.bus.peer import read_driver_state
from xenbus.bus.state import Side, XenbusState, parse_state, strstate, usual_move
from xenbus.bus.tree import describe, lines
from xenbus.bus.xenbusb import Settings, XenBus

__all__ = [
    "ANY_TYPE",
    "BackBus",
    "DeviceGone",
    "DriverRegistry",
    "Feature",
    "FrontBus",
    "Ivar",
    "Merge",
    "Negotiated",
    "Outcome",
    "Settings",
    "Side",
    "XenBus",
    "XenbusDevice",
    "XenbusDriver",
    "XenbusState",
    "back_driver",
    "describe",
    "drivers",
    "front_driver",
    "lines",
    "negotiate",
    "parse_state",
    "read_driver_state",
    "read_ivar",
    "strstate",
    "usual_move",
    "write_ivar",
]
