"""A domain that does what it is told, here or in another process: the hand of the conformance suite.

`Actor` wraps a Hypervisor and names what it holds by small numbers, so that every call is JSON. `RemoteActor`
sends the same calls to a child process that runs this module. No test here.
"""

from __future__ import annotations

import array
import asyncio
import base64
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

from xenbus import errors
from xenbus.hypervisor.interface import CopyOp

DEADLINE = 10.0


class Actor:
    """Verbs over one Hypervisor. Data is bytes outside and base64 on the way to a child."""

    def __init__(self, hv) -> None:
        self.hv = hv
        self.things: dict[int, object] = {}
        self.counts: dict[int, int] = {}
        self.dead: list[int] = []
        self.lost = False
        self.parked: asyncio.Task | None = None
        self._changed = asyncio.Event()
        hv.on_domain_dead(self.dead.append)
        hv.on_lost(self._on_lost)

    def _on_lost(self) -> None:
        self.lost = True
        self._changed.set()

    def _keep(self, thing: object) -> int:
        number = len(self.things) + 1
        self.things[number] = thing
        return number

    def _handler(self, number: int):
        self.counts[number] = 0

        def fired() -> None:
            self.counts[number] += 1
            self._changed.set()

        return fired

    async def alloc(self, domid, count, writable=True):
        pages = await self.hv.grants.alloc(domid, count, writable=writable)
        assert len(pages.view) == 4096 * count and pages.writable == writable and pages.domid == domid
        return [self._keep(pages), list(pages.refs)]

    async def revoke(self, number):
        await self.hv.grants.revoke(self.things[number])

    async def map(self, domid, refs, writable=True):
        mapping = await self.hv.gntdev.map(domid, refs, writable=writable)
        assert mapping.refs == tuple(refs) and mapping.domid == domid and mapping.writable == writable
        assert len(mapping.view) == 4096 * len(refs) and mapping.view.contiguous
        return self._keep(mapping)

    async def unmap(self, number):
        await self.hv.gntdev.unmap(self.things[number])

    async def poke(self, number, offset, data):
        """Writes; answers the name of the exception that refused it."""
        try:
            self.things[number].view[offset : offset + len(data)] = data
        except (TypeError, ValueError) as error:
            return type(error).__name__
        return None

    async def peek(self, number, offset, length):
        return bytes(self.things[number].view[offset : offset + length])

    async def keep_slice(self, number, offset, length):
        return self._keep(self.things[number].view[offset : offset + length])

    async def peek_slice(self, number):
        return bytes(self.things[number])

    async def copy(self, ops):
        """Each [domid, ref, offset, data or length]; data goes there, a length comes from there."""
        segments, local = [], []
        for domid, ref, offset, what in ops:
            to_remote = isinstance(what, bytes)
            buffer = bytearray(what if to_remote else min(what, 8192))
            local.append(buffer)
            length = len(what) if to_remote else what
            segments.append(CopyOp(domid, ref, offset, length, memoryview(buffer), to_remote))
        status = await self.hv.gntdev.copy(segments)
        return [status, [bytes(buffer) for buffer in local]]

    async def port(self, remote_domid):
        number = self._keep(None)
        channel = await self.hv.evtchn.alloc_unbound(remote_domid, self._handler(number))
        self.things[number] = channel
        return [number, channel.port]

    async def bind(self, remote_domid, remote_port):
        number = self._keep(None)
        channel = await self.hv.evtchn.bind_interdomain(remote_domid, remote_port, self._handler(number))
        self.things[number] = channel
        assert channel.remote_domid == remote_domid
        return number

    async def bind_masked(self, remote_domid, remote_port):
        """Masked before the loop has another turn."""
        number = await self.bind(remote_domid, remote_port)
        self.things[number].mask()
        return number

    async def bind_handler(self, remote_domid, remote_port, handler):
        """The channel itself, with a handler of the caller's: for a domain in this process."""
        return await self.hv.evtchn.bind_interdomain(remote_domid, remote_port, handler)

    async def notify(self, number, times=1):
        for _ in range(times):
            self.things[number].notify()

    async def count_up(self, number, pages, upto):
        """Publishes 1, 2, ... in the first word of the pages, with a kick each, and no wait between."""
        word, channel = self.things[pages].view[:4].cast("I"), self.things[number]
        for value in range(1, upto + 1):
            word[0] = value
            channel.notify()
            if not value % 50:
                await asyncio.sleep(0)

    async def mask(self, number):
        self.things[number].mask()

    async def unmask(self, number):
        self.things[number].unmask()

    async def close_port(self, number):
        await self.things[number].close()

    async def fired(self, number, at_least):
        """Waits until the handler has run so often; then whatever else is under way; then the count."""

        async def enough():
            while self.counts[number] < at_least:
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(enough(), DEADLINE)
        await self.barrier()
        return self.counts[number]

    async def barrier(self):
        """What others did before this call has reached us: one round trip, and a few turns of the loop."""
        if not self.lost:
            channel = await self.hv.evtchn.alloc_unbound(0, lambda: None)
            await channel.close()
        for _ in range(5):
            await asyncio.sleep(0)

    async def start(self):
        number = self._keep(None)
        info = await self.hv.start_info(self._handler(number))
        self.things[number] = info.store_channel
        page = self._keep(_Page(info.store_page))
        return [number, page]

    async def suspend(self):
        self.parked = asyncio.create_task(self.hv.suspend())

    async def resumed(self):
        result = await asyncio.wait_for(self.parked, DEADLINE)
        assert result.domid == self.hv.domid
        return [result.cancelled, result.domid]

    async def deaths(self):
        await self.barrier()
        return self.dead

    async def wait_lost(self):
        async def gone():
            while not self.lost:
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(gone(), DEADLINE)

    async def held(self):
        held = self.hv.held()
        return [held.granted_pages, held.mapped_pages, held.ports]

    async def fds(self):
        return open_files()

    async def close(self):
        if self.parked is not None:
            self.parked.cancel()
            await asyncio.gather(self.parked, return_exceptions=True)
        await self.hv.close()


