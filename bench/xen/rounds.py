"""Loads on a guest's devices, each on every back end in turn, and what came of them.

Knows a guest's shell and the CPU time of a process; knows no kind of device.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.xl_guest import XlGuest

from bench.xen.report import Aim, Figure, Row

LOAD_SECONDS = 120.0
ALIVE_SECONDS = 30.0  # for a guest to answer after a load that failed


@dataclass(slots=True, frozen=True)
class Load:
    """name; command: shell, with {} for where the back end's device is; unit; read: the figure, larger is
    better, out of what it said; aim: what is asked of us"""

    name: str
    command: str
    unit: str
    read: Callable[[str], float]
    aim: Aim | None = None


@dataclass(slots=True, frozen=True)
class Served:
    """at: where the guest finds what is served; pid: who serves it, 0 for the kernel"""

    at: str
    pid: int = 0

    def cpu(self) -> tuple[float, float]:
        """Seconds that it ran so far, in user space and in its kernel's (proc(5), stat)."""
        if not self.pid:
            return 0.0, 0.0
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return int(fields[11]) / ticks, int(fields[12]) / ticks


@dataclass(slots=True, frozen=True)
class Part:
    """One kind of device. ours: the back end whose ratios count

    backends: all by name; default: those of a run that names none
    program:  what makes the loads; the guest gets dom0's
    loads:    of a run that is quick, or is not
    measure:  makes a guest, plugs it into the back ends of these names, then `Turns.run`
    """

    ours: str
    backends: Mapping[str, object]
    default: Sequence[str]
    program: str
    loads: Callable[[bool], list[Load]]
    measure: Callable[[Namespace, Sequence[str], Turns], Coroutine[Any, Any, None]]


class Turns:
    """`count` rounds; the order of the back ends is turned by one each round."""

    def __init__(self, loads: Sequence[Load], rows: Sequence[Row], count: int) -> None:
        self._loads = loads
        self._rows = rows
        self._count = count

    async def run(
        self,
        guest: XlGuest,
        served: Mapping[str, Served],
        around: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
    ) -> None:
        """around: what runs in dom0 during each load. A load that fails is said and counted, and the next one
        comes; AssertionError if the guest does not answer any more."""
        names = list(served)
        for number in range(self._count):
            at = number % len(names)
            for load, row in zip(self._loads, self._rows, strict=True):
                for name in names[at:] + names[:at]:
                    try:
                        async with around():
                            row.add(name, await measured(guest, load, name, served[name]))
                    except (AssertionError, ValueError, LookupError) as error:
                        row.fail(name)
                        say(f"{load.name}: {name} FAILED: {type(error).__name__}: {error}")
                        await guest.run("true", ALIVE_SECONDS)


async def measured(guest: XlGuest, load: Load, name: str, served: Served) -> Figure:
    user, system = served.cpu()
    began = time.monotonic()
    said = await guest.run(load.command.format(served.at), LOAD_SECONDS)
    seconds, then = time.monotonic() - began, served.cpu()
    figure = Figure(load.read(said), seconds, then[0] - user, then[1] - system)
    cpu = f", its process ran {figure.user:.1f} + {figure.system:.1f} s (user, system)" if served.pid else ""
    say(f"{load.name}: {name} {figure.value:.1f} {load.unit} in {seconds:.1f} s{cpu}")
    return figure


def say(text: str) -> None:
    print(f"{time.monotonic():6.1f} {text}", flush=True)
