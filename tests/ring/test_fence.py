"""The fence of this machine is a real one, and where there is none that is said."""

from __future__ import annotations

import timeit
from pathlib import Path

from xenbus.ring import fence


def test_this_machine_has_a_fence():
    assert fence.FENCED
    fence.full_fence()
    fence.order_fence()


def test_x86_needs_no_order_fence_and_a_full_one():
    full, order, fenced = fence.choose("x86_64")
    assert fenced
    assert full is not order
    assert timeit.timeit(full, number=1000) < 1


def test_elsewhere_libatomic_or_none():
    full, order, fenced = fence.choose("aarch64")
    full()
    order()
    libraries = [
        f"{directory}/libatomic.so.1"
        for directory in ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")
    ]
    if any(Path(path).exists() for path in libraries):
        assert fenced
