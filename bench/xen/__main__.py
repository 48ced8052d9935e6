"""`python -m bench.xen [--quick] [--rounds N] [--only WORD] ...`, in the lab's dom0; see docs/bench.md.

One guest has three disks at the same time, over one file: each load runs on each of them in turn, the order
turned by one each round; what counts is the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

from tests.support.xl_guest import INITRD, XlGuest, xl_guest

from bench.xen.backends import BACKENDS, Served, plugged
from bench.xen.loads import MIB, Load, loads
from xenbus.xenstore.client import Client

STORE = "/dev/xen/xenbus"
IMAGE = Path("/tmp/disk.img")
LOAD_SECONDS = 120.0

Figures = dict[str, dict[str, list[float]]]  # load -> back end -> a figure a round


async def measure(options: argparse.Namespace, rows: list[Load]) -> Figures:
    # All of its pages are there before anything is timed.
    await asyncio.to_thread(IMAGE.write_bytes, bytes(range(256)) * (options.size * MIB >> 8))
    add_fio(Path(INITRD))
    store = await Client.connect(STORE)
    figures: Figures = {row.name: {name: [] for name in options.backends} for row in rows}
    served: dict[str, Served] = {}
    async with AsyncExitStack() as stack:
        guest = await stack.enter_async_context(xl_guest(store, "bench", memory=384))
        print(f"{guest.name} is up after {time.monotonic():.0f} s", flush=True)
        for name in options.backends:
            kind, vdev, serve = BACKENDS[name]
            words = options.words if name == "xbbd" else []
            one = await stack.enter_async_context(serve(guest.domid, IMAGE, options.results, *words))
            served[name] = one
            await stack.enter_async_context(plugged(store, guest.domid, kind, vdev, one.nodes))
            await guest.run(f"until [ -b /dev/{vdev} ]; do sleep 0.1; done", 30.0)
            print(f"{name} serves {vdev} after {time.monotonic():.0f} s", flush=True)
        for number in range(options.rounds):
            names = [options.backends[(number + n) % len(served)] for n in range(len(served))]
            for row in rows:
                for name in names:
                    figures[row.name][name].append(await measured(guest, row, name, served[name]))
        (options.results / "bench-guest.log").write_text(guest.said)
    await store.close()
    return figures


async def measured(guest: XlGuest, row: Load, name: str, served: Served) -> float:
    user, system = served.cpu()
    began = time.monotonic()
    said = await guest.run(row.command.format(dev=f"/dev/{BACKENDS[name][1]}"), LOAD_SECONDS)
    value, seconds = row.read(said), time.monotonic() - began
    user, system = served.cpu()[0] - user, served.cpu()[1] - system
    cpu = f"; the process ran {user:.1f} + {system:.1f} s (user, system)" if served.pid else ""
    print(f"{row.name}: {name} {value:.1f} {row.unit} in {seconds:.1f} s{cpu}", flush=True)
    return value


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


def table(figures: Figures, rows: list[Load]) -> list[dict[str, object]]:
    lines = []
    for row in rows:
        middle = {name: median(values) for name, values in figures[row.name].items() if values}
        line: dict[str, object] = {"load": row.name, "unit": row.unit, "rounds": figures[row.name], **middle}
        for peer in ("qemu", "blkback"):
            if peer in middle and "xbbd" in middle:
                line[f"xbbd/{peer}"] = round(middle["xbbd"] / middle[peer], 3)
        if "xbbd/qemu" in line:
            line["aim"] = row.aim
        lines.append(line)
    return lines


def show(lines: list[dict[str, object]], names: list[str]) -> None:
    ratios = [f"xbbd/{name}" for name in names if name != "xbbd"]
    header = ["load", "unit", *names, *ratios, "aim"]
    cells = [header]
    for line in lines:
        values = [f"{line[name]:.1f}" for name in names]
        cells.append(
            [str(line["load"]), str(line["unit"]), *values, *(f"{line[r]:.2f}" for r in ratios if r in line)]
        )
        if "aim" in line:
            met = "met" if line["xbbd/qemu"] >= line["aim"] else "missed"  # type: ignore[operator]
            cells[-1].append(f">= {line['aim']} of qemu: {met}")
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.xen", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("/results"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it runs")
    parser.add_argument("--only", default="", metavar="WORD", help="loads with this in their names")
    parser.add_argument("--backends", default="xbbd,blkback,qemu", type=lambda text: text.split(","))
    parser.add_argument("--profile", metavar="FILE", help="cProfile's figures of xbbd's process")
    parser.add_argument("--polling", action="store_true", help="xbbd by the polling event loop")
    options = parser.parse_args()
    options.words = ["--polling"] * options.polling
    options.words += ["--profile", options.profile] if options.profile else []
    options.rounds = 1 if options.quick else options.rounds
    options.size = 16 if options.quick else 256
    rows = [row for row in loads(options.size, 2 if options.quick else 5) if options.only in row.name]
    figures = asyncio.run(measure(options, rows))
    lines = table(figures, rows)
    data = {"kernel": platform.release(), "python": platform.python_version(), "rounds": options.rounds}
    (options.results / "bench.json").write_text(json.dumps({**data, "rows": lines}, indent=2) + "\n")
    show(lines, options.backends)
    return 0


if __name__ == "__main__":
    sys.exit(main())
