"""A guest's disk, front end and back end in two processes, beside what the machine itself does."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import floors
from bench.guest import SOCKET
from bench.rows import CPUS, Row, best
from xenbus.domain.host import Host
from xenbus.domain.rpc import RpcClient
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import wait_connected, write_device
from xenbus.toolstack.domains import Toolstack

IMAGE = 64 << 20  # bytes: fits the page cache everywhere
RUNS = 3


def run(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="xb-") as folder:
        image = Path(folder) / "image"
        image.write_bytes(os.urandom(1 << 20) * (IMAGE >> 20))
        return asyncio.run(_measure(Path(folder) / "host", image, 10 if quick else 1))


async def _measure(root: Path, image: Path, less: int) -> list[Row]:
    host = Host(root, guest_module="bench.guest")
    await host.start()
    try:
        async with await Toolstack.open(root) as toolstack:
            guest = await toolstack.create("bench")
            spec = DiskSpec(guest.domid, str(image), "xvda", readonly=True).device()
            await write_device(toolstack.store, spec)
            await wait_connected(toolstack.store, spec.paths)
            pids = await toolstack.host.call("processes")
            # Front end and back end as the floors: one on each CPU. Nobody else has anything to do.
            os.sched_setaffinity(pids["bench"], {CPUS[0]})
            os.sched_setaffinity(pids["Domain-0"], {CPUS[-1]})
            async with await RpcClient.connect(root / SOCKET) as client:
                rows = await _rows(client, image, less)
            await toolstack.destroy(guest.domid)
            return rows
    finally:
        await host.stop()


async def _rows(client: RpcClient, image: Path, less: int) -> list[Row]:
    async def ours(method: str, **params: int) -> list[float]:
        return [await client.call(method, timeout=300.0, **params) for _ in range(RUNS)]

    async def floor(function: object, *arguments: object) -> list[float]:
        return [await asyncio.to_thread(_in_child, function, arguments) for _ in range(RUNS)]

    rounds, requests, total = 20_000 // less, 128_000 // less, (4 << 30) // less
    latency = await ours("latency", rounds=rounds)
    ping = await floor(floors.ping_pong, rounds)
    deep = await ours("deep", depth=32, requests=requests)
    bare = await floor(floors.bare_slots, str(image), requests)
    sequential = await ours("sequential", length=1 << 20, depth=4, total=total)
    plain = await floor(floors.plain_preadv, str(image), total)
    return [
        Row("4 KiB read, 1 in flight", best(latency), best(ping), "us", "eventfd ping-pong", "<= 2.2"),
        Row(
            "4 KiB reads, 32 in flight",
            best(deep, lowest=False) / 1e3,
            best(bare, lowest=False) / 1e3,
            "k/s",
            "bare slots and preadv",
            ">= 0.5",
        ),
        Row(
            "1 MiB reads, 4 in flight",
            best(sequential, lowest=False) / 1e9,
            best(plain, lowest=False) / 1e9,
            "GB/s",
            "plain preadv",
            ">= 0.5",
        ),
    ]


def _in_child(function: object, arguments: tuple[object, ...]) -> float:
    """A floor in a fresh process: a fork of one that holds a host and threads would not be bare."""
    code = f"from bench import floors; print(floors.{function.__name__}(*{arguments!r}))"  # type: ignore[attr-defined]
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(result.stdout)
