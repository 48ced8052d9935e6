"""When to try a lost store again. No clock, no I/O: the two links do the waiting and the dialling."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Reconnect:
    """When to try a lost store again.

    base, cap: seconds; the pause before try n is random within half of, and, min(cap, base * 2**n)
    deadline:  seconds after the loss until it is given up; inf: never
    """

    base: float = 0.05
    cap: float = 5.0
    deadline: float = 300.0

    def pause(self, tried: int, elapsed: float, jitter: float) -> float | None:
        """Seconds before the next try, after `tried` of them and `elapsed` seconds; None: give up.
        `jitter` is a random number of [0, 1)."""
        left = self.deadline - elapsed
        if left <= 0:
            return None
        return min(left, (0.5 + jitter / 2) * min(self.cap, self.base * 2.0 ** min(tried, 30)))
