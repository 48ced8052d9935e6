"""Our clients: `python -m bench.xenstore.ours LOAD SOCKET COUNT` prints microseconds an operation.

The loads of libxenstore.c and pyxs_client.py, by the same names.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from time import perf_counter

from xenbus.xenstore.client import Client
from xenbus.xenstore.sync import SyncClient, Transaction

PATH, VALUE = "/bench/node", b"value"
TASKS = 64


def read(client: SyncClient, count: int) -> None:
    for _ in range(count):
        client.read(PATH)


def write(client: SyncClient, count: int) -> None:
    for _ in range(count):
        client.write(PATH, VALUE)


def transaction(client: SyncClient, count: int) -> None:
    def once(tx: Transaction) -> None:
        tx.read(PATH)
        tx.write(PATH, VALUE)

    for _ in range(count):
        client.transaction(once)


def watch(client: SyncClient, count: int) -> None:
    """A write, and the wait for its event."""
    client.watch(PATH)
    client.poll_watch(timeout=5)
    for _ in range(count):
        client.write(PATH, VALUE)
        if client.poll_watch(timeout=5) is None:
            raise RuntimeError("no event")


BLOCKING: dict[str, Callable[[SyncClient, int], None]] = {
    "read": read,
    "write": write,
    "transaction": transaction,
    "watch": watch,
}


async def tasks(socket: str, count: int) -> float:
    """Reads of the asyncio client by TASKS tasks at once; seconds."""

    async def reader() -> None:
        for _ in range(count // TASKS):
            await client.read(PATH)

    async with await Client.connect(socket) as client:
        await client.write(PATH, VALUE)
        start = perf_counter()
        await asyncio.gather(*(reader() for _ in range(TASKS)))
        return perf_counter() - start


def main(load: str, socket: str, count: int) -> float:
    """Microseconds an operation."""
    if load == "tasks":
        return asyncio.run(tasks(socket, count)) / (count // TASKS * TASKS) * 1e6
    with SyncClient.connect(socket) as client:
        client.write(PATH, VALUE)
        start = perf_counter()
        BLOCKING[load](client, count)
        return (perf_counter() - start) / count * 1e6


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
