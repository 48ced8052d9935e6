"""A XenBus device's instance variables, and the sysctl leaves that show them (seed: xenbusb_read_ivar).

Knows the device alone.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial

from xenbus.bus.device import XenbusDevice
from xenbus.bus.state import XenbusState, strstate
from xenbus.errors import UsageError, store_error
from xenbus.newbus import Leaf


class Ivar(IntEnum):
    """FreeBSD sys/xen/xenbus/xenbusvar.h, enum of the instance variables."""

    NODE = 0
    TYPE = 1
    STATE = 2
    OTHEREND_ID = 3
    OTHEREND_PATH = 4


_READ: dict[Ivar, Callable[[XenbusDevice], object]] = {
    Ivar.NODE: lambda dev: dev.node,
    Ivar.TYPE: lambda dev: dev.type,
    Ivar.STATE: lambda dev: dev.state,
    Ivar.OTHEREND_ID: lambda dev: dev.otherend_id,
    Ivar.OTHEREND_PATH: lambda dev: dev.otherend_path,
}


def _known(dev: XenbusDevice, ivar: int) -> Ivar:
    try:
        return Ivar(ivar)
    except ValueError:
        raise store_error("ENOENT", f"instance variable {ivar}", dev.node) from None


def read_ivar(dev: XenbusDevice, ivar: int) -> object:
    """The cached value. NoEntry (ENOENT) for an unknown one."""
    return _READ[_known(dev, ivar)](dev)


async def write_ivar(dev: XenbusDevice, ivar: int, value: int) -> None:
    """The state, and nothing else: UsageError (EINVAL) for the others, NoEntry (ENOENT) for an unknown one.

    A node that is gone is no error here: see XenbusDevice.set_state, which this is.
    """
    known = _known(dev, ivar)
    if known is not Ivar.STATE:
        raise UsageError(f"{dev.node}: {known.name.lower()} is read-only")
    await dev.set_state(XenbusState(value))


def child_sysctl(dev: XenbusDevice) -> dict[str, Leaf]:
    """xenbusb_device_sysctl_init's five, then ours."""
    found: dict[str, Leaf] = {
        "xenstore_path": lambda: dev.node,
        "xenbus_dev_type": lambda: dev.type,
        "xenbus_connection_state": lambda: strstate(dev.state),
        "xenbus_peer_domid": lambda: dev.otherend_id,
        "xenstore_peer_path": lambda: dev.otherend_path,
        "xenbus_peer_state": lambda: strstate(dev.otherend_state),
        "held": lambda: _held(dev),
    }
    if dev.features is not None:
        found["features"] = lambda: str(dev.features)
    for name in dev.counters:
        found[f"count.{name}"] = partial(_counter, dev, name)
    return found


def _held(dev: XenbusDevice) -> str:
    """What it has taken and not given back: "4 tasks, 1 channels, 33 mapped_pages"; "" for nothing."""
    return ", ".join(f"{count} {what}" for what, count in dev.counts().items() if count)


def _counter(dev: XenbusDevice, name: str) -> int:
    return dev.counters.get(name, 0)
