"""What both rings of a guest have in common, as xnb serves them: how it begins, and how it comes to rest.

Knows a ring, its port and the guest's pages; knows no packets, no store and no states.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

from xenbus.drivers.net.cable import Cable
from xenbus.drivers.net.xnb_pages import Pages
from xenbus.errors import PeerError
from xenbus.hypervisor.interface import Channel
from xenbus.ring.answers import AnswerRing


class GuestRing(ABC):
    """spawn: starts a task of the device
    on_fatal: called once, with what the guest did to its ring; nothing more is read off it
    """

    def __init__(
        self,
        ring: AnswerRing,
        pages: Pages,
        cable: Cable,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_fatal: Callable[[PeerError], None],
    ) -> None:
        self._ring = ring
        self._pages = pages
        self._cable = cable
        self._counters = cable.counters
        self._spawn = spawn
        self._on_fatal = on_fatal
        self._channel: Channel | None = None
        self._over = False
        self._idle: asyncio.Future[None] | None = None

    @abstractmethod
    def kick(self) -> None:
        """The event channel's handler."""

    @property
    @abstractmethod
    def _mapping(self) -> bool:
        """Pages are being mapped; `_rest` is called when they are no more."""

    def start(self, channel: Channel) -> None:
        """Serve from now on; what is on the ring already is served at once."""
        self._channel = channel
        self.kick()

    async def stop(self, seconds: float) -> bool:
        """Take nothing more. False if pages were still being mapped after that time."""
        self._over = True
        if self._mapping and seconds:
            self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._idle], timeout=seconds)
        return not self._mapping

    def _rest(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
