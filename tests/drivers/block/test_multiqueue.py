"""Disks of several queues: both halves in all their combinations, order, reconnects, fronts that lie."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from tests.support.raw_vbd import RawFront, RawQueues
from tests.support.troubled import Gated
from tests.support.until import until
from tests.support.vbd import rig

from xenbus.bus import XenbusState
from xenbus.drivers.block import Xbd, blkif, xbd
from xenbus.drivers.block.blkif import Op
from xenbus.errors import LinkDown

MIB = 1 << 20
OKAY, ERROR = blkif.BLKIF_RSP_OKAY, blkif.BLKIF_RSP_ERROR


def front_with(**offer):
    return type("Xbd", (Xbd,), offer)


def lying(**attributes):
    return type("RawQueues", (RawQueues,), attributes)


async def nodes_of(r) -> dict[str, str]:
    """The front's directory, two levels deep."""
    tool, found = r.world.tool, {}
    for key in await tool.directory(r.fnode):
        found[key] = await tool.read_str(f"{r.fnode}/{key}")
        for below in await tool.directory(f"{r.fnode}/{key}"):
            found[f"{key}/{below}"] = await tool.read_str(f"{r.fnode}/{key}/{below}")
    return found


def requests_by_queue(r) -> list[int]:
    """How many requests each ring of the front has carried."""
    return [connection.ring.rsp_cons for connection in r.front.queue.connections]


COMBINATIONS = list(itertools.product((1, 2, 4), (0, 2), (True, False), (0, 256)))
QUICK = [(2, 0, True, 256), (4, 2, False, 0), (4, 0, False, 256), (2, 2, True, 0), (1, 0, True, 0)]


@pytest.mark.parametrize(
    ("queues", "order", "persistent", "indirect"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in COMBINATIONS],
)
def test_every_combination(queues, order, persistent, indirect):
    offer = {
        "num_queues": queues,
        "ring_page_order": order,
        "persistent": persistent,
        "indirect_segments": indirect,
    }

    async def run():
        async with rig(front=front_with(**offer)) as r:
            await r.plug("memory:2M")
            await r.connected()
            disk, pages = r.disk, queues << order
            assert r.front.sysctl()["queues"]() == r.back.sysctl()["queues"]() == queues
            assert r.front.sysctl()["ring_pages"]() == r.back.sysctl()["ring_pages"]() == pages
            assert r.back_dev.counts()["mapped_pages"] == pages
            assert r.back_dev.counts()["channels"] == r.front_dev.counts()["channels"] == queues
            dice, content = random.Random(f"{offer}"), bytearray(2 * MIB)
            for _ in range(6):
                # A wave of writes that do not overlap, then the same pieces read, all at once.
                cuts = sorted(dice.sample(range(1, 4096), 40))
                pieces = list(itertools.pairwise([0, *cuts, 4096]))
                dice.shuffle(pieces)
                for start, end in pieces:
                    content[start * 512 : end * 512] = dice.randbytes((end - start) * 512)
                await asyncio.gather(
                    *(disk.write(start * 512, content[start * 512 : end * 512]) for start, end in pieces)
                )
                await disk.flush()
                reads = (disk.read(start * 512, (end - start) * 512) for start, end in pieces)
                for (start, end), data in zip(pieces, await asyncio.gather(*reads), strict=True):
                    assert data == content[start * 512 : end * 512]
            await disk.write_barrier(0, bytes(128 << 10))
            await disk.discard(MIB, 4096)
            assert await disk.read(0, 128 << 10) == bytes(128 << 10)
            assert all(requests_by_queue(r)), "a queue was never used"
            assert r.back.counters.errors == r.front.queue.errors == 0
            assert (r.back._grants.pages > 0) == persistent
            await r.gone()

    asyncio.run(run())


