"""xn's pages: how many are granted, and that all are given back, whenever that is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from xenbus.drivers.net.xn_pool import FIRST, Pool
from xenbus.errors import HypervisorError


class Grants:
    """most: pages that there are; the next ones are refused"""

    def __init__(self, most=1 << 20):
        self.most = most
        self.asked = []
        self.held = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def alloc(self, count):
        self.asked.append(count)
        await self.gate.wait()
        if self.held + count > self.most:
            raise HypervisorError("ENOSPC", "no more")
        self.held += count
        view = memoryview(bytearray(count * 4096))
        return SimpleNamespace(refs=tuple(range(self.held - count, self.held)), view=view)

    async def revoke(self, chunk):
        self.held -= len(chunk.refs)


def test_it_doubles_up_to_its_limit():
    async def main():
        grants = Grants()
        pool = Pool(grants.alloc, grants.revoke, 200)
        while pool.can_grow:
            await pool.grow()
        await pool.grow()
        assert grants.asked == [FIRST, 32, 64, 72]
        assert [page.ident for page in pool.pages] == list(range(200)) and len(pool.free) == 200
        assert len({page.ref for page in pool.pages}) == 200
        await pool.close()
        await pool.close()
        assert not grants.held and not pool.can_grow

    asyncio.run(main())


@pytest.mark.parametrize(("most", "has", "asked"), [(40, 40, [32, 32, 16, 8]), (8, 8, [32, 16, 8])])
def test_where_there_are_fewer_it_takes_those(most, has, asked):
    async def main():
        grants = Grants(most)
        pool = Pool(grants.alloc, grants.revoke, 256)
        while pool.can_grow:
            await pool.grow()
        assert (len(pool.pages), grants.asked) == (has, asked)
        await pool.close()
        assert not grants.held

    asyncio.run(main())


def test_without_one_page_there_is_none():
    async def main():
        pool = Pool(Grants(0).alloc, Grants(0).revoke, 256)
        with pytest.raises(HypervisorError):
            await pool.grow()
        assert not pool.can_grow

    asyncio.run(main())


def test_pages_that_come_when_it_is_closed_go_back():
    async def main():
        grants = Grants()
        pool = Pool(grants.alloc, grants.revoke, 256)
        grants.gate.clear()
        growing = asyncio.ensure_future(pool.grow())
        await asyncio.sleep(0)
        await pool.close()
        grants.gate.set()
        await growing
        assert not grants.held and not pool.pages

    asyncio.run(main())
