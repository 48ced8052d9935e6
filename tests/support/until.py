"""Wait for something that has no event of its own, with a deadline; and what this process has open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path


async def until(condition: Callable[[], object], seconds: float = 5.0, every: float = 0.001) -> None:
    """Return once it holds, which is looked at `every` so many seconds. TimeoutError after that time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(every)


def descriptors() -> set[str]:
    """The numbers of the open descriptors (the one that lists them included, as always the same)."""
    return {path.name for path in Path("/proc/self/fd").iterdir()}
