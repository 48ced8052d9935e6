"""pyxs: `python -m bench.xenstore.pyxs_client LOAD SOCKET COUNT` prints microseconds an operation.

The loads of libxenstore.c and ours.py, by the same names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pyxs  # type: ignore[import-untyped]

PATH, VALUE = b"/bench/node", b"value"


def read(client: Any, count: int) -> float:
    start = perf_counter()
    for _ in range(count):
        client.read(PATH)
    return perf_counter() - start


def watch(client: Any, count: int) -> float:
    """A write, and the wait for its event."""
    with client.monitor() as monitor:
        monitor.watch(PATH, b"token")
        events = monitor.wait()
        next(events)
        start = perf_counter()
        for _ in range(count):
            client.write(PATH, VALUE)
            next(events)
        return perf_counter() - start


LOADS: dict[str, Callable[[Any, int], float]] = {"read": read, "watch": watch}

if __name__ == "__main__":
    with pyxs.Client(unix_socket_path=sys.argv[2]) as client:
        client.write(PATH, VALUE)
        print(LOADS[sys.argv[1]](client, int(sys.argv[3])) / int(sys.argv[3]) * 1e6)
