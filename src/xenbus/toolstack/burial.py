"""On a real Xen: what is left in the store of a dead guest's devices goes, where libxl does not know of it.

libxl removes the nodes of the back ends whose type it knows, when it destroys the guest; of others nobody
does. Knows the store alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from xenbus.errors import NoEntry, StoreError, XenbusError
from xenbus.toolstack.devices import remove_device, wait_closed
from xenbus.toolstack.paths import DevicePaths
from xenbus.xenstore.client import Client

log = logging.getLogger(__name__)

CLOSE_DEADLINE = 10.0  # seconds for our back end to let go of a dead guest's device
AGAIN = 5.0  # seconds until a burial that failed is tried again


async def dead_devices(store: Client, kinds: Collection[str]) -> list[DevicePaths]:
    """The back ends of these types, in this domain, whose guest is gone."""
    domid = int(await store.read_str("domid"))
    found = []
    for kind in kinds:
        for front in await _directory(store, f"backend/{kind}"):
            if not front.isdigit() or await store.is_introduced(int(front)):
                continue
            devids = filter(str.isdigit, await _directory(store, f"backend/{kind}/{front}"))
            found += [await _paths(store, kind, front, devid, domid) for devid in devids]
    return found


async def _paths(store: Client, kind: str, front: str, devid: str, domid: int) -> DevicePaths:
    """The device's type on the other side is told by the path of its front half."""
    front_kind = kind
    try:
        parts = (await store.read_str(f"backend/{kind}/{front}/{devid}/frontend")).split("/")
        front_kind = parts[-2] if len(parts) > 2 else kind
    except NoEntry:
        pass
    return DevicePaths(front_kind, int(devid), int(front), domid, kind)


async def _directory(store: Client, path: str) -> list[str]:
    try:
        return await store.directory(path)
    except NoEntry:
        return []


async def bury_devices(store: Client, kinds: Collection[str]) -> int:
    """How many were removed. One that does not close in time is removed all the same: its guest is dead."""
    dead = await dead_devices(store, kinds)
    closed = await asyncio.gather(*(wait_closed(store, paths, CLOSE_DEADLINE) for paths in dead))
    for paths, orderly in zip(dead, closed, strict=True):
        log.info(
            "%s: its guest is gone; removed%s", paths.back, "" if orderly else ", though it is not closed"
        )
        await remove_device(store, paths)
    return len(dead)


async def burying(store: Client, kinds: Collection[str]) -> None:
    """Until cancelled, or until the store is lost."""
    wake = asyncio.Event()
    loop = asyncio.get_running_loop()
    watch = await store.watch("@releaseDomain", lambda _path: wake.set())
    try:
        while True:
            await wake.wait()
            wake.clear()
            try:
                await bury_devices(store, kinds)
            except (XenbusError, OSError) as error:
                if store.closed:
                    return
                if not isinstance(error, StoreError):
                    log.warning("clearing up after dead guests: %s", error)
                loop.call_later(AGAIN, wake.set)
    finally:
        if not store.closed:
            await watch.close()
