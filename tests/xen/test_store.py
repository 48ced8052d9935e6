"""The stock xenstored by the kernel's device and by its socket."""

from __future__ import annotations

import asyncio

import pytest

from xenbus.errors import NoEntry
from xenbus.xenstore.client import Client

DEADLINE = 20
HOME = "/local/domain/0/xenbus-test"


@pytest.mark.parametrize("target", ["/dev/xen/xenbus", "/run/xenstored/socket"])
def test_the_stock_xenstored(target):
    async def main():
        store = await Client.connect(target)
        seen = asyncio.Event()
        try:
            assert await store.read_str("domid") == "0"
            watch = await store.watch(HOME, lambda path: seen.set() if path.endswith("/late") else None)

            async def write(tx):
                await tx.mkdir(HOME)
                await tx.set_perms(HOME, ["n0", "r5"])
                for n in range(20):
                    await tx.write(f"{HOME}/{n}", f"value {n}")

            await store.transaction(write)
            assert sorted(await store.directory(HOME), key=int) == [str(n) for n in range(20)]
            await asyncio.gather(*(store.read(f"{HOME}/{n}") for n in range(20)))
            await store.write(f"{HOME}/late", "x" * 3000)
            await seen.wait()
            assert await store.read_str(f"{HOME}/late") == "x" * 3000
            await watch.close()
            with pytest.raises(NoEntry):
                await store.read(f"{HOME}/none")
            await store.rm(HOME)
            assert not await store.exists(HOME)
        finally:
            await store.close()

    asyncio.run(asyncio.wait_for(main(), DEADLINE))
