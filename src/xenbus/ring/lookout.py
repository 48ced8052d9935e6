"""Looking at a ring's index for a moment before one goes to sleep over it: a wake-up costs more than a look.

Knows one word of shared memory; knows nothing of loops and channels. As the kernel's halt polling it adapts:
where looking does not pay (the other end has no CPU of its own, or is in this very process), it ends.
"""

from __future__ import annotations

import os
from typing import Final

# Looks at a time: some microseconds in all, about what a wake-up by eventfd costs both ends together.
TURNS: Final = 200
# So many looks in vain end it, but for one in PAUSE.
CREDIT: Final = 8
PAUSE: Final = 64


class Lookout:
    """`words[index]` belongs to the other end, who may move it at any time."""

    __slots__ = ("_credit", "_index", "_pause", "_words")

    def __init__(self, words: memoryview, index: int) -> None:
        self._words = words
        self._index = index
        self._credit = 1
        # With one CPU the other end cannot run while we look.
        self._pause = 0 if (os.cpu_count() or 1) > 1 else -1

    def moved(self, value: int) -> bool:
        """Whether it is not, or soon not, `value` any more. False says nothing."""
        if self._pause:
            if self._pause > 0:
                self._pause -= 1
            return False
        words, index = self._words, self._index
        for _ in range(TURNS):
            if words[index] != value:
                if self._credit < CREDIT:
                    self._credit += 1
                return True
        self._credit -= 1
        if not self._credit:
            self._credit, self._pause = 1, PAUSE
        return False
