"""What one device took of the hypervisor, the store and the loop, and how all of it is given back.

Knows the interfaces of those three; knows nothing of states, drivers or the bus.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from xenbus.errors import XenbusError
from xenbus.hypervisor.interface import Channel, GrantedPages, Hypervisor, Mapping
from xenbus.newbus.runtime import end_task
from xenbus.xenstore.client import Watch

log = logging.getLogger("xenbus.bus")
T = TypeVar("T")


class Owned:
    """Held things by kind, given back in this order: tasks (which use rings), watches, channels (whose
    handlers use mappings), mappings, grants."""

    __slots__ = ("channels", "closed", "grants", "hv", "mappings", "tasks", "watches")

    def __init__(self, hv: Hypervisor) -> None:
        self.hv = hv
        self.closed = False
        self.tasks: set[asyncio.Task[Any]] = set()
        self.watches: dict[int, Watch] = {}
        self.channels: dict[int, Channel] = {}
        self.mappings: dict[int, Mapping] = {}
        self.grants: dict[int, GrantedPages] = {}

    def counts(self) -> dict[str, int]:
        return {
            "tasks": len(self.tasks),
            "watches": len(self.watches),
            "channels": len(self.channels),
            "mapped_pages": sum(len(m.refs) for m in self.mappings.values()),
            "granted_pages": sum(len(g.refs) for g in self.grants.values()),
        }

    async def acquire(
        self, taking: Coroutine[Any, Any, T], held: dict[int, T], give: Callable[[T], Awaitable[None]]
    ) -> T:
        """Takes one thing and writes it down, even if the taker is cancelled or the device goes meanwhile."""
        task = asyncio.ensure_future(taking)
        try:
            thing = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: self._late(done, give))
            raise
        if self.closed:
            await give(thing)
            raise asyncio.CancelledError("the device went while this was taken")
        held[id(thing)] = thing
        return thing

    def _late(self, done: asyncio.Task[T], give: Callable[[T], Awaitable[None]]) -> None:
        if done.cancelled() or done.exception() is not None:
            return
        task = asyncio.ensure_future(_quietly(give(done.result()), "what a cancelled driver took"))
        _late_tasks.add(task)
        task.add_done_callback(_late_tasks.discard)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def give_back(self) -> None:
        """Everything, even if some of it fails (which is logged). Nothing more can be taken."""
        self.closed = True
        current = asyncio.current_task()
        await asyncio.gather(*(end_task(task) for task in list(self.tasks) if task is not current))
        for watch in _taken(self.watches):
            await _quietly(watch.close(), f"watch on {watch.path}")
        for channel in _taken(self.channels):
            await _quietly(channel.close(), f"port {channel.port}")
        for mapping in _taken(self.mappings):
            await _quietly(self.hv.gntdev.unmap(mapping), f"mapping of {mapping.refs}")
        for pages in _taken(self.grants):
            await _quietly(self.hv.grants.revoke(pages), f"grant of {pages.refs}")

    async def drop(self) -> None:
        """After a real suspend: the hypervisor and store that these were of are gone, only our tasks end."""
        self.closed = True
        await asyncio.gather(*(end_task(task) for task in list(self.tasks)))
        for held in (self.watches, self.channels, self.mappings, self.grants):
            held.clear()


_late_tasks: set[asyncio.Future[None]] = set()


def _taken(held: dict[int, T]) -> list[T]:
    things = list(held.values())
    held.clear()
    return things


async def _quietly(giving: Awaitable[None], what: str) -> None:
    try:
        await giving
    except (XenbusError, OSError, BufferError) as exc:
        log.warning("giving back %s: %s", what, exc)
