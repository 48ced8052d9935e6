"""How long a person waits for `xenbus --help`, beside a bare interpreter."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

from bench.rows import Row, best


def _milliseconds(command: list[str], runs: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return (time.perf_counter() - start) * 1e3

    once()
    return best(once() for _ in range(runs))


def run(quick: bool) -> list[Row]:
    runs = 3 if quick else 15
    command = shutil.which("xenbus", path=str(sys.prefix) + "/bin") or "xenbus"
    ours = _milliseconds([command, "--help"], runs)
    bare = _milliseconds([sys.executable, "-c", "pass"], runs)
    return [
        Row(
            "xenbus --help", ours, None, "ms", target="<= 150", note=f"a bare interpreter takes {bare:.0f} ms"
        ),
    ]