def test_the_nodes_are_those_of_blkif_h():
    """Two queues of two pages, as the header's example, and nothing at the top level that is a queue's."""

    async def run():
        async with rig(front=front_with(num_queues=2)) as r:
            await r.plug("memory:1M")
            await r.connected()
            assert await r.world.tool.read_str(f"{r.bnode}/multi-queue-max-queues") == "4"
            nodes = await nodes_of(r)
            assert (nodes["multi-queue-num-queues"], nodes["ring-page-order"]) == ("2", "1")
            assert not nodes.keys() & {"event-channel", "ring-ref", "ring-ref0", "ring-ref1"}
            for n in range(2):
                keys = {key.partition("/")[2] for key in nodes if key.startswith(f"queue-{n}/")}
                assert keys == {"event-channel", "ring-ref0", "ring-ref1"}

    asyncio.run(run())


def test_one_queue_of_one_page_is_as_linux_writes_it():
    """No multi-queue-num-queues, and no ring-page-order, of which blkback would conclude `ring-ref0`."""

    async def run():
        async with rig(front=front_with(ring_page_order=0)) as r:
            await r.plug("memory:1M")
            await r.connected()
            nodes = await nodes_of(r)
            assert {"event-channel", "ring-ref"} <= nodes.keys()
            assert not any("queue" in key or "page" in key or key == "ring-ref0" for key in nodes)

    asyncio.run(run())


def test_what_an_earlier_connection_published_is_taken_away():
    """Four queues at first; then the back end has one, and must not find the keys of the others."""

    async def run():
        async with rig(front=front_with(num_queues=4)) as r:
            await r.plug("memory:1M")
            await r.connected()
            assert "queue-3/ring-ref0" in await nodes_of(r)
            r.front_dev.request_detach()
            back = r.back_dev
            await until(lambda: back.state is XenbusState.CLOSED and not r.guest.front.devices)
            await r.world.tool.write(f"{r.bnode}/xbbd-max-queues", "1")
            await r.world.tool.write(f"{r.bnode}/xbbd-max-ring-page-order", "0")
            r.back_dev.request_detach()
            await until(lambda: not r.dom0.back.devices)
            await r.world.tool.write(f"{r.bnode}/state", "1")
            await r.world.tool.write(f"{r.fnode}/state", "1")
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            await r.connected()
            assert r.front.sysctl()["queues"]() == 1
            nodes = await nodes_of(r)
            assert not any("queue" in key or "page" in key or key == "ring-ref0" for key in nodes)
            await r.disk.write(0, b"x" * 4096)
            assert await r.disk.read(0, 4096) == b"x" * 4096

    asyncio.run(run())


@pytest.mark.parametrize(("ours", "theirs", "agreed"), [(8, 4, 4), (2, 4, 2), (3, 1, 1)])
def test_as_many_as_both_have(ours, theirs, agreed):
    async def run():
        async with rig(front=front_with(num_queues=ours)) as r:
            await r.plug("memory:1M", xbbd_max_queues=str(theirs))
            await r.connected()
            assert r.front_dev.features["queues"] == r.front.sysctl()["queues"]() == agreed
            await asyncio.gather(*(r.disk.write(n * 4096, bytes([n]) * 4096) for n in range(64)))
            assert all(requests_by_queue(r))
            await r.gone()

    asyncio.run(run())


def test_more_than_all_rings_hold_goes_over_all_of_them():
    """One ring would take 32; the rest goes to the others in the same turn of the loop, not one by one."""

    async def run():
        async with rig(front=front_with(num_queues=4, ring_page_order=0)) as r:
            await r.plug("memory:4M")
            await r.connected()
            queue = r.front.queue
            await asyncio.gather(*(r.disk.write(n * 4096, bytes([n % 251]) * 4096) for n in range(1024)))
            reads = [asyncio.ensure_future(r.disk.read(n * 4096, 4096)) for n in range(1024)]
            await asyncio.sleep(0)
            assert [len(connection.shadow) for connection in queue.connections] == [32] * 4
            for n, data in enumerate(await asyncio.gather(*reads)):
                assert data == bytes([n % 251]) * 4096
            assert queue.inflight == queue.waiting == 0
            await r.gone()

    asyncio.run(run())


