"""Runs a module and notes where its CPU time goes: `python -m bench.xen.sampler FILE MODULE [ARGUMENTS]`.

By samples, one for each tick that the process ran: cProfile makes Python under emulation several times
slower, and then shows itself. FILE gets the shares of functions, and of lines; what imports cost is left out.
Knows no module.
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

TICK = 0.004  # seconds; Debian's kernels count CPU time in no smaller ones
SHOWN = 45


class Sampler:
    """own: samples by function and line that ran; with_callees: by function that ran or waited for it"""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.with_callees: Counter[str] = Counter()

    def sample(self, _number: int, frame: FrameType | None) -> None:
        stack = []
        while frame is not None:
            stack.append((_function(frame), frame.f_lineno))
            frame = frame.f_back
        if any("importlib" in function for function, _ in stack):
            return
        self.own[stack[0][0]] += 1
        self.lines[f"{stack[0][0]}:{stack[0][1]}"] += 1
        self.with_callees.update({function for function, _ in stack})

    def text(self) -> str:
        total = sum(self.own.values()) or 1
        parts = [f"{total} samples of {TICK * 1000:.0f} ms\n"]
        for title, counts in (
            ("functions, what they call included", self.with_callees),
            ("functions alone", self.own),
            ("lines alone", self.lines),
        ):
            parts.append(f"\n{title}\n" + "".join(_rows(counts.most_common(SHOWN), total)))
        return "".join(parts)


def _function(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_filename.removeprefix('/xenbus/src/xenbus/')} {code.co_name}"


def _rows(counts: Iterable[tuple[str, int]], total: int) -> Iterable[str]:
    for what, count in counts:
        yield f"{100 * count / total:6.1f} %  {what}\n"


def main() -> None:
    path, module, *arguments = sys.argv[1:]
    sampler = Sampler()
    signal.signal(signal.SIGPROF, sampler.sample)
    signal.setitimer(signal.ITIMER_PROF, TICK, TICK)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        Path(path).write_text(sampler.text())


if __name__ == "__main__":
    main()
