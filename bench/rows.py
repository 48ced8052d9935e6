"""What a benchmark yields, and how it is shown. Knows nothing of what is measured."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

# The two CPUs that everything is pinned to; a machine of one runs all on it and says so.
CPUS = sorted(os.sched_getaffinity(0))[:2]


@dataclass(slots=True, frozen=True)
class Row:
    """One figure and its floor.

    ratio:  ours to the floor's, so that smaller or larger is better as `target` says
    target: in words, "<= 2.2" or ">= 0.5"
    skipped: why there is no figure
    """

    name: str
    ours: float
    floor: float | None
    unit: str
    floor_name: str = ""
    target: str = ""
    note: str = ""
    skipped: str = ""

    @classmethod
    def skip(cls, name: str, reason: str) -> Row:
        return cls(name, 0.0, None, "", skipped=reason)

    @property
    def ratio(self) -> float | None:
        return self.ours / self.floor if self.floor else None

    @property
    def met(self) -> bool | None:
        if not self.target:
            return None
        sign, limit = self.target.split()
        value = self.ratio if self.floor is not None else self.ours
        assert value is not None
        return value <= float(limit) if sign == "<=" else value >= float(limit)


def pin(which: int) -> None:
    """Bind this process to the first (0) or second (1) CPU of the benchmark."""
    os.sched_setaffinity(0, {CPUS[which % len(CPUS)]})


def fork(child: Callable[[], None], which: int) -> int:
    """Run `child` in another process on CPU `which`; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        pin(which)
        child()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def show(rows: Sequence[Row], *, as_json: bool) -> None:
    if as_json:
        machine = {"python": platform.python_version(), "system": platform.platform(), "cpus": CPUS}
        data = [asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows]
        print(json.dumps({"machine": machine, "rows": data}, indent=2))
        return
    header = ("what", "ours", "floor or peer", "ratio", "aim", "")
    lines = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in rows:
        if row.note:
            print(f"{row.name}: {row.note}")


def _cells(row: Row) -> tuple[str, ...]:
    if row.skipped:
        return (row.name, "-", "-", "-", "", f"skipped: {row.skipped}")
    floor = f"{row.floor:.4g} {row.unit} ({row.floor_name})" if row.floor is not None else "-"
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else "-"
    met = {True: "met", False: "missed", None: ""}[row.met]
    return (row.name, f"{row.ours:.4g} {row.unit}", floor, ratio, row.target, met)


def best(runs: Iterable[float], *, lowest: bool = True) -> float:
    """The best of several runs: on a shared machine the least disturbed one says most."""
    return min(runs) if lowest else max(runs)
