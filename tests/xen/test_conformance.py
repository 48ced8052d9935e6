"""The hypervisor's conformance suite on a real Xen: dom0 with itself, each side a handle of its own.

Only the cases that ask nothing of domain ids: what needs two domains is in test_linux.py.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.hypervisor.test_conformance import (  # noqa: F401 - collected here, with the `run` below
    test_a_closed_end_leaves_the_other_unbound,
    test_a_grant_is_shared_memory,
    test_a_page_is_reused_after_its_last_unmap_and_zeroed,
    test_event_channels_carry_levels_both_ways,
    test_masked_stays_pending_and_fires_once,
    test_read_only_is_read_only,
    test_refs_in_any_order_make_one_row,
    test_thousands_of_pages_stay_mapped,
    test_what_was_published_before_the_last_kick_is_seen,
)
from tests.support.hypervisor_actor import open_files
from tests.support.real_xen import SelfRig, dom0_ports

DEADLINE = 50


@pytest.fixture
def run():
    """run(test): with a rig; descriptors and Xen's own count of ports are as before when it ends."""

    def runner(test):
        async def main():
            rig = SelfRig()
            try:
                await asyncio.wait_for(test(rig), DEADLINE)
            finally:
                await rig.close()

        files, ports = open_files(), dom0_ports()
        asyncio.run(main())
        assert (open_files(), dom0_ports()) == (files, ports)

    return runner
