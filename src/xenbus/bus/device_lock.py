"""A device's lock, which is there only while somebody wants it: 10 000 devices at rest have none.

Knows where it is kept; knows nothing of devices.
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class PassingLock(asyncio.Lock):
    """users: who hold it or wait for it"""

    users = 0


class Lockable(Protocol):
    lock: PassingLock | None


class Locked:
    """`async with Locked(thing)`."""

    __slots__ = ("_thing",)

    def __init__(self, thing: Lockable) -> None:
        self._thing = thing

    async def __aenter__(self) -> None:
        lock = self._thing.lock
        if lock is None:
            lock = self._thing.lock = PassingLock()
        lock.users += 1
        try:
            await lock.acquire()
        except BaseException:
            self._leave(lock)
            raise

    async def __aexit__(self, *exc: object) -> None:
        lock = self._thing.lock
        assert lock is not None
        lock.release()
        self._leave(lock)

    def _leave(self, lock: PassingLock) -> None:
        lock.users -= 1
        if not lock.users:
            self._thing.lock = None
