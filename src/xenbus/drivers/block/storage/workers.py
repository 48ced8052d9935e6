"""Threads for disk calls that would block: a bounded pool that never leaves a buffer in use behind.

Knows callables and one event loop. Knows nothing of files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """At most `limit` threads, started when first needed.

    A thread cannot be stopped in a system call. So a cancelled `run` still waits for its thread, and only
    then raises: the caller may unmap its buffer once `run` is over.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._running: set[Future[Any]] = set()

    async def run(self, call: Callable[[], T]) -> T:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._limit, thread_name_prefix=self._name)
        job = self._pool.submit(call)
        self._running.add(job)
        job.add_done_callback(self._running.discard)
        waiter = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            if not job.cancel():
                await _see_out(waiter)
            raise

    async def close(self, seconds: float) -> bool:
        """Let what runs end, then let the threads go. False if something still ran after that time."""
        if self._running:
            await asyncio.wait([asyncio.wrap_future(job) for job in list(self._running)], timeout=seconds)
        if self._running:
            return False
        if self._pool is not None:
            self._pool.shutdown(wait=True)  # at once: its threads are idle
            self._pool = None
        return True


async def _see_out(waiter: asyncio.Future[T]) -> None:
    """Wait for the end of a call whose result nobody wants, however often we are cancelled meanwhile."""
    while not waiter.done():
        try:
            await asyncio.wait([waiter])
        except asyncio.CancelledError:
            continue
    if not waiter.cancelled():
        waiter.exception()
