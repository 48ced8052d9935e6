"""A network device of a guest between two kernels' stacks, beside a veth pair and a plain copier of frames.

Runs bench.net_world in a user namespace; where there are none, it says so and has no rows.
"""

from __future__ import annotations

import json
import subprocess
import sys

from bench.rows import Row

SECONDS = 3.0
# What is measured -> (unit, the least that the pair has to have of the copier's).
_TARGETS = {"packets": ("packets/s", ">= 0.5"), "bytes": ("bytes/s", ">= 1.0")}
_NOTES = {
    "packets": "60-byte frames, one direction",
    "bytes": "one TCP stream; the copier has no offloads",
}


def run(quick: bool) -> list[Row]:
    command = [
        "unshare",
        "-Urn",
        sys.executable,
        "-m",
        "bench.net_world",
        str(SECONDS / 10 if quick else SECONDS),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except FileNotFoundError:
        print("net: left out: unshare is not installed", file=sys.stderr)
        return []
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        print(f"net: left out: {last}", file=sys.stderr)
        return []
    found = json.loads(done.stdout)
    rows = []
    for what, (unit, target) in _TARGETS.items():
        ours, note = found["pair"][what], _NOTES[what]
        floor = found["copier"][what]
        rows.append(Row(f"net {what}, xn to xnb", ours, floor, unit, "a plain copier", target, note))
        rows.append(Row(f"net {what}, two ports joined", found["ports"][what], floor, unit, "a plain copier"))
        if "veth" in found:
            rows.append(Row(f"net {what}, xn to xnb", ours, found["veth"][what], unit, "a veth pair"))
    idle, note = found["pair"]["idle"], "supervisor, store, domain 0 and a guest with a connected pair"
    rows.append(Row("net idle, CPU of the whole host", idle, None, "ms a second", target="<= 2", note=note))
    return rows
