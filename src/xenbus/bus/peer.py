"""Reading states, the other end's and our own: what counts as Closed, what as garbage, what is tried again.

Knows the store's client and the device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from xenbus.bus.device import XenbusDevice
from xenbus.bus.state import XenbusState, parse_state
from xenbus.errors import DeadlineError, Denied, NoEntry, PeerError, StoreError, XenbusError
from xenbus.xenstore.client import Client

T = TypeVar("T")
# Seconds between the attempts to read a state that cannot be read for a passing reason. An event is
# one chance to see the final state, so one error must not be the end of it.
PAUSES = (0.02, 0.2, 1.0)


async def read_driver_state(store: Client, path: str) -> XenbusState:
    """xenbus_read_driver_state, but: no node is CLOSED, nonsense is PeerError, any other error is raised."""
    try:
        return parse_state(await store.read(f"{path}/state"))
    except NoEntry:
        return XenbusState.CLOSED


async def read_peer(dev: XenbusDevice) -> XenbusState | None:
    """The peer's state; None if it cannot be known: then that was recorded, and the last state stays."""
    try:
        return await _persistently(dev, lambda: _state_or_gone(dev))
    except PeerError as exc:
        dev.peer_garbage(exc)
        return None


async def _state_or_gone(dev: XenbusDevice) -> XenbusState:
    """The store says EACCES, not ENOENT, of a missing node below one that we may not read (xenstored's
    errno_from_parents): to a guest whose back end's directory went, to a driver domain whose guest died. So
    what could be read before, and is denied each time now, is gone."""
    known = dev.otherend_state is not XenbusState.UNKNOWN
    for pause in PAUSES[:2] if known else ():
        try:
            return await read_driver_state(dev.store, dev.otherend_path)
        except Denied:
            await asyncio.sleep(pause)
    try:
        return await read_driver_state(dev.store, dev.otherend_path)
    except Denied:
        if known:
            return XenbusState.CLOSED
        raise


async def refresh_own(dev: XenbusDevice) -> None:
    """Our cached state from the store; if it cannot be read, that was recorded, and it stays."""
    await _persistently(dev, dev.refresh_state)


async def _persistently(dev: XenbusDevice, reading: Callable[[], Awaitable[T]]) -> T | None:
    """An error that passes means nothing (B9); one that stays is the device's error, and None."""
    failure: XenbusError | None = None
    for pause in (*PAUSES, None):
        try:
            return await reading()
        except (StoreError, DeadlineError) as exc:
            failure = exc
            dev.count("unreadable")
        if pause is not None:
            await asyncio.sleep(pause)
    assert failure is not None
    await dev.error(failure)
    return None
