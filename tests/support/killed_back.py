"""Back ends in processes of their own that are killed, and a guest here that goes on. No test here.

A broker, a store, a guest with its front bus: real processes over the broker, real rings.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from tests.support.back_process import BackProcess
from tests.support.unhandled import nothing_unhandled
from tests.support.until import until
from xenbus.bus import FrontBus, Settings
from xenbus.hypervisor.broker import Broker, connect
from xenbus.hypervisor.interface import Held
from xenbus.newbus import Newbus
from xenbus.toolstack.devices import DeviceSpec, detach_device, wait_connected, write_device
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon import Daemon


class KilledBack:
    """`back` is the back end's latest process, `spec` the device that was plugged."""

    spec: DeviceSpec

    def __init__(self, tmp_path: Path) -> None:
        self.socket = str(tmp_path / "store")
        self.journals = tmp_path / "journals"
        self.journals.mkdir(mode=0o700)
        self.back: BackProcess | None = None

    @classmethod
    @asynccontextmanager
    async def rig(cls, tmp_path: Path) -> AsyncIterator[Self]:
        made = cls(tmp_path)
        with nothing_unhandled():
            await made._start()
            try:
                yield made
            finally:
                await made._close()

    @classmethod
    def run(cls, test: Callable[[Self], Awaitable[None]], tmp_path: Path) -> None:
        async def main() -> None:
            async with cls.rig(tmp_path) as made:
                await test(made)

        asyncio.run(main())

    async def _start(self) -> None:
        self.broker = Broker()
        for domid in (0, 1):
            self.broker.create(domid)
        self.zero, self.one = await connect(self.broker.handle(0)), await connect(self.broker.handle(1))
        self.daemon = Daemon(self.zero)
        await self.daemon.listen_unix(self.socket)
        self.tool = await Client.connect(self.daemon.connect_local(0))
        for domid in (0, 1):
            await self.tool.write(f"/local/domain/{domid}/name", f"domain{domid}")
            await self.tool.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
        store = await Client.connect(self.daemon.connect_local(1))
        tree = Newbus()
        parent = tree.add_child(tree.root, name="xenstore")
        self.bus = FrontBus(store, self.one, parent, settings=Settings(detach=5.0))
        await self.bus.attach()

    async def _close(self) -> None:
        if self.back is not None and self.back.process.returncode is None:
            await self.back.kill()
        await self.bus.detach()
        await self.bus.store.close()
        await self.tool.close()
        await self.daemon.close()
        await self.one.close()
        await self.zero.close()
        await self.broker.close()

    async def rise(self, **options: Any) -> BackProcess:
        """A new process with the back end; options: see BackProcess.start."""
        options = {"journals": self.journals, **options}
        self.back = await BackProcess.start(self.socket, self.broker.handle(0), **options)
        return self.back

    async def add(self, spec: DeviceSpec) -> None:
        """Until it is Connected."""
        self.spec = spec
        await write_device(self.tool, spec)
        await wait_connected(self.tool, spec.paths)

    async def unplug(self) -> None:
        """In order; afterwards domain 0 holds nothing, and nothing is left for another process."""
        assert await detach_device(self.tool, self.spec.paths)
        await until(lambda: self.broker.held(0) == Held(0, 0, 0))
        assert list(self.journals.iterdir()) == []
