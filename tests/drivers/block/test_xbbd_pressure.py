"""xbbd takes no more requests than it can serve at a time, however many a ring holds."""

from __future__ import annotations

import asyncio

from tests.support.troubled import Gated
from tests.support.until import until
from tests.support.vbd import rig

from xenbus.drivers.block import xbbd_io


def test_what_is_in_flight_is_bounded_in_pages(monkeypatch):
    """Requests of 8 pages; from 40 pages on nothing is taken, and with the first answers it goes on."""
    monkeypatch.setattr(xbbd_io, "SEGMENTS_MAX", 40)
    monkeypatch.setattr(xbbd_io, "BATCH", 1)

    async def run():
        async with rig() as r:
            await r.plug("memory:4M")
            await r.connected()
            stuck = Gated(r.back._storage)
            (link,) = r.back._links
            link.queue._storage = stuck
            data = [bytes([n]) * 8 * 4096 for n in range(30)]
            writes = [asyncio.ensure_future(r.disk.write(n * 32768, data[n])) for n in range(30)]
            await until(lambda: link.inflight == 5 and r.front.queue.inflight == 30)
            for _ in range(20):  # kicks change nothing
                link.queue.kick()
                await asyncio.sleep(0)
            assert link.inflight == 5
            stuck.gate.set()
            await asyncio.gather(*writes)
            assert link.inflight == 0 and link.queue._segments == 0
            assert await r.disk.read(0, 30 * 32768) == b"".join(data)
            await r.gone()

    asyncio.run(run())
