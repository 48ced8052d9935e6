"""Domain 0's program: a domain like others, with the store's socket and a monitor that buries the dead."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from xenbus.domain.layout import CONTROL_DOMAIN, HostLayout
from xenbus.domain.process import main
from xenbus.domain.runtime import DomainRuntime
from xenbus.hypervisor.broker import BrokerHypervisor
from xenbus.newbus.runtime import end_task
from xenbus.toolstack.domains import Toolstack, monitor
from xenbus.toolstack.paths import domain_path, libxl_path
from xenbus.xenstore.client import Client


async def control_domain(name: str, hv: BrokerHypervisor, layout: HostLayout) -> DomainRuntime:
    async def connect() -> Client:
        store = await Client.connect(f"unix:{layout.store_socket}")
        # What xen-init-dom0 writes before anything else runs.
        root = domain_path(0)
        await store.write(f"{root}/name", CONTROL_DOMAIN)
        await store.write(f"{root}/domid", "0")
        for directory in ("device", "backend", "error"):
            await store.mkdir(f"{root}/{directory}")
        await store.mkdir(libxl_path(0))
        return store

    return DomainRuntime(name, hv, connect)


@asynccontextmanager
async def burying(runtime: DomainRuntime, layout: HostLayout) -> AsyncIterator[None]:
    async with await Toolstack.open(layout.root) as toolstack:
        task = asyncio.create_task(monitor(toolstack), name="monitor")
        try:
            yield
        finally:
            await end_task(task)


if __name__ == "__main__":
    sys.exit(main(make=control_domain, around=burying))
