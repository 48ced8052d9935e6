"""An event loop's selector that looks for a moment before it sleeps: waking a sleeping CPU costs more.

Knows selectors only. For domain processes: `asyncio.Runner(loop_factory=polling_loop)`. As the kernel's
halt polling for guests (Documentation/virt/kvm/halt-polling.rst) it adapts: it polls only while the last
waits were short, so that an idle domain does not spin.
"""

from __future__ import annotations

import asyncio
import os
import selectors
from time import perf_counter
from typing import Final

# Longest look, in seconds; a wake-up across CPUs of a virtual machine takes some 25 us.
WINDOW: Final = 60e-6
# So many waits that were too long for polling end it.
_PATIENCE: Final = 3


class PollingSelector(selectors.EpollSelector):
    """`window`: seconds of polling at most before a wait; 0 never polls."""

    def __init__(self, window: float = WINDOW) -> None:
        super().__init__()
        # With one CPU the one we wait for cannot run while we look. (Two that are pinned to the same one of
        # several cost each other little, by the yield below.)
        self._window = window if (os.cpu_count() or 1) > 1 else 0.0
        self._worth = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """A wait that turns out short makes the next ones poll; a few long ones in a row end it."""
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        began = perf_counter()
        if self._worth:
            until = began + (self._window if timeout is None else min(self._window, timeout))
            while perf_counter() < until:
                ready = super().select(0)
                if ready:
                    self._worth = _PATIENCE
                    return ready
                os.sched_yield()  # whoever we wait for may want this CPU
            if timeout is not None:
                timeout = max(0.0, began + timeout - perf_counter())
        ready = super().select(timeout)
        if perf_counter() - began < 2 * self._window:
            self._worth = _PATIENCE
        elif self._worth:
            self._worth -= 1
        return ready


def polling_loop() -> asyncio.SelectorEventLoop:
    """A loop factory for asyncio.Runner, for processes that answer rings."""
    return asyncio.SelectorEventLoop(PollingSelector())
