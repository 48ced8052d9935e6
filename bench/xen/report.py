"""What a run yields: each load's figures by back end, their medians, and ours as ratios to the others'."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median


@dataclass(slots=True, frozen=True)
class Aim:
    """ratio: the least one to this peer's that is asked of us"""

    peer: str
    ratio: float


@dataclass(slots=True, frozen=True)
class Figure:
    """One load on one back end, once. value: larger is better; seconds: of the whole command; user, system:
    CPU seconds of the process that served it, 0 for the kernel"""

    value: float
    seconds: float
    user: float
    system: float


@dataclass(slots=True)
class Row:
    """A load on all back ends. ours: the one whose ratios count; failed: how often it came to nothing"""

    load: str
    unit: str
    ours: str
    aim: Aim | None = None
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def add(self, backend: str, figure: Figure) -> None:
        self.figures.setdefault(backend, []).append(figure)

    def fail(self, backend: str) -> None:
        self.failed[backend] = self.failed.get(backend, 0) + 1

    def median(self, backend: str) -> float | None:
        """None if it was not measured."""
        figures = self.figures.get(backend, [])
        return median(figure.value for figure in figures) if figures else None

    def ratio(self, peer: str) -> float | None:
        """Ours to the peer's; None if one of both was not measured, or nothing came of the peer's."""
        ours, its = self.median(self.ours), self.median(peer)
        return ours / its if ours is not None and its else None

    def verdict(self) -> str:
        if self.aim is None or (ratio := self.ratio(self.aim.peer)) is None:
            return ""
        met = "met" if ratio >= self.aim.ratio else "missed"
        return f">= {self.aim.ratio} of {self.aim.peer}: {met}"


def as_json(rows: Sequence[Row], rounds: int) -> str:
    machine = {"kernel": platform.release(), "python": platform.python_version(), "rounds": rounds}
    data = []
    for row in rows:
        medians = {name: row.median(name) for name in row.figures}
        ratios = {name: row.ratio(name) for name in row.figures if name != row.ours}
        data.append({**asdict(row), "medians": medians, "ratios": ratios})
    return json.dumps({"machine": machine, "rows": data}, indent=2) + "\n"


def as_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Of loads on the same back ends, by their names."""
    ours = rows[0].ours
    peers = [name for name in names if name != ours and ours in names]
    lines = [("load", "unit", *names, *(f"{ours}/{name}" for name in peers), "aim")]
    for row in rows:
        medians = [_shown(row.median(name), 1) for name in names]
        ratios = [_shown(row.ratio(name), 2) for name in peers]
        lines.append((row.load, row.unit, *medians, *ratios, row.verdict()))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (zip(line, widths, strict=True) for line in lines)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in cells).rstrip() for cells in padded)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