def test_one_at_a_time_takes_turns():
    async def run():
        async with rig(front=front_with(num_queues=4)) as r:
            await r.plug("memory:1M")
            await r.connected()
            for n in range(40):
                await r.disk.write(n * 4096, bytes(4096))
            assert requests_by_queue(r) == [10] * 4

    asyncio.run(run())


def test_closed_by_the_toolstack_with_its_nodes_still_there():
    """Every ring, port and page of both ends is given back at once, not with the nodes."""

    async def run():
        async with rig(front=front_with(num_queues=4)) as r:
            await r.plug("memory:1M")
            await r.connected()
            front, back = r.front_dev, r.back_dev
            await asyncio.gather(*(r.disk.write(n * 4096, bytes(4096)) for n in range(200)))
            assert r.back._grants.pages
            await r.toolstack_close()
            await until(lambda: front.state is back.state is XenbusState.CLOSED)
            assert not any(front.counts().values()) and not any(back.counts().values())
            assert r.held() == r.before
            await r.gone()

    asyncio.run(run())


def test_a_barrier_is_kept_over_all_queues():
    """A back end keeps it in one ring only: the front waits for all before it, and holds back the rest."""

    async def run():
        async with rig(front=front_with(num_queues=3)) as r:
            await r.plug("memory:1M")
            await r.connected()
            gated = Gated(r.back._storage)
            for link in r.back._links:
                link.queue._storage = gated
            early = [asyncio.ensure_future(r.disk.write(n * 4096, b"e" * 4096)) for n in range(9)]
            await until(lambda: r.back.sysctl()["inflight"]() == 9)
            assert all(link.inflight for link in r.back._links)
            barrier = asyncio.ensure_future(r.disk.write_barrier(20 * 4096, b"b" * 4096))
            late = [asyncio.ensure_future(r.disk.write(n * 4096, b"l" * 4096)) for n in range(30, 36)]
            await asyncio.sleep(0.02)
            assert (r.front.queue.inflight, r.front.queue.waiting) == (9, 7)
            gated.gate.set()
            await asyncio.gather(*early, barrier, *late)
            assert set(gated.order[:9]) == set(range(9))
            assert gated.order[9:11] == [20, "flush"]
            assert set(gated.order[11:]) == set(range(30, 36))
            # The next ones go out at once again, and so does one barrier after another.
            await asyncio.gather(*(r.disk.write_barrier(n * 4096, bytes(4096)) for n in range(4)))
            assert await r.disk.read(30 * 4096, 4096) == b"l" * 4096
            await r.gone()

    asyncio.run(run())


def test_a_barrier_that_is_cancelled_does_not_hold_up_the_others():
    async def run():
        async with rig(front=front_with(num_queues=2)) as r:
            await r.plug("memory:1M")
            await r.connected()
            gated = Gated(r.back._storage)
            for link in r.back._links:
                link.queue._storage = gated
            write = asyncio.ensure_future(r.disk.write(0, bytes(4096)))
            await until(lambda: r.front.queue.inflight == 1)
            waits = asyncio.ensure_future(r.disk.write_barrier(4096, bytes(4096)))
            await until(lambda: r.front.queue.waiting == 1)
            waits.cancel()
            read = asyncio.ensure_future(r.disk.read(8192, 4096))
            await asyncio.wait_for(read, 5)
            gated.gate.set()
            await write
            # One that is out already: what comes after it waits for its answer all the same.
            gated.gate.clear()
            out = asyncio.ensure_future(r.disk.write_barrier(4096, bytes(4096)))
            await until(lambda: r.front.queue.inflight == 1)
            out.cancel()
            read = asyncio.ensure_future(r.disk.read(8192, 4096))
            await asyncio.sleep(0.02)
            assert not read.done() and r.front.queue.inflight == 1
            gated.gate.set()
            await asyncio.wait_for(read, 5)
            await r.gone()

    asyncio.run(run())


