"""A store of 100 000 nodes and 10 000 watches beside an empty one: what a write costs a client of each.

Knows names and sockets. No watch is on a node that is written, nor above it.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from time import perf_counter

from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.wire import HEADER_SIZE, Op, encode

NODES, WATCHES = 100_000, 10_000
SIBLINGS = 1000
# Bytes.
ACK = HEADER_SIZE + len(b"OK\0")


def node(i: int) -> bytes:
    return b"/bench/%d/%d" % (i // SIBLINGS, i)


def watched(i: int) -> bytes:
    return b"/elsewhere/%d" % i


def sample(nodes: int, count: int) -> Iterator[bytes]:
    """Paths of nodes by chance, the same ones each time."""
    dice = random.Random(count)
    return (node(dice.randrange(nodes)) for _ in range(count))


def fill(client: SyncClient, nodes: int, watches: int) -> None:
    """The watches are the client's."""
    for i in range(nodes):
        client.write(node(i).decode(), b"value")
    for i in range(watches):
        client.watch(watched(i).decode())


def write(path: str, nodes: int, count: int) -> float:
    """Microseconds a write, one in flight."""
    requests = [encode(Op.WRITE, 1, 0, name + b"\0value") for name in sample(nodes, count)]
    reply = bytearray(ACK)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        start = perf_counter()
        for request in requests:
            sock.send(request)
            sock.recv_into(reply, ACK, socket.MSG_WAITALL)
        took = perf_counter() - start
    if not reply.endswith(b"OK\0"):
        raise RuntimeError(f"{path}: a write was answered {bytes(reply)!r}")
    return took / count * 1e6
