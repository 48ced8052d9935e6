"""What only the broker's handles have: several for one domain, deadlines, waiters that go away."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest

from tests.support.hypervisor_actor import open_files
from tests.support.until import until
from xenbus.errors import DeadlineError, LinkDown, UsageError
from xenbus.hypervisor.broker import Broker, connect
from xenbus.hypervisor.broker_wire import RESERVE
from xenbus.hypervisor.interface import Held


def run(test):
    async def main():
        broker = Broker()
        broker.create(0)
        broker.create(1)
        zero, one = await connect(broker.handle(0)), await connect(broker.handle(1))
        try:
            await asyncio.wait_for(test(broker, zero, one), 20)
        finally:
            await zero.close()
            await one.close()
            await broker.close()

    before = open_files()
    asyncio.run(main())
    assert open_files() == before


def test_two_handles_of_one_domain_and_the_first_is_its_life():
    async def test(broker, zero, one):
        store = await connect(broker.handle(0, privileged=True))
        lost, dead = asyncio.Event(), []
        store.on_lost(lost.set)
        store.on_domain_dead(dead.append)
        assert store.privileged and not zero.privileged
        hits = []
        # Both map what is granted to domain 0, and each has its own ports.
        pages = await one.grants.alloc(0, 1)
        first, second = await zero.gntdev.map(1, pages.refs), await store.gntdev.map(1, pages.refs)
        first.view[:3] = b"abc"
        assert second.view[:3] == b"abc"
        channel = await store.evtchn.bind_interdomain(1, broker.store_port(1), lambda: hits.append(0))
        await until(lambda: hits)
        assert broker.held(0) == Held(0, 2, 1)
        # Domain 0 with itself: two of its processes, and one with itself.
        for other in (store, zero):
            mine = await zero.evtchn.alloc_unbound(0, lambda: hits.append("mine"))
            theirs = await other.evtchn.bind_interdomain(0, mine.port, lambda: hits.append("theirs"))
            await until(lambda: "theirs" in hits)
            theirs.notify()
            await until(lambda: "mine" in hits)
            hits.clear()
            mine.notify()
            await until(lambda: "theirs" in hits)
            hits.clear()
            await mine.close()
            await theirs.close()
        own = await zero.grants.alloc(0, 2)
        looped = await zero.gntdev.map(0, own.refs)
        looped.view[4096:4099] = b"own"
        assert own.view[4096:4099] == b"own"
        await store.close()
        await until(lambda: broker.held(0) == Held(2, 3, 0))
        assert 0 in broker.domids()
        channel.notify()
        other = await connect(broker.handle(0))
        other.on_lost(lost.set)
        await zero.close()
        await asyncio.wait_for(lost.wait(), 5)
        assert broker.domids() == (1,)

    run(test)


def test_a_waiter_that_was_cancelled_leaves_nothing_behind():
    async def test(broker, zero, one):
        pages = await one.grants.alloc(0, 2)
        ports = [await one.evtchn.alloc_unbound(0, lambda: None) for _ in range(8)]
        for make in (
            lambda: zero.gntdev.map(1, pages.refs),
            lambda: zero.grants.alloc(1, 1),
            lambda: zero.evtchn.alloc_unbound(1, lambda: None),
            lambda: zero.evtchn.bind_interdomain(1, ports.pop().port, lambda: None),
        ):
            for turns in range(1, 9):
                task = asyncio.create_task(make())
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                if not task.cancelled():
                    await give_back(zero, task.result())
        await until(lambda: broker.held(0) == Held(0, 0, 0))
        assert zero.held() == Held(0, 0, 0)

    async def give_back(hv, thing):
        if hasattr(thing, "close"):
            await thing.close()
        elif hasattr(thing, "raw"):
            await hv.gntdev.unmap(thing)
        else:
            await hv.grants.revoke(thing)

    run(test)


def test_many_at_once():
    async def test(broker, zero, one):
        grants = await asyncio.gather(*(one.grants.alloc(0, 1 + n % 3) for n in range(400)))
        assert len({ref for pages in grants for ref in pages.refs}) == sum(
            len(pages.refs) for pages in grants
        )
        mappings = await asyncio.gather(*(zero.gntdev.map(1, pages.refs) for pages in grants))
        for number, pages in enumerate(grants):
            pages.view[:2] = number.to_bytes(2, "little")
        for number, mapping in enumerate(mappings):
            assert mapping.view[:2] == number.to_bytes(2, "little")
        hits = [0] * 300
        ports = await asyncio.gather(
            *(one.evtchn.alloc_unbound(0, lambda n=n: hits.__setitem__(n, hits[n] + 1)) for n in range(300))
        )
        bound = await asyncio.gather(
            *(zero.evtchn.bind_interdomain(1, port.port, lambda: None) for port in ports)
        )
        files = open_files()
        for channel in bound[::2]:
            channel.notify()
        await until(lambda: sum(hits) == 150)
        assert hits[::2] == [1] * 150
        assert open_files() == files  # no descriptor a device
        await asyncio.gather(*(zero.gntdev.unmap(mapping) for mapping in mappings))
        await asyncio.gather(*(one.grants.revoke(pages) for pages in grants))
        await asyncio.gather(*(channel.close() for channel in (*bound, *ports)))
        assert broker.held(0) == Held(0, 0, 0) and broker.held(1) == Held(1, 0, 1)

    run(test)


def test_a_handler_that_raises_does_not_silence_the_others():
    async def test(broker, zero, one):
        raised, hits = [], []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context["message"]))

        def bad():
            raise RuntimeError("bad handler")

        for handler in (bad, lambda: hits.append(1)):
            port = await one.evtchn.alloc_unbound(0, handler)
            (await zero.evtchn.bind_interdomain(1, port.port, lambda: None)).notify()
        await until(lambda: hits and raised)

    run(test)


def test_a_broker_that_does_not_answer_is_named_at_the_deadline():
    async def main():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, pytest.raises(DeadlineError, match="broker"):
            await connect(ours, deadline=0.05)

    asyncio.run(main())


def test_a_broker_that_goes_fails_every_waiter():
    async def test(broker, zero, one):
        lost = []
        one.on_lost(lambda: lost.append(1))
        parked = asyncio.create_task(one.suspend())
        await asyncio.wait_for(broker.suspended(1), 5)
        await broker.close()
        with pytest.raises(LinkDown):
            await asyncio.wait_for(parked, 5)
        await until(lambda: lost)
        with pytest.raises(LinkDown):
            await one.grants.alloc(0, 1)
        late = []
        one.on_lost(lambda: late.append(1))
        await until(lambda: late)

    run(test)


def test_what_a_supervisor_may_not_ask():
    async def test(broker, zero, one):
        for call in (
            lambda: broker.create(1),
            lambda: broker.create(0x7FF0),
            lambda: broker.handle(9),
            lambda: broker.store_port(9),
            lambda: broker.resume(1),
            lambda: broker.rename(1, 7),
        ):
            with pytest.raises(UsageError):
                call()
        broker.destroy(9)
        assert broker.held(9) == Held(0, 0, 0)

    run(test)


@pytest.mark.parametrize("where", ["broker_handle.socket.socketpair", "broker_tables.sealed_memfd"])
def test_a_domain_that_cannot_be_made_leaves_nothing(where, monkeypatch):
    async def test(broker, zero, one):
        def none_left(*_):
            raise OSError(errno.EMFILE, "too many open files")

        base = open_files()
        with monkeypatch.context() as patch:
            patch.setattr("xenbus.hypervisor." + where, none_left)
            with pytest.raises(OSError, match="too many"):
                broker.create(2)
        assert broker.domids() == (0, 1) and open_files() == base
        broker.create(2)
        broker.handle(2).close()
        await until(lambda: broker.domids() == (0, 1))

    run(test)


def test_arenas_are_kept_for_the_next_and_dropped_with_the_peer():
    async def test(broker, zero, one):
        base = open_files()
        for _ in range(5):
            pages = [await zero.grants.alloc(1, 200) for _ in range(6)]
            for granted in pages:
                await zero.grants.revoke(granted)
        assert open_files() <= base + 2
        broker.destroy(1)
        await zero.evtchn.alloc_unbound(1, lambda: None)
        # Two sockets, its reserve and store page, and our spare arena, against one spare more than at first.
        await until(lambda: open_files() == base - 3 - RESERVE)

    run(test)
