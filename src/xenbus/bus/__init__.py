"""The bus of split devices: states, drivers, and the two buses that find devices and walk their handshake."""

from xenbus.bus.device import DeviceGone, XenbusDevice
from xenbus.bus.driver import ANY_TYPE, DriverRegistry, XenbusDriver, back_driver, drivers, front_driver
from xenbus.bus.features import Feature, Merge, Negotiated, Outcome, negotiate
from xenbus.bus.state import Side, XenbusState, parse_state, strstate, usual_move

__all__ = [
    "ANY_TYPE",
    "DeviceGone",
    "DriverRegistry",
    "Feature",
    "Merge",
    "Negotiated",
    "Outcome",
    "Side",
    "XenbusDevice",
    "XenbusDriver",
    "XenbusState",
    "back_driver",
    "drivers",
    "front_driver",
    "negotiate",
    "parse_state",
    "strstate",
    "usual_move",
]
