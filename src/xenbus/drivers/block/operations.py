"""What an operator can ask of a guest's disk: sums, reads, writes, a verifying load, an NBD export.

Works on whatever has read_into, write, flush and discard; offered by xbd, reached over its domain's
control socket. Every length is bounded, and what a caller starts ends with its connection.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from xenbus.bus.operations import Operation, OperatorCall
from xenbus.drivers.block.nbd import NbdServer
from xenbus.drivers.block.storage import Blocks
from xenbus.errors import PeerError, UsageError, XenbusError

CHUNK = 1 << 20  # bytes of one request when a whole disk is read
READ_MAX = 512 << 10  # bytes that one `read` answers: base64 in one line of JSON
DEPTH = 4  # chunks in flight
LOAD_BLOCK = 4096
LOAD_PATIENCE = 10.0
EXPORTS_MAX = 8


class DiskOperations:
    """The operations of one disk. `close()` ends loads and exports."""

    def __init__(self, disk: Blocks) -> None:
        self._disk = disk
        self._load: _Load | None = None
        self._exports: dict[str, NbdServer] = {}

    def table(self) -> Mapping[str, Operation]:
        return {
            "info": self._info,
            "digest": self._digest,
            "read": self._read,
            "write": self._write,
            "flush": self._flush,
            "discard": self._discard,
            "load_start": self._load_start,
            "load_stop": self._load_stop,
            "nbd_start": self._nbd_start,
            "nbd_stop": self._nbd_stop,
        }

    async def close(self) -> None:
        if self._load is not None:
            await self._load.stop()
            self._load = None
        for path in list(self._exports):
            await self._exports.pop(path).close()

    # -- the operations --------------------------------------------------------------------------------

    async def _info(self, call: OperatorCall) -> object:
        disk = self._disk
        return {"size": disk.size, "sector_size": disk.sector_size, "readonly": disk.readonly}

    def _range(self, call: OperatorCall) -> tuple[int, int]:
        offset = call.number("offset", 0)
        length = call.number("length", self._disk.size - offset)
        if offset < 0 or length < 0 or offset + length > self._disk.size:
            raise UsageError(f"{length} bytes at {offset}: the disk has {self._disk.size}")
        return offset, length

    async def _digest(self, call: OperatorCall) -> object:
        """SHA-256 of a range, read with several chunks in flight; progress is bytes done of all."""
        offset, length = self._range(call)
        sum_, done, started = hashlib.sha256(), 0, time.monotonic()
        chunks = [(at, min(CHUNK, offset + length - at)) for at in range(offset, offset + length, CHUNK)]
        buffers = [memoryview(bytearray(min(CHUNK, length))) for _ in range(min(DEPTH, len(chunks)))]
        reads: dict[int, asyncio.Task[object]] = {}

        def start(index: int) -> None:
            at, size = chunks[index]
            read = self._disk.read_into(at, buffers[index % DEPTH][:size])
            reads[index] = asyncio.ensure_future(read)

        try:
            for index in range(len(buffers)):
                start(index)
            for index, (_, size) in enumerate(chunks):
                await reads.pop(index)
                sum_.update(buffers[index % DEPTH][:size])
                if index + DEPTH < len(chunks):
                    start(index + DEPTH)
                done += size
                await call.progress({"done": done, "total": length})
        finally:
            for task in reads.values():
                task.cancel()
            await asyncio.gather(*reads.values(), return_exceptions=True)
        return {"sha256": sum_.hexdigest(), "bytes": length, "seconds": time.monotonic() - started}

    async def _read(self, call: OperatorCall) -> object:
        offset, length = self._range(call)
        if length > READ_MAX:
            raise UsageError(f"one read answers at most {READ_MAX} bytes")
        buffer = bytearray(length)
        await self._disk.read_into(offset, memoryview(buffer))
        return base64.b64encode(buffer).decode()

    async def _write(self, call: OperatorCall) -> object:
        data = base64.b64decode(call.text("data"), validate=True)
        await self._disk.write(call.number("offset"), memoryview(data))
        return len(data)

    async def _flush(self, call: OperatorCall) -> object:
        await self._disk.flush()
        return None

    async def _discard(self, call: OperatorCall) -> object:
        offset, length = self._range(call)
        await self._disk.discard(offset, length)
        return None

    async def _load_start(self, call: OperatorCall) -> object:
        """Write, read back and compare blocks of a range until `load_stop`; errors are kept, not raised.

        Returns when it is under way, or has had LOAD_PATIENCE seconds: what is done next is done under load.
        """
        if self._load is not None:
            raise UsageError("a load runs on this disk already")
        offset, length = self._range(call)
        if length < LOAD_BLOCK:
            raise UsageError(f"a load needs a range of at least {LOAD_BLOCK} bytes")
        self._load = _Load(self._disk, offset, length)
        self._load.start(call.number("depth", DEPTH))
        with suppress(TimeoutError):
            async with asyncio.timeout(LOAD_PATIENCE):
                await self._load.moving.wait()
        return None

    async def _load_stop(self, call: OperatorCall) -> object:
        load, self._load = self._load, None
        if load is None:
            raise UsageError("no load runs on this disk")
        return await load.stop()

    async def _nbd_start(self, call: OperatorCall) -> object:
        """Export the disk on a unix socket until `nbd_stop` or until the caller goes."""
        path = call.text("socket")
        if len(self._exports) >= EXPORTS_MAX or path in self._exports:
            raise UsageError(f"{path}: exported already, or {EXPORTS_MAX} exports, the most, run")
        server = NbdServer(self._disk)
        await server.serve_unix(Path(path))
        self._exports[path] = server

        async def give_back() -> None:
            if self._exports.get(path) is server:
                del self._exports[path]
                await server.close()

        call.on_gone(give_back)
        return {"socket": path, "size": self._disk.size}

    async def _nbd_stop(self, call: OperatorCall) -> object:
        server = self._exports.pop(call.text("socket"), None)
        if server is None:
            raise UsageError("no such export")
        await server.close()
        return None


@dataclass(slots=True)
class _Load:
    """Traffic that proves something: each block written is read back and compared."""

    disk: Blocks
    offset: int
    length: int
    requests: int = 0
    bytes: int = 0
    errors: list[str] = field(default_factory=list)
    longest: float = 0.0  # seconds one write and read took
    moving: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _started: float = 0.0

    def start(self, depth: int) -> None:
        blocks = self.length // LOAD_BLOCK
        depth = max(1, min(depth, 64, blocks))
        self._started = time.monotonic()
        # Each worker has blocks of its own, so that what it reads back is what it wrote.
        self._tasks = [asyncio.create_task(self._work(i, blocks, depth)) for i in range(depth)]

    async def _work(self, worker: int, blocks: int, depth: int) -> None:
        dice = random.Random(worker)
        mine = range(worker, blocks, depth)
        back = memoryview(bytearray(LOAD_BLOCK))
        while True:
            at = self.offset + dice.choice(mine) * LOAD_BLOCK
            data = dice.randbytes(LOAD_BLOCK)
            begun = time.monotonic()
            try:
                await self.disk.write(at, memoryview(data))
                await self.disk.read_into(at, back)
                if back != data:
                    raise PeerError(f"what was read at {at} is not what was written")
            except XenbusError as error:
                if len(self.errors) < 10:
                    self.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.01)
            self.requests += 2
            self.moving.set()
            self.bytes += 2 * LOAD_BLOCK
            self.longest = max(self.longest, time.monotonic() - begun)

    async def stop(self) -> dict[str, object]:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task
        return {
            "requests": self.requests,
            "bytes": self.bytes,
            "seconds": time.monotonic() - self._started,
            "longest": self.longest,
            "errors": self.errors,
        }
