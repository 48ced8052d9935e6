"""The memory fences that shared rings need, from what Python has at hand.

May know the machine's architecture and nothing else; holds no state a caller could see. `FENCED` is
False where no fence can be had: there a ring asks for every notification and its user polls again
with a deadline.
"""

from __future__ import annotations

import _thread
import os
from collections.abc import Callable

_MEMORY_ORDER_SEQ_CST = 5  # C11 <stdatomic.h>, as libatomic's ABI numbers it


def _nothing() -> None:
    """Where the machine keeps the order by itself."""


def _lock_fence() -> Callable[[], None]:
    """A locked read-modify-write is a full fence on x86 (Intel SDM 3A, 9.2.5: "Locked instructions").

    An uncontended lock is taken by exactly one such instruction, without a system call. The lock is
    nobody else's, so it is never contended: there is nothing to wait for.
    """
    lock = _thread.allocate_lock()
    acquire, release = lock.acquire, lock.release

    def full_fence() -> None:
        acquire()
        release()

    return full_fence


def _atomic_fence() -> Callable[[], None] | None:
    """libatomic's `atomic_thread_fence`, which is right on every architecture; None if it is not there."""
    import ctypes  # not on x86: it costs 10 ms of start-up

    try:
        library = ctypes.CDLL("libatomic.so.1")
        function = library.atomic_thread_fence
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int,)
    function.restype = None

    def full_fence() -> None:
        function(_MEMORY_ORDER_SEQ_CST)

    return full_fence


def choose(machine: str) -> tuple[Callable[[], None], Callable[[], None], bool]:
    """(full_fence, order_fence, fenced) for an architecture by its `uname` name."""
    if machine.lower() in ("x86_64", "amd64", "i386", "i486", "i586", "i686"):
        # x86 lets a later load pass an earlier store, and nothing else (SDM 3A, 9.2.3).
        return _lock_fence(), _nothing, True
    fence = _atomic_fence()
    if fence is None:
        return _nothing, _nothing, False
    return fence, fence, True


# full_fence:  xen_mb(): everything before is visible before anything after is done.
# order_fence: xen_wmb() and xen_rmb(): stores keep their order among stores, loads among loads.
full_fence, order_fence, FENCED = choose(os.uname().machine)
