"""asyncio only logs what a callback raised, or a task that nobody awaits: no test may overlook it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_unhandled() -> Iterator[None]:
    """AssertionError if one of the running loop's callbacks or tasks raised meanwhile."""
    loop = asyncio.get_running_loop()
    found: list[str] = []
    before = loop.get_exception_handler()

    def note(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        found.append(f"{context['message']}: {context.get('exception')!r}")
        loop.default_exception_handler(context)

    loop.set_exception_handler(note)
    try:
        yield
    finally:
        loop.set_exception_handler(before)
    assert found == []
