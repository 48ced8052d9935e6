"""How much of the hypervisor one domain may hold, the same for every embedded implementation.

Numbers only. Xen has the same three limits (gnttab max_grant_frames, max_maptrack_frames, max evtchn port).
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbus.errors import UsageError
from xenbus.hypervisor.interface import DOMID_FIRST_RESERVED


@dataclass(slots=True, frozen=True)
class Limits:
    """Counts a domain. Passing one is HypervisorError ENOSPC for the domain that asked, nobody else.

    arenas counts descriptors that the broker keeps for a domain; the in-process machine has none.
    """

    granted_pages: int = 65536
    mapped_pages: int = 131072
    ports: int = 16384
    arenas: int = 128


def check_domid(domid: int) -> int:
    """`domid` if it is one of a domain (xen.h: 0 up to DOMID_FIRST_RESERVED); UsageError otherwise."""
    if not 0 <= domid < DOMID_FIRST_RESERVED:
        raise UsageError(f"{domid} is not a domain id")
    return domid
