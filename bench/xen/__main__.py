"""`python -m bench.xen [disk] [net] [--quick] [--rounds N] [--only WORD] ...`, in the lab's dom0.

One guest has a device of each back end at the same time: each load runs on each of them in turn, the order
turned by one each round; what counts is the median of the rounds. See docs/bench.md.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.xl_guest import INITRD

from bench.xen.disk import DISK
from bench.xen.net import NET
from bench.xen.report import Row, as_json, as_table
from bench.xen.rounds import Part, Turns

PARTS = {"disk": DISK, "net": NET}


def backends(options: argparse.Namespace, part: Part) -> list[str]:
    """Those of this part that were asked for."""
    return (
        [name for name in options.backends if name in part.backends] if options.backends else [*part.default]
    )


def measure(options: argparse.Namespace, part: Part, rows: list[Row]) -> None:
    """Adds its rows and prints them, also those of a run that was too slow."""
    names = backends(options, part)
    loads = [load for load in part.loads(options.quick) if options.only in load.name]
    if not names or not loads:
        return
    own = [Row(load.name, load.unit, part.ours, load.aim) for load in loads]
    rows += own
    try:
        add_program(Path(INITRD), part.program)
        asyncio.run(part.measure(options, names, Turns(loads, own, options.rounds)))
    finally:
        print(as_table(own, names), flush=True)


def add_program(initrd: Path, name: str) -> None:
    """A program of dom0's and the libraries it asks for, appended to the guest's initrd."""
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"no {name} in this dom0: its package belongs into VARIANTS of tools/xen/image.py")
    program = Path("/bin", name)
    said = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
    files = {program, *(Path(word) for word in said.split() if word.startswith("/"))}
    parents = {parent for file in files for parent in file.parents} - {Path("/")}
    names = "".join(f"{str(path).lstrip('/')}\n" for path in [*sorted(parents), *sorted(files)])
    with initrd.open("ab") as out:
        out.write(bytes(-out.tell() % 4))
        out.flush()
        command = ["busybox", "cpio", "-o", "-L", "-H", "newc"]
        subprocess.run(command, input=names.encode(), stdout=out, stderr=subprocess.PIPE, cwd="/", check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.xen", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)} (all)")
    parser.add_argument("--results", type=Path, default=Path("/results"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it runs")
    parser.add_argument("--only", default="", metavar="WORD", help="loads with this in their names")
    parser.add_argument("--backends", default=[], type=lambda text: text.split(","), metavar="A,B")
    parser.add_argument("--profile", action="store_true", help="where our daemon's CPU time goes, too")
    options = parser.parse_args()
    options.rounds = 1 if options.quick else options.rounds
    known = {name for part in PARTS.values() for name in part.backends}
    for what, names, those in (("part", options.parts, {*PARTS}), ("back end", options.backends, known)):
        if absent := set(names) - those:
            parser.error(f"no {what} {sorted(absent)[0]!r}; there are {', '.join(sorted(those))}")
    rows: list[Row] = []
    try:
        for name in options.parts or PARTS:
            measure(options, PARTS[name], rows)
    finally:
        (options.results / "bench.json").write_text(as_json(rows, options.rounds))
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
