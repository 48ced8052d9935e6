"""The engine without I/O: what a request costs in an empty store, among watches, and in a large one.

Knows the engine and messages. Taking the reply off the queue is part of the time.
"""

from __future__ import annotations

import gc
from time import perf_counter

from bench.rows import Row, best
from bench.xenstore.scale import NODES, WATCHES, node, sample, watched
from xenbus.xenstore.engine import Connection, Engine
from xenbus.xenstore.wire import Message, Op

RUNS = 5
FEW = 1000


class Filled:
    """An engine with one client, nodes, and watches of somebody else that no write is for."""

    def __init__(self, nodes: int = FEW, watches: int = 0) -> None:
        self.nodes = nodes
        self.engine = Engine()
        self.client = self.engine.connect(0)
        for i in range(nodes):
            self._ask(self.client, Op.WRITE, node(i) + b"\0value")
        other = self.engine.connect(0)
        for i in range(watches):
            self._ask(other, Op.WATCH, watched(i) + b"\0%d\0" % i)

    def _ask(self, conn: Connection, op: Op, payload: bytes) -> None:
        self.engine.handle(conn, Message(op, 1, 0, payload))
        conn.take()
        self.engine.take_dirty()

    def time(self, op: Op, tail: bytes, count: int) -> float:
        """Microseconds a request, each for a node that chance names."""
        messages = [Message(op, 1, 0, path + tail) for path in sample(self.nodes, count)]
        handle, take, client = self.engine.handle, self.client.take, self.client
        start = perf_counter()
        for message in messages:
            handle(client, message)
            take()
        return (perf_counter() - start) / count * 1e6


def run(quick: bool) -> list[Row]:
    count = 5_000 if quick else 50_000
    few, among, large = Filled(), Filled(watches=1000), Filled(NODES, WATCHES)
    gc.collect()
    cases = {
        "read": (few, Op.READ, b"\0"),
        "write": (few, Op.WRITE, b"\0value"),
        "among": (among, Op.WRITE, b"\0value"),
        "large": (large, Op.WRITE, b"\0value"),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(RUNS):
        for name, (filled, op, tail) in cases.items():
            times[name].append(filled.time(op, tail, count))
    found = {name: best(runs) for name, runs in times.items()}
    return [
        Row("engine alone: read", found["read"], None, "us", target="<= 1.5"),
        Row("engine alone: write, 1000 watches elsewhere", found["among"], None, "us", target="<= 5"),
        Row(
            f"engine alone: write, {NODES} nodes, {WATCHES} watches",
            found["large"],
            found["write"],
            "us",
            f"{FEW} nodes, no watch",
        ),
    ]
