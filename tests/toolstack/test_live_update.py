"""The store daemon of `xenbus up` is replaced under a guest with a disk: rings, watches and traffic go on."""

import asyncio
import sys

import pytest
from tests.support.hosts import Site, up

from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import detach_device

SIZE = 1 << 20


async def update(store):
    assert await store.control("live-update", "-f", sys.executable) == "OK"
    assert await store.control("live-update", "-s", "-t", "30") == "OK"


@pytest.mark.slow
def test_a_host_whose_store_is_replaced():
    async def test(host):
        async with Site.open(host.root) as site:
            before = await site.baseline()
            processes = await site.processes()
            info = await site.toolstack.create("g", [DiskSpec(0, str(site.image("a.img"))).device()])
            await site.operate("g", "xbd0", "load_start", offset=0, length=SIZE)
            await update(site.store)
            # The guest's bus and domain 0's hear of new devices, the first one's ring was not touched.
            second = await site.disk("g", site.image("b.img"), "xvdb")
            await update(site.store)
            await detach_device(site.store, second, timeout=20)
            load = await site.operate("g", "xbd0", "load_stop")
            assert load["requests"] and not load["errors"], load
            lines = await site.lines("g")
            assert "xbd0 at device/vbd/51712: Connected" in lines
            assert await site.store.control("check") == "OK"
            assert {
                name: pid for name, pid in (await site.processes()).items() if name in processes
            } == processes
            await site.toolstack.destroy(info.domid)
            await update(site.store)
            assert await site.left(before) == []

    with up() as host:
        asyncio.run(asyncio.wait_for(test(host), 55))
    assert host.said == ""
