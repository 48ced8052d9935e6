"""Machines of every kind for the hypervisor's conformance tests, and what they may answer. No test here."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.hypervisor_actor import Actor, Child
from xenbus.errors import HypervisorError
from xenbus.hypervisor.broker import Broker, connect
from xenbus.hypervisor.embedded import Machine
from xenbus.hypervisor.interface import GNTST_general_error, GNTST_permission_denied

# Xen's word for a page that is not granted to who asks, and the one that embedded machines have.
DENIED = (GNTST_general_error, GNTST_permission_denied)


def not_ours(rig):
    """What binding another's port is refused with: Xen says of it what it says of one that is not there."""
    return getattr(rig, "not_ours", "EPERM")


async def refused(name, call):
    with pytest.raises(HypervisorError) as caught:
        await call
    assert caught.value.name == name


class EmbeddedRig:
    def __init__(self, children, limits):
        self.host = Machine(limits=limits)
        self.dead = []
        self.died = asyncio.Event()
        self.host.on_domain_dead(self._on_dead)
        self.actors = []

    def _on_dead(self, domid):
        self.dead.append(domid)
        self.died.set()

    async def domain(self, domid, privileged=False):
        actor = Actor(self.host.domain(domid))
        self.actors.append(actor)
        return actor

    async def kill(self, actor):
        self.host.kill(actor.hv.domid)

    async def close(self):
        for domid in self.host.domids():
            self.host.kill(domid)


class BrokerRig:
    """Broker and handles in one loop."""

    def __init__(self, children, limits):
        self.dead = []
        self.died = asyncio.Event()
        self.socks = {}
        self.host = Broker(on_dead=self._on_dead, limits=limits)
        self.actors = []

    def _on_dead(self, domid):
        self.dead.append(domid)
        self.died.set()

    async def domain(self, domid, privileged=False):
        self.host.create(domid)
        sock = self.host.handle(domid, privileged=privileged)
        actor = Actor(await connect(sock))
        self.socks[actor] = sock
        self.actors.append(actor)
        return actor

    async def kill(self, actor):
        self.socks[actor].shutdown(2)  # as the end of its process would: no farewell

    async def close(self):
        for actor in self.actors:
            await actor.close()
        await self.host.close()


class ProcessRig(BrokerRig):
    """Domain 0 here, every other one in a process."""

    def __init__(self, children, limits):
        super().__init__(children, limits)
        self.children = children
        self.homes = {}

    async def domain(self, domid, privileged=False):
        if domid == 0:
            return await super().domain(domid, privileged)
        self.host.create(domid)
        child = self.children.setdefault(domid, None) or Child()
        self.children[domid] = child
        actor = await child.connect(self.host.handle(domid, privileged=privileged))
        self.homes[actor] = domid
        self.actors.append(actor)
        return actor

    async def kill(self, actor):
        self.actors.remove(actor)
        self.children.pop(self.homes[actor]).kill()
