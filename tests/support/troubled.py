"""Drivers, and a storage, with a trouble each, for the tests of the seed's defects and others."""

from __future__ import annotations

import asyncio

from tests.support.split import Recorder, S, ToyFront
from xenbus.errors import StoreError
from xenbus.newbus import NoMatch


class WaitsForPeer(ToyFront):
    """A front end whose detach waits for its back end, as a disk must."""

    async def detach(self):
        await super().detach()
        self.ds = self.dev.device.state.name
        await self.dev.set_state(S.CLOSING)
        self.answer = await self.dev.wait_otherend(S.CLOSED, timeout=5)


class NeverDetaches(ToyFront):
    async def detach(self):
        await asyncio.Event().wait()


class FailsToDetach(ToyFront):
    async def detach(self):
        raise RuntimeError("busy")


class Together(Recorder):
    """Resumes only when all three are resuming; the second one fails."""

    barrier: asyncio.Barrier

    async def resume(self, cancelled):
        await super().resume(cancelled)
        await self.barrier.wait()
        if self.dev.id == "1":
            raise RuntimeError("no resume here")


class Slow(ToyFront):
    gate: asyncio.Event

    async def otherend_changed(self, state):
        if self.dev.id == "0":
            await self.gate.wait()
        await super().otherend_changed(state)


class Careful(Recorder):
    async def otherend_changed(self, state):
        await super().otherend_changed(state)
        if state is S.INIT_WAIT:
            try:
                await self.dev.set_state(S.INITIALISED)
            except StoreError as exc:
                self.heard.append(("raised", exc.name))


class Contrary(Recorder):
    """Fails to attach, every other one; others have no driver."""

    @classmethod
    def probe(cls, dev):
        if dev.id.endswith("2"):
            raise NoMatch("not mine")
        return 0

    async def attach(self):
        await asyncio.sleep(0)
        if int(self.dev.id) % 2:
            raise RuntimeError("will not")


async def replace(w, **keys):
    """The node goes and another device comes in its place, in one transaction: one event."""
    fnode, bnode = w.front_node("toy", 0), w.back_node("toy", 0)

    async def write(tx):
        await tx.rm(fnode)
        await tx.mkdir(fnode)
        await tx.set_perms(fnode, ["n1", "r0"])
        for key, value in ({"backend": bnode, "backend-id": "0", "state": "1"} | keys).items():
            await tx.write(f"{fnode}/{key}", value)

    await w.tool.transaction(write)


class ClosesItself(Recorder):
    async def detach(self):
        await super().detach()
        self.heard.append(("closed", await self.dev.set_state(S.CLOSED)))


class Hesitates(Recorder):
    """Connects after the node was made again behind its back."""

    async def otherend_changed(self, state):
        await super().otherend_changed(state)
        if state is S.INIT_WAIT and self.between is not None:
            between, Hesitates.between = self.between, None
            await between()
            self.heard.append(("wrote", await self.dev.set_state(S.INITIALISED, {"ring-ref": 8})))

    between = None


class Gated:
    """A real storage whose writes wait, and flushes if told to, and which remembers the order of both."""

    def __init__(self, storage):
        self._storage = storage
        self.order = []
        self.gate = asyncio.Event()
        self.flushing = asyncio.Event()
        self.flushing.set()

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def try_writev(self, offset, buffers):
        return False

    async def writev(self, offset, buffers):
        await self.gate.wait()
        self.order.append(offset // 4096)
        await self._storage.writev(offset, buffers)

    async def flush(self):
        await self.flushing.wait()
        self.order.append("flush")
        await self._storage.flush()
