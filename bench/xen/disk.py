"""A guest's disks: one guest has all of them at the same time, over one file."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from tests.support.xl_guest import xl_guest

from bench.xen.disk_backends import BACKENDS, DEFAULT, disk
from bench.xen.disk_loads import MIB, disk_loads
from bench.xen.rounds import LOAD_SECONDS, Load, Part, Served, Turns, say
from xenbus.xenstore.client import Client

STORE = "/dev/xen/xenbus"
IMAGE = Path("/tmp/disk.img")


def _size(quick: bool) -> int:
    return 16 if quick else 128  # MiB


def loads(quick: bool) -> list[Load]:
    return disk_loads(_size(quick), 2 if quick else 4)


async def measure(options: Namespace, names: Sequence[str], turns: Turns) -> None:
    # All of its pages are there before anything is timed.
    await asyncio.to_thread(IMAGE.write_bytes, bytes(range(256)) * (_size(options.quick) * MIB >> 8))
    served: dict[str, Served] = {}
    async with await Client.connect(STORE) as store, AsyncExitStack() as stack:
        guest = await stack.enter_async_context(xl_guest(store, "disks", memory=384))
        say(f"{guest.name} is up")
        for name in names:
            made = disk(store, guest.domid, name, IMAGE, options)
            served[name] = await stack.enter_async_context(made)
            device = served[name].at
            await guest.run(f"until [ -b {device} ]; do sleep 0.1; done", 30.0)
            # Before anything is timed: the pages that stay mapped are.
            await guest.run(f"dd if={device} of=/dev/null bs=1M count=16 iflag=direct", LOAD_SECONDS)
            say(f"{name} serves {device}")
        await turns.run(guest, served)
        (options.results / f"{guest.name}.log").write_text(guest.said)
    IMAGE.unlink()


DISK = Part("xbbd", BACKENDS, DEFAULT, "fio", loads, measure)