def test_a_flush_covers_what_other_queues_answered():
    async def run():
        async with rig(front=front_with(num_queues=4)) as r:
            await r.plug("memory:1M")
            await r.connected()
            gated = Gated(r.back._storage)
            gated.gate.set()
            for link in r.back._links:
                link.queue._storage = gated
            await asyncio.gather(*(r.disk.write(n * 4096, bytes(4096)) for n in range(16)))
            await r.disk.flush()
            assert set(gated.order[:16]) == set(range(16)) and gated.order[16:] == ["flush"]

    asyncio.run(run())


def test_a_cancelled_suspend_of_either_side_changes_nothing():
    async def run():
        async with rig(front=front_with(num_queues=3)) as r:
            await r.plug("memory:1M")
            await r.connected()
            disk, connections = r.disk, r.front.queue.connections
            for bus in (r.guest.front, r.dom0.back):
                writes = [asyncio.ensure_future(disk.write(n * 4096, bytes([n]) * 4096)) for n in range(200)]
                await asyncio.sleep(0)
                await bus.suspend()
                assert r.back.sysctl()["inflight"]() == 0
                held, late = r.held(), asyncio.ensure_future(disk.read(4096, 4096))
                await asyncio.sleep(0.02)
                assert not late.done() and r.held() == held
                await bus.resume(cancelled=True)
                await asyncio.gather(*writes)
                assert await late in (bytes([1]) * 4096, bytes(4096))
            assert r.front.queue.connections == connections
            assert await disk.read(199 * 4096, 4096) == bytes([199]) * 4096
            await r.gone()

    asyncio.run(run())


def test_a_suspend_waits_for_every_queue():
    """One queue has nothing in flight any more; the other one has."""

    async def run():
        async with rig(front=front_with(num_queues=2)) as r:
            await r.plug("memory:1M")
            await r.connected()
            gated, queue = Gated(r.back._storage), r.front.queue
            for link in r.back._links:
                link.queue._storage = gated
            write = asyncio.ensure_future(r.disk.write(0, bytes(4096)))
            await until(lambda: r.back.sysctl()["inflight"]() == 1)
            gated.flushing.clear()
            flush = asyncio.ensure_future(r.disk.flush())
            await until(lambda: r.back.sysctl()["inflight"]() == 2)
            suspended = asyncio.ensure_future(r.guest.front.suspend())
            await until(lambda: queue.on_idle is not None)
            gated.flushing.set()
            await flush
            assert sorted(len(connection.shadow) for connection in queue.connections) == [0, 1]
            await asyncio.sleep(0.02)
            assert not suspended.done()
            gated.gate.set()
            await asyncio.wait_for(suspended, 5)
            assert write.done()
            await r.guest.front.resume(cancelled=True)
            await r.gone()

    asyncio.run(run())


