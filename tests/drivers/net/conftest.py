"""What the tests of the drivers share: the two ways in which xnb gets at a guest's pages."""

from __future__ import annotations

import pytest

from xenbus.hypervisor.embedded import EmbeddedHypervisor
from xenbus.hypervisor.interface import CopyOp


def copy_run(self, domid, pieces, region, *, to_remote):
    """PageCopier, as LinuxHypervisor is one: pieces lie one after the other in the region."""
    at, done = 0, True
    for ref, offset, length in pieces:
        assert at + length <= region.length
        local = region.view[at : at + length]
        done = not self._copy(CopyOp(domid, ref, offset, length, local, to_remote)) and done
        at += length
    return done


@pytest.fixture(params=["mapped", "copied"])
def either_way(request, monkeypatch):
    """Pages mapped and kept, as embedded; or copied at once by the hypervisor, as on real Xen."""
    if request.param == "copied":
        monkeypatch.setattr(EmbeddedHypervisor, "copy_run", copy_run, raising=False)
    return request.param
