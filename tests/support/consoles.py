"""A console in one process: domain 0 with xcb, a guest with xc, the real store and hypervisor between."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.support.pair import SETTINGS, Pair
from tests.support.split import Guest, World
from tests.support.until import descriptors, until
from xenbus.bus import Settings, XenbusState
from xenbus.drivers.console import Xc, Xcb
from xenbus.toolstack.console import ConsoleSpec
from xenbus.toolstack.devices import detach_device, write_device


class Rig(Pair):
    """`stream` is what the guest's programs have."""

    kind = "console"
    devid = 1

    def __init__(self, made: World, dom0: Guest, guest: Guest) -> None:
        super().__init__(made, dom0, guest)
        self.spec = ConsoleSpec(guest.domid, self.devid).device()

    async def plug(self, **given: Any) -> Rig:
        self.spec = ConsoleSpec(self.guest.domid, self.devid, **given).device()
        await write_device(self.world.tool, self.spec)
        await until(lambda: self.guest.front.devices and self.dom0.back.devices)
        return self

    async def connected(self, **given: Any) -> Rig:
        await self.plug(**given)
        return await self.both(XenbusState.CONNECTED)

    async def both(self, state: XenbusState) -> Rig:
        await self.states(state, state)
        return self

    @property
    def stream(self) -> Any:
        return self.front.stream

    def operator(self) -> Operator:
        return Operator(self.back.sysctl()["tty"]())

    async def gone(self, **given: Any) -> None:
        """Detached in order; neither side holds anything."""
        await detach_device(self.world.tool, self.spec.paths, timeout=5, **given)
        await self.removed()


class Operator:
    """Has a console's PTY open, as a terminal program has. Use it with `with`."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def type(self, data: bytes) -> int:
        """How many of the bytes the PTY took."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0

    def look(self) -> bytes:
        """What is there now."""
        seen = b""
        while select.select([self._fd], [], [], 0)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # it hung up
                return seen
            if not data:
                return seen
            seen += data
        return seen

    async def see(self, wanted: bytes, seconds: float = 5.0) -> bytes:
        """All that was shown up to and with `wanted`, and more if that came with it."""
        seen = b""
        async with asyncio.timeout(seconds):
            while wanted not in (seen := seen + self.look()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return seen

    async def take(self, count: int, seconds: float) -> bytes:
        """So many bytes, and what came with the last of them; as far as it came if the time is up."""
        seen, end = b"", asyncio.get_running_loop().time() + seconds
        while len(seen := seen + self.look()) < count and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return seen

    async def enter(self, data: bytes, seconds: float) -> None:
        """All of it typed, as the PTY has room."""
        async with asyncio.timeout(seconds):
            while data := data[self.type(data) :]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def rig(front: Any = Xc, back: Any = Xcb, settings: Settings = SETTINGS) -> Any:
    """Both domains up, no console yet."""
    return Rig.rig(front, back, settings)


def log_of(path: Path) -> bytes:
    """The log, what was rotated out first."""
    old = path.with_name(path.name + ".1")
    return (old.read_bytes() if old.exists() else b"") + path.read_bytes()


def run(test: Callable[[Rig], Awaitable[None]], *drivers: Any, **options: Any) -> None:
    """Everything is given back at the end: descriptors, too."""

    async def main() -> None:
        async with asyncio.timeout(30), rig(*drivers, **options) as made:
            await test(made)

    before = len(descriptors())
    asyncio.run(main())
    assert len(descriptors()) == before
