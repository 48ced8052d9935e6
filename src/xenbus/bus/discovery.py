"""What the bus finds when it looks at a node: a device that it has, a new one, or nothing that is one.

Knows the store and the bus's devices; changes no tree, that is the bus's own task's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xenbus.bus.incarnation import Verdict, look, read_links
from xenbus.bus.state import XenbusState, parse_state, strstate
from xenbus.errors import LinkDown, NoEntry, PeerError, XenbusError

if TYPE_CHECKING:
    from xenbus.bus.xenbusb import XenBus

log = logging.getLogger("xenbus.bus")


@dataclass(slots=True, frozen=True)
class Found:
    """What looking at a node gave, and the bus's event count from before."""

    node: str
    serial: int
    verdict: Verdict | None = None  # of a device that we have
    links: tuple[int, str] | None = None  # of a new one
    state: XenbusState = XenbusState.INITIALISING  # of a new one
    again: bool = False  # it could not be looked at
    missing: bool = False


async def look_at(bus: XenBus, node: str) -> Found:
    """Never raises: what cannot be looked at now is `again`."""
    dev = bus.devices.get(node)
    serial = bus.serial
    try:
        if dev is None:
            return await _look_at_new(bus, node, serial)
        if dev.gone:
            return Found(node, serial)
        async with dev.locked():
            return Found(node, serial, verdict=await look(dev, bus.store.read))
    except LinkDown as exc:
        log.warning("%s: %s: %s", bus.name, node, exc)
        return Found(node, serial)
    except XenbusError as exc:
        # B9: not a sign of anything. The device stays, and is looked at again.
        bus.counters["unreadable"] += 1
        log.warning("%s: %s: %s", bus.name, node, exc)
        return Found(node, serial, again=True)


async def _look_at_new(bus: XenBus, node: str, serial: int) -> Found:
    """seed: xenbusb_add_device up to the child's creation."""
    try:
        state = parse_state(await bus.store.read(f"{node}/state"))
    except NoEntry:
        return Found(node, serial, missing=not await bus.store.exists(node))
    except PeerError as exc:
        _ignored(bus, node, str(exc))
        return Found(node, serial)
    left = state is not XenbusState.INITIALISING
    if left and not (node in bus.left and await bus.inheritable(node, state)):
        _ignored(bus, node, f"state {strstate(state)}")
        return Found(node, serial)
    try:
        links = await read_links(node, bus.otherend_keys, bus.store.read)
        return Found(node, serial, links=links, state=state)
    except (NoEntry, PeerError) as exc:
        bus.counters["no_otherend"] += 1
        log.info("%s: %s: no otherend id (%s)", bus.name, node, exc)
        return Found(node, serial)


def _ignored(bus: XenBus, node: str, why: str) -> None:
    bus.counters["ignored"] += 1
    log.info("%s: device %s ignored: %s", bus.name, node, why)
