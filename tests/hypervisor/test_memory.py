"""Regions, seals and free runs, without domains."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hypervisor_actor import open_files
from xenbus.errors import HypervisorError
from xenbus.hypervisor.interface import PAGE_SIZE
from xenbus.hypervisor.memory import (
    F_SEAL_FUTURE_WRITE,
    SIZE_SEALS,
    FreePages,
    Region,
    add_seals,
    check_sealed,
    release,
    sealed_memfd,
)


def mapped(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(name)


def test_a_region_of_a_memfd_keeps_no_descriptor_and_lives_as_long_as_its_slices():
    before = open_files()
    fd = sealed_memfd("xenbus-test-region", 3 * PAGE_SIZE)
    region = Region.of_fd(fd, 3 * PAGE_SIZE, writable=True)
    os.pwrite(fd, b"through the file", PAGE_SIZE)
    os.close(fd)
    assert open_files() == before
    late = region.pages(1, 1)
    region.close()
    assert bytes(late[:16]) == b"through the file"
    assert mapped("xenbus-test-region") == 1
    with pytest.raises(ValueError, match="released"):
        region.view[0]
    late.release()
    del region, late
    gc.collect()
    assert mapped("xenbus-test-region") == 0


def test_stitching_shows_the_same_pages_in_another_order():
    one, two = Region(4 * PAGE_SIZE, shared=True), Region(PAGE_SIZE, shared=True)
    for page in range(4):
        one.pages(page, 1)[:1] = bytes([page + 1])
    two.view[:1] = b"\x09"
    row = Region.stitched([(one, 2, 2), (two, 0, 1), (one, 2, 1), (one, 0, 1)], writable=True)
    assert bytes(row.view[::PAGE_SIZE]) == bytes([3, 4, 9, 3, 1])
    row.view[0] = 77
    assert one.view[2 * PAGE_SIZE] == row.view[3 * PAGE_SIZE] == 77
    one.close()
    two.close()
    assert row.view[2 * PAGE_SIZE] == 9  # the pages stay while somebody shows them
    row.close()


def test_stitching_a_read_only_region_stays_read_only():
    fd = sealed_memfd("test", 2 * PAGE_SIZE)
    add_seals(fd, SIZE_SEALS | F_SEAL_FUTURE_WRITE)
    with pytest.raises(HypervisorError):
        Region.of_fd(fd, 2 * PAGE_SIZE, writable=True)
    region = Region.of_fd(fd, 2 * PAGE_SIZE, writable=False)
    row = Region.stitched([(region, 1, 1), (region, 0, 1)], writable=False)
    for view in (region.view, row.view):
        assert view.readonly
        with pytest.raises(TypeError):
            view[0] = 1
    check_sealed(fd, 2 * PAGE_SIZE, writable=False)
    check_sealed(fd, 2 * PAGE_SIZE, writable=True)
    row.close()
    region.close()
    os.close(fd)


def test_a_view_in_use_is_released_later():
    region = Region(PAGE_SIZE, shared=True)
    view = region.pages(0, 1)
    exported = memoryview(bytearray(1))
    iterator = iter(view)  # some users hold the buffer itself
    release(view)
    release(exported)
    del iterator
    region.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60))
def test_free_runs_never_overlap_and_nothing_is_lost(steps):
    pages = FreePages(64)
    held: list[range] = []
    for take, number in steps:
        if take:
            first = pages.take(number)
            if first >= 0:
                run = range(first, first + number)
                assert run.stop <= 64 and not any(set(run) & set(other) for other in held)
                held.append(run)
            else:
                busy = {page for run in held for page in run}
                runs = (set(range(at, at + number)) for at in range(64 - number + 1))
                assert all(run & busy for run in runs)
        elif held:
            for page in held.pop(number % len(held)):
                pages.give(page)
                pages.give(page)  # once is as good as twice
        assert pages.free == 64 - sum(map(len, held))
        assert pages.empty == (not held)
