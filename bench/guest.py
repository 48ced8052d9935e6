"""The guest of the block benchmarks: a domain like any, that also measures its disk when asked to."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from xenbus.domain.layout import HostLayout
from xenbus.domain.process import main
from xenbus.domain.rpc import Call, RpcServer
from xenbus.domain.runtime import DomainRuntime

SOCKET = "bench.socket"
PAGE = 4096


class Workloads:
    def __init__(self, runtime: DomainRuntime) -> None:
        self._runtime = runtime

    @property
    def _disk(self) -> Any:
        device = self._runtime.tree.find("xbd0")
        assert device is not None and device.softc is not None
        return device.softc.disk  # type: ignore[attr-defined]

    async def latency(self, call: Call) -> object:
        """Microseconds a 4 KiB read takes, one in flight."""
        disk, rounds = self._disk, call.number("rounds")
        blocks, buffer = disk.size // PAGE, memoryview(bytearray(PAGE))
        for i in range(1000):
            await disk.read_into(i % blocks * PAGE, buffer)
        start = time.perf_counter()
        for i in range(rounds):
            await disk.read_into(i % blocks * PAGE, buffer)
        return (time.perf_counter() - start) / rounds * 1e6

    async def deep(self, call: Call) -> object:
        """4 KiB random reads a second by `Disk.read_into`, from `depth` tasks."""
        disk, depth, each = self._disk, call.number("depth"), call.number("requests") // call.number("depth")
        blocks = disk.size // PAGE

        dice = random.Random(depth)
        lists = [[dice.randrange(blocks) * PAGE for _ in range(1024)] for _ in range(depth)]

        async def worker(places: list[int]) -> None:
            buffer = memoryview(bytearray(PAGE))
            for i in range(each):
                await disk.read_into(places[i & 1023], buffer)

        start = time.perf_counter()
        await asyncio.gather(*map(worker, lists))
        return each * depth / (time.perf_counter() - start)

    async def sequential(self, call: Call) -> object:
        """Bytes a second of `length` reads, `depth` in flight, each worker into one buffer of its own."""
        disk, length, depth, total = (
            self._disk,
            call.number("length"),
            call.number("depth"),
            call.number("total"),
        )
        places = iter([at % disk.size for at in range(0, total, length)])

        async def worker() -> None:
            buffer = memoryview(bytearray(b"\1") * length)
            for at in places:
                await disk.read_into(at, buffer)

        start = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(depth)))
        return total / (time.perf_counter() - start)


@asynccontextmanager
async def measuring(runtime: DomainRuntime, layout: HostLayout) -> AsyncIterator[None]:
    work = Workloads(runtime)
    server = RpcServer({"latency": work.latency, "deep": work.deep, "sequential": work.sequential})
    await server.serve(layout.root / SOCKET)
    try:
        yield
    finally:
        await server.close()


if __name__ == "__main__":
    sys.exit(main(around=measuring))
