"""A client that costs next to nothing: a prepared buffer of requests is sent again and again.

Knows a socket and how many bytes have to come back; not what they say, but for the last.
"""

from __future__ import annotations

import socket
from time import perf_counter

from xenbus.xenstore.wire import HEADER_SIZE, Op, encode

PATH, VALUE = b"/bench/node", b"value"


def replay(path: str, depth: int, rounds: int) -> float:
    """Microseconds a read, with `depth` of them in flight."""
    requests = encode(Op.READ, 1, 0, PATH + b"\0") * depth
    expected = (HEADER_SIZE + len(VALUE)) * depth
    replies = bytearray(expected)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(encode(Op.WRITE, 1, 0, PATH + b"\0" + VALUE))
        sock.recv(HEADER_SIZE + len(b"OK\0"), socket.MSG_WAITALL)
        start = perf_counter()
        for _ in range(rounds):
            sock.sendall(requests)
            sock.recv_into(replies, expected, socket.MSG_WAITALL)
        took = perf_counter() - start
    if not replies.endswith(VALUE):
        raise RuntimeError(f"{path}: no replies to reads: {bytes(replies[-64:])!r}")
    return took / (rounds * depth) * 1e6
