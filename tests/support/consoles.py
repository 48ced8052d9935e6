"""A console in one process: domain 0 with xcb, a guest with xc, the real store and hypervisor between."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.split import Guest, World, use, world
from tests.support.until import until
from xenbus.bus import Settings, XenbusState
from xenbus.drivers.console import Xc, Xcb
from xenbus.toolstack.console import ConsoleSpec
from xenbus.toolstack.devices import detach_device, write_device

SETTINGS = Settings(callback=5.0, detach=2.0, boot=2.0)


class Rig:
    """`front` and `back` are drivers; `stream` is what the guest's programs have."""

    def __init__(self, made: World, dom0: Guest, guest: Guest) -> None:
        self.world, self.dom0, self.guest = made, dom0, guest
        self.before = dom0.hv.held(), guest.hv.held()
        self.spec = ConsoleSpec(1, 1).device()

    async def plug(self, **given: Any) -> Rig:
        self.spec = ConsoleSpec(self.guest.domid, 1, **given).device()
        await write_device(self.world.tool, self.spec)
        await until(lambda: self.guest.front.devices and self.dom0.back.devices)
        return self

    async def connected(self, **given: Any) -> Rig:
        await self.plug(**given)
        return await self.both(XenbusState.CONNECTED)

    async def both(self, state: XenbusState) -> Rig:
        await until(lambda: self.front_dev.state is self.back_dev.state is state)
        return self

    @property
    def front_dev(self) -> Any:
        return self.guest.front.devices["device/console/1"]

    @property
    def back_dev(self) -> Any:
        return self.dom0.back.devices[f"backend/console/{self.guest.domid}/1"]

    @property
    def front(self) -> Any:
        return self.front_dev.driver

    @property
    def back(self) -> Any:
        return self.back_dev.driver

    @property
    def stream(self) -> Any:
        return self.front.stream

    def operator(self) -> Operator:
        return Operator(self.back.sysctl()["tty"]())

    def held(self) -> tuple[Any, Any]:
        return self.dom0.hv.held(), self.guest.hv.held()

    async def gone(self, **given: Any) -> None:
        """Detached in order; neither side holds anything."""
        await detach_device(self.world.tool, self.spec.paths, timeout=5, **given)
        await until(lambda: not self.guest.front.devices and not self.dom0.back.devices)
        await until(lambda: self.held() == self.before)


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


@asynccontextmanager
async def rig(front: Any = Xc, back: Any = Xcb, settings: Settings = SETTINGS) -> AsyncIterator[Rig]:
    """Both domains up, no console yet."""
    async with world() as made:
        use(made, front, back, "console")
        dom0, guest = await made.guest(0, settings), await made.guest(1, settings)
        found = Rig(made, dom0, guest)
        await dom0.attach()
        await guest.attach()
        yield found


def log_of(path: Path) -> bytes:
    """The log, what was rotated out first."""
    old = path.with_name(path.name + ".1")
    return (old.read_bytes() if old.exists() else b"") + path.read_bytes()
