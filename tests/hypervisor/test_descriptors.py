"""A process that has no descriptor left: an operation fails with EMFILE, the connection lives."""

import asyncio
import os
import resource
from contextlib import contextmanager

import pytest

from xenbus.errors import HypervisorError
from xenbus.hypervisor.broker import Broker, connect


@contextmanager
def all_taken():
    """Every descriptor of this process is in use, whatever its limit is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    taken = []
    try:
        while True:
            try:
                taken.append(os.eventfd(0))
            except OSError:
                break
        yield taken
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _with_domains(test):
    broker = Broker()
    broker.create(0)
    broker.create(1)
    zero = await connect(broker.handle(0, privileged=True))
    one = await connect(broker.handle(1))
    try:
        await test(broker, zero, one)
    finally:
        await zero.close()
        await one.close()
        await broker.close()


def test_a_mapping_finds_room_and_a_link_says_that_it_does_not():
    async def test(broker, zero, one):
        pages = await one.grants.alloc(0, 1)
        port = (await one.evtchn.alloc_unbound(0, lambda: None)).port
        before = zero.held()
        with all_taken() as taken:
            # Its descriptor is needed for a moment only: the reserve is room enough.
            mapping = await zero.gntdev.map(1, pages.refs)
            await zero.gntdev.unmap(mapping)
            # The broker makes the link's doorbells; these are what it takes, and no more.
            for _ in range(3):
                os.close(taken.pop())
            with pytest.raises(HypervisorError, match="EMFILE"):
                await zero.evtchn.bind_interdomain(1, port, lambda: None)
        assert zero.held() == before
        again = await one.evtchn.alloc_unbound(0, lambda: None)
        assert again.port != port
        mapping = await zero.gntdev.map(1, pages.refs)
        await zero.gntdev.unmap(mapping)

    asyncio.run(_with_domains(test))
