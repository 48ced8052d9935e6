"""`python -m bench.xen [--quick] [--rounds N] [--only WORD] [--backends A,B]`, in the lab's dom0.

One guest has three disks at the same time, over one file: each load runs on each of them in turn, the order
turned by one each round; what counts is the median of the rounds. See docs/bench.md.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from tests.support.xl_guest import INITRD, XlGuest, xl_guest

from bench.xen.backends import BACKENDS, DEFAULT, Served, plugged
from bench.xen.loads import MIB, Load, loads
from bench.xen.report import Figure, Row, as_json, as_table
from xenbus.xenstore.client import Client

STORE = "/dev/xen/xenbus"
IMAGE = Path("/tmp/disk.img")
LOAD_SECONDS = 120.0


async def measure(options: argparse.Namespace, wanted: Sequence[Load], rows: Sequence[Row]) -> None:
    # All of its pages are there before anything is timed.
    await asyncio.to_thread(IMAGE.write_bytes, bytes(range(256)) * (options.size * MIB >> 8))
    add_fio(Path(INITRD))
    store = await Client.connect(STORE)
    served: dict[str, Served] = {}
    async with AsyncExitStack() as stack:
        guest = await stack.enter_async_context(xl_guest(store, "bench", memory=384))
        say(f"{guest.name} is up")
        for name in options.backends:
            kind, vdev, serve = BACKENDS[name]
            served[name] = await stack.enter_async_context(serve(guest.domid, IMAGE, options.results))
            await stack.enter_async_context(plugged(store, guest.domid, kind, vdev, served[name].nodes))
            await guest.run(f"until [ -b /dev/{vdev} ]; do sleep 0.1; done", 30.0)
            # Before anything is timed: the pages that stay mapped are.
            await guest.run(f"dd if=/dev/{vdev} of=/dev/null bs=1M count=16 iflag=direct", LOAD_SECONDS)
            say(f"{name} serves {vdev}")
        for number in range(options.rounds):
            names = [options.backends[(number + n) % len(served)] for n in range(len(served))]
            for load, row in zip(wanted, rows, strict=True):
                for name in names:
                    row.add(name, await measured(guest, load, name, served[name]))
        (options.results / "bench-guest.log").write_text(guest.said)
    await store.close()


async def measured(guest: XlGuest, load: Load, name: str, served: Served) -> Figure:
    user, system = served.cpu()
    began = time.monotonic()
    said = await guest.run(load.command.format(dev=f"/dev/{BACKENDS[name][1]}"), LOAD_SECONDS)
    seconds, then = time.monotonic() - began, served.cpu()
    figure = Figure(load.read(said), seconds, then[0] - user, then[1] - system)
    cpu = f", its process ran {figure.user:.1f} + {figure.system:.1f} s (user, system)" if served.pid else ""
    say(f"{load.name}: {name} {figure.value:.1f} {load.unit} in {seconds:.1f} s{cpu}")
    return figure


def add_fio(initrd: Path) -> None:
    """fio and the libraries it asks for, appended to the guest's initrd."""
    said = subprocess.run(["ldd", "/bin/fio"], capture_output=True, text=True, check=True).stdout
    files = {Path("/bin/fio"), *(Path(word) for word in said.split() if word.startswith("/"))}
    parents = {parent for file in files for parent in file.parents} - {Path("/")}
    names = "".join(f"{str(path).lstrip('/')}\n" for path in [*sorted(parents), *sorted(files)])
    with initrd.open("ab") as out:
        out.write(bytes(-out.tell() % 4))
        out.flush()
        command = ["busybox", "cpio", "-o", "-L", "-H", "newc"]
        subprocess.run(command, input=names.encode(), stdout=out, stderr=subprocess.PIPE, cwd="/", check=True)


def say(text: str) -> None:
    print(f"{time.monotonic():6.1f} {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.xen", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("/results"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it runs")
    parser.add_argument("--only", default="", metavar="WORD", help="loads with this in their names")
    parser.add_argument("--backends", default=list(DEFAULT), type=lambda text: text.split(","), metavar="A,B")
    options = parser.parse_args()
    options.rounds = 1 if options.quick else options.rounds
    options.size = 16 if options.quick else 128  # MiB
    wanted = [load for load in loads(options.size, 2 if options.quick else 4) if options.only in load.name]
    rows = [Row(load.name, load.unit, load.aim) for load in wanted]
    try:
        asyncio.run(measure(options, wanted, rows))
    finally:  # also what a run that was too slow came to
        (options.results / "bench.json").write_text(as_json(rows, options.rounds))
        print(as_table(rows, options.backends))
    return 0


if __name__ == "__main__":
    sys.exit(main())
