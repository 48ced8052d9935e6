"""What the machine itself can do: the floors that our figures stand beside. Imports nothing of ours."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time

from bench.rows import fork, pin

PAGE = 4096
# blkif_request_t of the native ABI: operation, nr_segments, handle, id, sector, and one segment
_REQUEST = struct.Struct("<BBHxxxxQQIBBxx")
_RESPONSE = struct.Struct("<QBxh")
_SLOT = 112


def ping_pong(rounds: int) -> float:
    """Microseconds a round trip between two processes on two CPUs, blocking, over two eventfds."""
    there, back = os.eventfd(0), os.eventfd(0)

    def answer() -> None:
        for _ in range(rounds):
            os.eventfd_read(there)
            os.eventfd_write(back, 1)

    pid = fork(answer, 1)
    before = os.sched_getaffinity(0)
    pin(0)
    start = time.perf_counter()
    for _ in range(rounds):
        os.eventfd_write(there, 1)
        os.eventfd_read(back)
    took = time.perf_counter() - start
    os.waitpid(pid, 0)
    os.sched_setaffinity(0, before)
    os.close(there)
    os.close(back)
    return took / rounds * 1e6


def bare_slots(path: str, requests: int, depth: int = 32) -> float:
    """4 KiB reads a second of one loop that does what both halves have to, and nothing else.

    It packs `depth` requests into slots, takes each out again, preads into its page, packs the response,
    takes it out and copies the page to the caller's buffer: one process, no ring indices, no wake-ups.
    """
    ring, pages = mmap.mmap(-1, 32 * _SLOT), mmap.mmap(-1, depth * PAGE)
    slots, data = memoryview(ring), memoryview(pages)
    page = [data[i * PAGE : (i + 1) * PAGE] for i in range(depth)]
    out = [bytearray(PAGE) for _ in range(depth)]
    file = os.open(path, os.O_RDONLY)
    blocks = os.fstat(file).st_size // PAGE
    before = os.sched_getaffinity(0)
    pin(0)
    start = time.perf_counter()
    done = 0
    while done < requests:
        for i in range(depth):
            sector = (done + i) * 2654435761 % blocks * 8
            _REQUEST.pack_into(slots, i * _SLOT, 0, 1, 0, i, sector, i, 0, 7)
        for i in range(depth):
            _op, _n, _handle, rid, sector, gref, _first, _last = _REQUEST.unpack_from(slots, i * _SLOT)
            os.preadv(file, [page[gref]], sector * 512)
            _RESPONSE.pack_into(slots, i * _SLOT, rid, 0, 0)
        for i in range(depth):
            rid, _op, _status = _RESPONSE.unpack_from(slots, i * _SLOT)
            out[rid][:] = page[rid]
        done += depth
    took = time.perf_counter() - start
    os.sched_setaffinity(0, before)
    os.close(file)
    return done / took


def plain_preadv(path: str, total: int, length: int = 1 << 20) -> float:
    """Bytes a second of preadv in a loop over a cached file into one buffer."""
    buffer = bytearray(length)
    # Touched beforehand: page faults of a fresh buffer are not what is measured.
    ctypes.memset((ctypes.c_char * length).from_buffer(buffer), 1, length)
    file = os.open(path, os.O_RDONLY)
    size = os.fstat(file).st_size
    before = os.sched_getaffinity(0)
    pin(0)
    start = time.perf_counter()
    done = 0
    while done < total:
        done += os.preadv(file, [buffer], done % size)
    took = time.perf_counter() - start
    os.sched_setaffinity(0, before)
    os.close(file)
    return done / took