def test_what_was_in_flight_on_any_queue_goes_out_again(monkeypatch):
    """A real resume, under another number, to a back end that has fewer queues: callers notice nothing."""
    monkeypatch.setattr(xbd, "DRAIN_TIMEOUT", 0.05)

    async def run():
        async with rig(front=front_with(num_queues=4)) as r:
            await r.plug("memory:4M")
            await r.connected()
            front_dev, disk, queue = r.front_dev, r.disk, r.front.queue
            gated = Gated(r.back._storage)
            for link in r.back._links:
                link.queue._storage = gated
            writes = [
                asyncio.ensure_future(disk.write(n * 4096, bytes([n % 251]) * 4096 * (1 + n // 20 % 20)))
                for n in range(0, 900, 20)
            ]
            flush = asyncio.ensure_future(disk.flush())
            await until(lambda: r.back.sysctl()["inflight"]() >= 45)
            assert all(connection.shadow for connection in queue.connections)
            await r.guest.front.suspend()  # which waits for them in vain
            parked = asyncio.ensure_future(r.guest.hv.suspend())
            await r.world.machine.suspended(1)
            r.world.machine.resume(1, new_domid=5)
            await parked
            gated.gate.set()  # the old back end writes to the old memory, and answers nobody
            await r.world.unplug("vbd", r.devid, 1)
            await until(lambda: not r.dom0.back.devices)
            await r.world.tool.rm("/local/domain/1")
            await r.world.tool.mkdir("/local/domain/5")
            await r.world.tool.set_perms("/local/domain/5", ["n5"])
            r.guest.domid = 5
            await r.plug("memory:4M", xbbd_max_queues="2")
            store = await r.guest.connect()
            old, r.guest.store = r.guest.store, store
            await old.close()
            await r.guest.front.resume(cancelled=False, store=store, hv=r.guest.hv)
            await until(lambda: front_dev.state is XenbusState.CONNECTED)
            await asyncio.wait_for(asyncio.gather(*writes, flush), 10)
            assert len(queue.connections) == 2 and all(requests_by_queue(r))
            for n in range(0, 900, 20):
                length = 4096 * (1 + n // 20 % 20)
                assert await disk.read(n * 4096, length) == bytes([n % 251]) * length
            assert queue.inflight == queue.waiting == 0
            await r.world.unplug("vbd", r.devid, 5)
            await until(lambda: not r.guest.front.devices and not r.dom0.back.devices)
            await r.guest.back.resume(cancelled=False, store=store, hv=r.guest.hv)

    asyncio.run(run())


def test_the_nodes_vanish_under_load():
    async def run():
        async with rig(front=front_with(num_queues=4)) as r:
            await r.plug("memory:1M")
            await r.connected()
            disk, front_dev, back_dev = r.disk, r.front_dev, r.back_dev
            reads = [asyncio.ensure_future(disk.read(n % 200 * 4096, 4096)) for n in range(600)]
            await asyncio.sleep(0)
            await r.world.unplug("vbd", r.devid)
            for end in await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 10):
                assert isinstance(end, bytes | LinkDown)
            await until(lambda: not r.guest.front.devices and not r.dom0.back.devices)
            assert not any(front_dev.counts().values()) and not any(back_dev.counts().values())
            await until(lambda: r.held() == r.before)

    asyncio.run(run())


# -- fronts that do as they like


def test_each_queue_answers_on_its_own_ring():
    async def run():
        async with rig(front=lying(queues=4, order=1)) as r:
            front = await raw(r)
            for n in range(4):
                front.use(n)
                front.put(Op.READ, 100 + n, 0, front.word(n))
                front.push()
                assert (await front.answered(n + 1))[-1] == (100 + n, Op.READ, OKAY)
                assert [ring.rsp_cons for ring in front.rings] == [1] * (n + 1) + [0] * (3 - n)
            await r.gone()

    asyncio.run(run())


def test_a_barrier_of_one_queue_is_no_other_queues():
    """As in Linux's blkback: the rings know no order among themselves."""

    async def run():
        async with rig(front=lying()) as r:
            front = await raw(r)
            gated = Gated(r.back._storage)
            for link in r.back._links:
                link.queue._storage = gated
            front.put(Op.WRITE, 1, 0, front.word(0))
            front.put(Op.WRITE_BARRIER, 2, 8, front.word(1))
            front.push()
            await until(lambda: r.back._links[0].inflight == 2)
            front.use(1)
            front.put(Op.READ, 3, 16, front.word(2))
            front.push()
            assert await front.answered(1) == [(3, Op.READ, OKAY)]
            gated.gate.set()
            assert [ident for ident, _, _ in await front.answered(3)] == [3, 1, 2]
            await r.gone()

    asyncio.run(run())


async def raw(r, params="memory:1M", **keys):
    await r.plug(params, **keys)
    await until(lambda: r.guest.front.devices and r.dom0.back.devices)
    front_dev, back_dev = r.front_dev, r.back_dev
    await until(lambda: front_dev.state is back_dev.state is XenbusState.CONNECTED)
    return r.front


def test_one_ring_of_nonsense_ends_the_device_and_gives_back_all():
    async def run():
        async with rig(front=lying(queues=3)) as r:
            front = await raw(r)
            back_dev = r.back_dev
            front.use(0)
            front.put(Op.READ, 1, 0, front.word(0))
            front.push()
            await front.answered(1)
            front.use(2)
            front.ring.words[0] = 1 << 20
            front.channel.notify()
            await until(lambda: back_dev.state is XenbusState.CLOSED)
            assert "req_prod jumped" in await r.error_of(r.bnode)
            await until(lambda: not any(back_dev.counts().values()))
            await r.gone()

    asyncio.run(run())


LIES = {
    "no queue": ({"multi-queue-num-queues": 0}, "multi-queue-num-queues: 0, 1 to 4"),
    "one too many": ({"multi-queue-num-queues": 5}, "multi-queue-num-queues: 5, 1 to 4"),
    "very many": ({"multi-queue-num-queues": 2**32 - 1}, "multi-queue-num-queues: 4294967295, 1 to 4"),
    "a count that is none": ({"multi-queue-num-queues": "two"}, "multi-queue-num-queues"),
    "more than it published": ({"multi-queue-num-queues": 3}, "queue-2/event-channel is missing"),
    "one, whose keys are not there": ({"multi-queue-num-queues": 1}, "/event-channel is missing"),
    "a ref left out": ({"queue-1/ring-ref": None}, "queue-1/ring-ref is missing"),
    "a port left out": ({"queue-0/event-channel": None}, "queue-0/event-channel is missing"),
    "one ring twice": ({"queue-1/ring-ref": "queue-0/ring-ref"}, "queue-1/ring-ref: grant reference"),
    "one port twice": ({"queue-1/event-channel": "queue-0/event-channel"}, "queue-1/event-channel: port"),
    "a ref that is none": ({"queue-1/ring-ref": "x"}, "queue-1/ring-ref"),
    "a ref of 40 bits": ({"queue-1/ring-ref": 2**40}, "no grant reference"),
    "a ref never granted": ({"queue-1/ring-ref": 4711}, "4711"),
    "a port never allocated": ({"queue-1/event-channel": 9999}, "9999"),
    "larger rings than it published": ({"ring-page-order": 1}, "queue-0/ring-ref0 is missing"),
}


@pytest.mark.parametrize("lie", LIES)
def test_queues_that_lie(lie):
    lies, words = LIES[lie]

    async def run():
        async with rig(front=lying(lies=lies)) as r:
            await r.plug("memory:1M")
            await until(lambda: r.dom0.back.devices)
            back_dev = r.back_dev
            await until(lambda: back_dev.state is XenbusState.CLOSED)
            assert words in await r.error_of(r.bnode)
            assert not any(back_dev.counts().values())
            await r.gone()

    asyncio.run(run())


def test_a_front_that_knows_of_no_queues_is_served():
    async def run():
        async with rig(front=RawFront) as r:
            front = await raw(r)
            front.put(Op.READ, 1, 0, front.word(0))
            front.push()
            assert await front.answered(1) == [(1, Op.READ, OKAY)]
            await r.gone()

    asyncio.run(run())


def test_all_queues_together_keep_no_more_pages_than_one_device_may():
    async def run():
        async with rig(front=front_with(num_queues=4)) as r:
            await r.plug("memory:4M", xbbd_max_persistent_grants="40")
            await r.connected()
            data = random.Random(9).randbytes(4 * MIB)
            await asyncio.gather(*(r.disk.write(n << 15, data[n << 15 : (n + 1) << 15]) for n in range(128)))
            for _ in range(3):
                parts = await asyncio.gather(*(r.disk.read(n << 14, 1 << 14) for n in range(256)))
                assert b"".join(parts) == data
                assert r.back._grants.pages <= 40
            assert r.back.counters.errors == 0
            await r.gone()

    asyncio.run(run())
