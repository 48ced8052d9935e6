"""What the guest does with its disk, and what its programs say about it. Knows dd's and fio's words only."""

from __future__ import annotations

import re

from bench.xen.report import Aim
from bench.xen.rounds import Load

MIB = 1 << 20


def _dd_speed(said: str) -> float:
    """MB/s: the bytes, and the uptime before and after, each on a line of its own."""
    size, began, ended = re.findall(r"^([\d.]+)$", said, re.MULTILINE)
    return int(size) / (float(ended) - float(began)) / 1e6


def _fio_iops(said: str) -> float:
    """Of its terse output, version 3: fields 8 and 49 are the reads and writes a second."""
    line = re.findall(r"^3;fio-.*$", said, re.MULTILINE)[0]
    fields = line.split(";")
    assert fields[4] == "0", line  # its error
    return float(fields[7]) + float(fields[48])


def _dd(direction: str, block: str, count: int, size: int) -> str:
    """busybox's dd times nothing; /proc/uptime counts in 10 ms."""
    if direction == "read":
        dd = f"dd if={{}} of=/dev/null bs={block} count={count} iflag=direct"
    else:
        dd = f"dd if=/dev/zero of={{}} bs={block} count={count} oflag=direct conv=notrunc"
    clock = "read t rest </proc/uptime; echo $t"
    return f"echo {size}; {clock}; {dd} 2>/tmp/dd; e=$?; {clock}; [ $e = 0 ] || {{{{ cat /tmp/dd; false; }}}}"


def _fio(how: str, depth: int, seconds: int) -> str:
    return (
        f"fio --name=x --filename={{}} --direct=1 --rw={how} --bs=4k --ioengine=libaio --iodepth={depth} "
        f"--thread --clocksource=clock_gettime --time_based --runtime={seconds} --ramp_time=1 --randseed=7 "
        "--output-format=terse --terse-version=3"
    )


def disk_loads(size: int, seconds: int) -> list[Load]:
    """size: MiB a sequential run goes through; seconds: of a random one."""
    rows = []
    for direction in ("read", "write"):
        for block, blocks in (("1M", 1), ("128k", 8)):
            name = f"sequential {direction}, {block}"
            dd = _dd(direction, block, size * blocks, size * MIB)
            rows.append(Load(name, dd, "MB/s", _dd_speed, Aim("qemu", 0.8)))
    for how in ("randread", "randwrite"):
        for depth in (1, 32):
            name = f"random {how[4:]}, 4k, {depth} in flight"
            rows.append(Load(name, _fio(how, depth, seconds), "IOPS", _fio_iops, Aim("qemu", 0.5)))
    return rows
