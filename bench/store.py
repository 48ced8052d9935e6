"""The store: daemon, clients and engine, each beside Debian's own, all on one CPU.

Which rows there are, and what their aims are. How a load is run is in bench/xenstore.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.rows import Row, best, pin
from bench.xenstore import clients, daemons, engine, raw, scale
from bench.xenstore.daemons import Store
from bench.xenstore.ours import TASKS
from xenbus.xenstore.sync import SyncClient

ROUNDS = 10
DEPTH = 128

# A side of a row: microseconds an operation, measured once.
Side = Callable[[], float]


def run(quick: bool) -> list[Row]:
    count = 500 if quick else 5_000
    with _one_cpu(), tempfile.TemporaryDirectory(prefix="xb-") as name:
        folder = Path(name)
        rows = engine.run(quick)
        with daemons.ours(folder / "ours") as ours:
            rows += _large(folder / "large", ours, count)
            if reason := daemons.missing():
                return [*rows, Row.skip("beside C xenstored", reason)]
            with daemons.theirs(folder / "c") as theirs:
                rows += _in_flight(ours, theirs, count)
                rows += _libxenstore(folder, ours, theirs, count)
                rows += _pyxs(theirs, count)
                rows += _test_xenstore(ours, theirs, count // 5)
    return rows


@contextmanager
def _one_cpu() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    pin(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _alternate(*sides: Side) -> list[float]:
    """The best of ROUNDS turns of each side, in microseconds; the sides take turns."""
    turns: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, times in zip(sides, turns, strict=True):
            times.append(side())
    return [best(times) for times in turns]


def _rates(name: str, ours: Side, peer: Side, peer_name: str, target: str) -> Row:
    """A row of thousands a second."""
    mine, other = _alternate(ours, peer)
    return Row(name, 1e3 / mine, 1e3 / other, "k/s", peer_name, target)


def _large(folder: Path, empty: Store, count: int) -> list[Row]:
    with daemons.ours(folder) as large, SyncClient.connect(large.socket) as client:
        scale.fill(client, scale.NODES, scale.WATCHES)
        with SyncClient.connect(empty.socket) as other:
            scale.fill(other, 1, 0)
        mine, floor = _alternate(
            partial(scale.write, large.socket, scale.NODES, count),
            partial(scale.write, empty.socket, 1, count),
        )
    name = f"write, {scale.NODES} nodes, {scale.WATCHES} watches"
    return [Row(name, mine, floor, "us", "empty store", "<= 1.5")]


def _in_flight(ours: Store, theirs: Store, count: int) -> list[Row]:
    def replay(store: Store) -> Side:
        return partial(raw.replay, store.socket, DEPTH, count // 10)

    name = f"raw client, {DEPTH} reads in flight"
    return [_rates(name, replay(ours), replay(theirs), "on C xenstored", ">= 4")]


def _libxenstore(folder: Path, ours: Store, theirs: Store, count: int) -> list[Row]:
    """Its client on both daemons, then both clients on the C daemon."""
    if reason := clients.no_libxenstore():
        return [Row.skip("libxenstore", reason)]
    program = clients.build(folder)

    def library(store: Store, load: str) -> Side:
        return partial(clients.libxenstore, program, store, load, count)

    def blocking(load: str) -> Side:
        return partial(clients.python, "ours", theirs, load, count)

    return [
        *(
            _rates(
                f"libxenstore: {load}", library(ours, load), library(theirs, load), "on C xenstored", target
            )
            for load, target in (("read", ">= 1.1"), ("write", ">= 1"), ("transaction", ""))
        ),
        *(
            _rates(f"blocking client: {load}", blocking(load), library(theirs, load), "libxenstore", ">= 1")
            for load in ("read", "transaction")
        ),
    ]


def _pyxs(theirs: Store, count: int) -> list[Row]:
    if reason := clients.no_pyxs():
        return [Row.skip("pyxs", reason)]

    def ours(load: str) -> Side:
        return partial(clients.python, "ours", theirs, load, count)

    def pyxs(load: str) -> Side:
        return partial(clients.python, "pyxs_client", theirs, load, count // 2)

    watch, their_watch = _alternate(ours("watch"), pyxs("watch"))
    return [
        _rates(f"asyncio client, {TASKS} tasks: read", ours("tasks"), pyxs("read"), "pyxs", ">= 2.5"),
        Row("blocking client: write to event", watch, their_watch, "us", "pyxs", "<= 0.5"),
    ]


def _test_xenstore(ours: Store, theirs: Store, count: int) -> list[Row]:
    """Each subtest by itself."""
    if reason := clients.no_test_xenstore():
        return [Row.skip("test-xenstore", reason)]
    rows = []
    for name in clients.subtests():
        sides = (partial(clients.test_xenstore, store, name, count) for store in (ours, theirs))
        mine, other = _alternate(*sides)
        rows.append(Row(f"test-xenstore: {name}", mine, other, "us", "on C xenstored", "<= 1.05"))
    return rows
