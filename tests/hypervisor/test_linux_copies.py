"""LinuxHypervisor.copy_run against a played gntdev: the segments of gntdev.h, read from where the ioctl's
pointer leads, done, and answered in place. On a real Xen: tests/xen/test_linux.py."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct

import pytest

from xenbus.errors import HypervisorError, LinkDown
from xenbus.hypervisor import linux_abi as abi
from xenbus.hypervisor.linux import SEGMENTS, LinuxHypervisor
from xenbus.hypervisor.memory import Region

GUEST = 7
SOURCE, DEST = 1, 2  # GNTCOPY_source_gref, GNTCOPY_dest_gref
GNTST_bad_gntref = -3


class Gntdev:
    """pages: by ref, of one guest; calls: segments of each ioctl"""

    def __init__(self) -> None:
        self.pages = {ref: bytearray(os.urandom(4096)) for ref in range(8)}
        self.calls: list[int] = []
        self.fails = False

    def call(self, _fd, request, argument, what):
        assert request == abi.IOCTL_GNTDEV_GRANT_COPY
        if self.fails:
            raise HypervisorError("EFAULT", what)
        count, address = struct.unpack("=I4xQ", argument)
        self.calls.append(count)
        for at in range(address, address + 24 * count, 24):
            raw = ctypes.string_at(at, 24)
            status = self._one(raw)
            ctypes.memmove(at + 20, struct.pack("=h", status), 2)
        return 0

    def _one(self, raw: bytes) -> int:
        length, flags = struct.unpack_from("=HH", raw, 16)
        assert flags in (SOURCE, DEST)
        foreign, local = (0, 8) if flags == SOURCE else (8, 0)
        ref, offset, domid = struct.unpack_from("=IHH", raw, foreign)
        (address,) = struct.unpack_from("=Q", raw, local)
        if ref not in self.pages or domid != GUEST:
            return GNTST_bad_gntref
        page = self.pages[ref]
        if flags == SOURCE:
            ctypes.memmove(address, bytes(page[offset : offset + length]), length)
        else:
            page[offset : offset + length] = ctypes.string_at(address, length)
        return 0


def with_gntdev(monkeypatch, check):
    async def run():
        gntdev = Gntdev()
        monkeypatch.setattr(abi, "call", gntdev.call)
        monkeypatch.setattr(abi, "open_device", lambda path, **_: os.open("/dev/null", os.O_RDWR))
        hv, region = LinuxHypervisor(0), Region(1 << 20, shared=False)
        check(hv, gntdev, region)
        await hv.close()
        with pytest.raises(LinkDown):
            hv.copy_run(GUEST, [(0, 0, 1)], region, to_remote=False)
        region.close()

    asyncio.run(run())


@pytest.mark.parametrize("count", [1, 40, SEGMENTS, SEGMENTS + 1, 2 * SEGMENTS + 3])
def test_both_ways(monkeypatch, count):
    def check(hv, gntdev, region):
        pieces = [(n % 8, 100 * (n % 5), 1 + n % 700) for n in range(count)]
        total = sum(length for _, _, length in pieces)
        wanted = b"".join(bytes(gntdev.pages[ref][at : at + n]) for ref, at, n in pieces)
        assert hv.copy_run(GUEST, pieces, region, to_remote=False)
        assert region.view[:total] == wanted
        assert sum(gntdev.calls) == count
        assert len(gntdev.calls) == -(-count // SEGMENTS)

        data = os.urandom(total)
        region.view[:total] = data
        expected = {ref: bytearray(page) for ref, page in gntdev.pages.items()}
        at = 0
        for ref, offset, length in pieces:
            expected[ref][offset : offset + length] = data[at : at + length]
            at += length
        assert hv.copy_run(GUEST, pieces, region, to_remote=True)
        assert gntdev.pages == expected

    with_gntdev(monkeypatch, check)


@pytest.mark.parametrize("bad", [0, 17, SEGMENTS])
@pytest.mark.parametrize("to_remote", [False, True])
def test_one_piece_that_is_not_granted_is_told_of(monkeypatch, bad, to_remote):
    """And only of the call that had it: the next call's segments stand where that one's answers stood."""

    def check(hv, gntdev, region):
        good = [(1, 0, 4)] * (SEGMENTS + 1)
        pieces = [*good[:bad], (99, 0, 4), *good[bad + 1 :]]
        assert not hv.copy_run(GUEST, pieces, region, to_remote=to_remote)
        assert not hv.copy_run(GUEST + 1, good, region, to_remote=to_remote)
        assert hv.copy_run(GUEST, good, region, to_remote=to_remote)
        gntdev.fails = True
        assert not hv.copy_run(GUEST, good, region, to_remote=to_remote)

    with_gntdev(monkeypatch, check)
