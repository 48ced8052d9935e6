"""Hands on a real Xen, in its dom0: handles, ports counted by Xen itself, helper programs. No test here."""

from __future__ import annotations

import asyncio
import subprocess

from tests.support.hypervisor_actor import Actor
from xenbus.hypervisor.interface import Held
from xenbus.hypervisor.linux import LinuxHypervisor

XEN_BIN = "/usr/lib/xen-4.17/bin"


def dom0_ports() -> int:
    """How many interdomain and unbound ports dom0 has, by Xen's own count."""
    listed = subprocess.run(
        [f"{XEN_BIN}/lsevtchn", "0"], capture_output=True, text=True, check=True, timeout=10
    )
    return sum("Interdomain" in line or "unbound" in line.lower() for line in listed.stdout.splitlines())


class QuietHandle(LinuxHypervisor):
    """Linux tells nobody of deaths; the actor asks for it of every handle."""

    def on_domain_dead(self, callback) -> None:
        pass

    def on_lost(self, callback) -> None:
        pass


class SelfActor(Actor):
    """One of several handles of the same dom0: whatever number a case gives its domains, each is domain 0."""

    def __init__(self, hv, rig) -> None:
        super().__init__(hv)
        self._rig = rig

    def _real(self, domid):
        return 0 if domid in self._rig.numbers else domid

    async def alloc(self, domid, count, writable=True):
        return await super().alloc(self._real(domid), count, writable)

    async def map(self, domid, refs, writable=True):
        return await super().map(self._real(domid), refs, writable)

    async def copy(self, ops):
        return await super().copy([[self._real(domid), *rest] for domid, *rest in ops])

    async def port(self, remote_domid):
        return await super().port(self._real(remote_domid))

    async def bind(self, remote_domid, remote_port):
        return await super().bind(self._real(remote_domid), remote_port)

    async def bind_handler(self, remote_domid, remote_port, handler):
        return await super().bind_handler(self._real(remote_domid), remote_port, handler)


class SelfRig:
    """The rig of the conformance suite, over dom0 with itself. `host` is what the suite asks for counts."""

    def __init__(self) -> None:
        self.host = self
        self.actors: dict[int, SelfActor] = {}
        self.numbers = {0, 1, 2}
        self.dead: list[int] = []
        self.died = asyncio.Event()

    async def domain(self, domid, privileged=False):
        actor = self.actors[domid] = SelfActor(QuietHandle(0), self)
        if domid:  # what a domain builder leaves in every guest: a page and a port for the store
            await actor.hv.grants.alloc(0, 1)
            await actor.hv.evtchn.alloc_unbound(0, lambda: None)
        return actor

    def held(self, domid) -> Held:
        return self.actors[domid].hv.held()

    async def close(self) -> None:
        """Mappings first: pages that are revoked while they are mapped Linux frees ten a second
        (gnttab_handle_deferred), and what is revoked later waits behind them."""
        for actor in self.actors.values():
            for mapping in list(actor.hv._mapped):
                await actor.hv.unmap(mapping)
        for actor in self.actors.values():
            await actor.close()
