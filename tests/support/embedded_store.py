"""The store of a machine in this process, as a toolstack in domain 0 sees it. No test here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from xenbus.hypervisor.embedded import Machine
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon import Daemon


@asynccontextmanager
async def embedded_store(*domids: int) -> AsyncIterator[tuple[Client, Daemon, Machine]]:
    """Domain 0's connection, and domains that have a name in the store and no driver."""
    machine = Machine()
    daemon = Daemon(machine.domain(0))
    try:
        async with await Client.connect(daemon.connect_local(0)) as store:
            for domid in domids:
                machine.domain(domid)
                await store.write(f"/local/domain/{domid}/name", f"d{domid}")
            yield store, daemon, machine
    finally:
        await daemon.close()
