"""What a run yields: each load's figures by back end, their medians, and ours as ratios to the others'."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

OURS = "xbbd"


@dataclass(slots=True, frozen=True)
class Figure:
    """One load on one disk, once. value: larger is better; seconds: of the whole command; user, system: CPU
    seconds of the process that served it, 0 for the kernel"""

    value: float
    seconds: float
    user: float
    system: float


@dataclass(slots=True)
class Row:
    """A load on all disks. aim: the least ratio to QEMU's that is asked of us"""

    load: str
    unit: str
    aim: float
    figures: dict[str, list[Figure]] = field(default_factory=dict)

    def add(self, backend: str, figure: Figure) -> None:
        self.figures.setdefault(backend, []).append(figure)

    def median(self, backend: str) -> float:
        return median(figure.value for figure in self.figures[backend])

    def ratio(self, peer: str) -> float | None:
        """Ours to the peer's; None if one of both was not measured."""
        if peer == OURS or not {peer, OURS} <= set(self.figures):
            return None
        return self.median(OURS) / self.median(peer)

    def verdict(self) -> str:
        ratio = self.ratio("qemu")
        if ratio is None:
            return ""
        return f">= {self.aim} of qemu: {'met' if ratio >= self.aim else 'missed'}"


def as_json(rows: Sequence[Row], rounds: int) -> str:
    machine = {"kernel": platform.release(), "python": platform.python_version(), "rounds": rounds}
    data = []
    for row in rows:
        medians = {name: row.median(name) for name in row.figures}
        ratios = {name: row.ratio(name) for name in row.figures if name != OURS}
        data.append({**asdict(row), "medians": medians, "ratios": ratios})
    return json.dumps({"machine": machine, "rows": data}, indent=2) + "\n"


def as_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    peers = [name for name in names if name != OURS and OURS in names]
    lines = [("load", "unit", *names, *(f"{OURS}/{name}" for name in peers), "aim")]
    for row in rows:
        if not set(names) <= set(row.figures):
            continue
        medians = [f"{row.median(name):.1f}" for name in names]
        ratios = [f"{row.ratio(name):.2f}" for name in peers]
        lines.append((row.load, row.unit, *medians, *ratios, row.verdict()))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (zip(line, widths, strict=True) for line in lines)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in cells).rstrip() for cells in padded)