class _Page:
    def __init__(self, view) -> None:
        self.view = view


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def pack(value):
    if isinstance(value, bytes):
        return {"b": base64.b64encode(value).decode()}
    if isinstance(value, (list, tuple)):
        return [pack(one) for one in value]
    return value


def unpack(value):
    if isinstance(value, dict):
        return base64.b64decode(value["b"])
    if isinstance(value, list):
        return [unpack(one) for one in value]
    return value


class RemoteActor:
    """The verbs of an Actor, done by a child."""

    def __init__(self, child: Child, key: int) -> None:
        self._child = child
        self._key = key

    def __getattr__(self, verb):
        async def call(*args):
            return await self._child.call(self._key, verb, *args)

        return call


class Child:
    """A process that holds domains. One serves many tests: each brings it fresh broker sockets."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)
        root = Path(__file__).parents[2]
        with theirs:
            command = [sys.executable, "-m", "tests.support.hypervisor_actor", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=root)
        self._keys = 0

    async def connect(self, sock: socket.socket) -> RemoteActor:
        self._keys += 1
        data = json.dumps([self._keys, "connect", []]).encode()
        fds = array.array("i", [sock.fileno()])
        with sock:
            self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        await self._answer()
        return RemoteActor(self, self._keys)

    async def call(self, key, verb, *args):
        self._sock.send(json.dumps([key, verb, pack(args)]).encode())
        return await self._answer()

    async def _answer(self):
        loop = asyncio.get_running_loop()
        data = await asyncio.wait_for(loop.sock_recv(self._sock, 1 << 16), 2 * DEADLINE)
        if not data:
            raise ConnectionError("the child is gone")
        kind, value = json.loads(data)
        if kind == "ok":
            return unpack(value)
        if kind == "HypervisorError":
            raise errors.HypervisorError(*value)
        raise getattr(errors, kind, AssertionError)(value)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._sock.close()


async def _serve(sock: socket.socket) -> None:
    from xenbus.hypervisor.broker import connect

    loop = asyncio.get_running_loop()
    actors: dict[int, Actor] = {}
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    while True:
        await ready.wait()
        ready.clear()
        try:
            data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 1)
        except BlockingIOError:
            continue
        if not data:
            return
        ready.set()
        key, verb, args = json.loads(data)
        try:
            if verb == "connect":
                actors[key] = Actor(await connect(fds[0]))
                answer = ["ok", None]
            else:
                answer = ["ok", pack(await getattr(actors[key], verb)(*unpack(args)))]
                if verb == "close":
                    del actors[key]
        except errors.HypervisorError as error:
            answer = ["HypervisorError", [error.name, re.sub(r": \w+$", "", str(error))]]
        except Exception as error:  # noqa: BLE001 - it goes to the parent
            answer = [type(error).__name__, str(error)]
        sock.send(json.dumps(answer).encode())


if __name__ == "__main__":
    control = socket.socket(fileno=int(sys.argv[1]))
    control.setblocking(False)
    asyncio.run(_serve(control))
