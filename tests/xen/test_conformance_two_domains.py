"""The hypervisor's conformance suite on a real Xen, between domains: dom0, and handles in one or two guests.

Cases that need what only the embedded host has (its start info, its suspend, its limits, its word of a death)
are not here; wrong refs of other kinds are in test_linux.py.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.hypervisor.test_conformance import (  # noqa: F401 - collected here, with the `run` below
    test_a_closed_end_leaves_the_other_unbound,
    test_a_grant_is_shared_memory,
    test_a_page_is_reused_after_its_last_unmap_and_zeroed,
    test_event_channels_carry_levels_both_ways,
    test_grant_copy,
    test_masked_stays_pending_and_fires_once,
    test_only_the_grantee_maps,
    test_read_only_is_read_only,
    test_refs_in_any_order_make_one_row,
    test_thousands_of_pages_stay_mapped,
    test_what_was_published_before_the_last_kick_is_seen,
    test_who_may_bind,
)
from tests.support.dom0 import STORE
from tests.support.guest_actor import TwoDomainRig
from tests.support.hypervisor_actor import open_files
from tests.support.real_xen import dom0_ports
from tests.support.xl_guest import python_guest
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(120)
DEADLINE = 100


@pytest.fixture(scope="module")
def machine():
    """(a loop's runner, two guests) for all of this file: guests take long to boot."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def begin():
            store = await Client.connect(STORE)
            stack.push_async_callback(store.close)
            return [await stack.enter_async_context(python_guest(store, f"far{n}")) for n in (1, 2)]

        try:
            yield runner, runner.run(begin())
        finally:
            runner.run(stack.aclose())


@pytest.fixture
def run(machine):
    """run(test): with a rig; descriptors and Xen's own count of ports are as before when it ends."""
    runner, guests = machine

    def runs(test):
        async def main():
            rig = TwoDomainRig(guests)
            try:
                await asyncio.wait_for(test(rig), DEADLINE)
            finally:
                await rig.close()

        files, ports = open_files(), dom0_ports()
        runner.run(main())
        assert (open_files(), dom0_ports()) == (files, ports)

    return runs
