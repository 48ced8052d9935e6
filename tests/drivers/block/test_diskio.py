"""An I/O as tasks see it: awaited, cancelled, timed out, failed, in debug mode, in every kind of task."""

from __future__ import annotations

import asyncio
import contextvars

import pytest
from tests.support.raw_vbd import RawBack
from tests.support.vbd import rig

from xenbus.drivers.block import diskio
from xenbus.drivers.block.blkif import BLKIF_RSP_OKAY
from xenbus.drivers.block.diskio import READ
from xenbus.errors import UsageError

# asyncio.eager_task_factory came with Python 3.12.
FACTORIES = {
    "plain": None,
    **({"eager": asyncio.eager_task_factory} if hasattr(asyncio, "eager_task_factory") else {}),
}


def Io(op, offset, length, view):
    return diskio.Io(op, offset, length, view, asyncio.get_running_loop())


async def wait_for_it(io):
    return await io


def run(body):
    for debug in (True, False):
        asyncio.run(body(), debug=debug)


def test_its_task_goes_on_in_place():
    async def body():
        io = Io(READ, 0, 512, None)
        task = asyncio.create_task(wait_for_it(io))
        await asyncio.sleep(0)

        def handler():
            io.settle(None, b"x")
            assert not task.done()
            io.wake()
            assert task.done()
            io.wake()  # nobody waits any more

        asyncio.get_running_loop().call_soon(handler)
        assert await task == b"x"
        assert await io == b"x"  # over: no waiting

    run(body)


def test_its_task_keeps_its_context():
    async def body():
        who = contextvars.ContextVar("who", default="nobody")

        async def caller():
            who.set("caller")
            await io
            return who.get()

        io = Io(READ, 0, 512, None)
        task = asyncio.create_task(caller())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(lambda: (io.settle(), io.wake()))
        assert await task == "caller"
        assert who.get() == "nobody"

    run(body)


def test_cancelled_and_timed_out():
    async def body():
        io = Io(READ, 0, 512, None)
        task = asyncio.create_task(wait_for_it(io))
        await asyncio.sleep(0)
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert io.over
        assert not io.cancel()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await Io(READ, 0, 512, None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait_for_it(Io(READ, 0, 512, None)), 0.01)

    run(body)


def test_failed():
    async def body():
        io = Io(READ, 0, 512, None)
        asyncio.get_running_loop().call_soon(io.fail, ValueError("broken"))
        with pytest.raises(ValueError, match="broken"):
            await io
        with pytest.raises(ValueError, match="broken"):
            await io

    run(body)


def test_over_before_its_task_is_told():
    """Settled between the task's await and its turn."""

    async def body():
        io = Io(READ, 0, 512, None)
        io.settle(None, b"y")
        told = asyncio.get_running_loop().create_future()
        io.add_done_callback(lambda done: told.set_result(done.result()))
        assert await told == b"y"

    run(body)


def test_awaited_from_two_places():
    """The second one hears that at once, the first one is woken all the same."""

    async def body():
        io = Io(READ, 0, 512, None)
        first, second = asyncio.create_task(wait_for_it(io)), asyncio.create_task(wait_for_it(io))
        with pytest.raises(UsageError, match="read of 512 bytes at 0 is awaited already"):
            await second
        asyncio.get_running_loop().call_soon(lambda: (io.settle(None, b"x"), io.wake()))
        assert await first == b"x"

    run(body)


class Answering(RawBack):
    """Answers everything but what begins at a sector of `silent`."""

    silent = frozenset({1000, 1001, 1002})

    def kicked(self):
        taken = len(self.requests)
        super().kicked()
        for raw in self.requests[taken:]:
            op, _, _, ident, sector = self.abi.rw.unpack_from(raw)
            if sector not in self.silent:
                self.answer(ident, op, BLKIF_RSP_OKAY)


async def of_gather(disk):
    assert [len(part) for part in await asyncio.gather(*(disk.read(0, n * 512) for n in range(1, 70)))] == [
        n * 512 for n in range(1, 70)
    ]


async def of_gather_cancelled(disk):
    both = asyncio.gather(disk.read(1000 * 512, 512), disk.read(1001 * 512, 512))
    await asyncio.sleep(0)
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both


async def of_timeouts(disk):
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(disk.read(1000 * 512, 512), 0.01)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await disk.read(1001 * 512, 512)
    async with asyncio.timeout(5):
        await disk.read(0, 512)


async def of_a_task_group(disk):
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            hung = group.create_task(disk.read(1000 * 512, 512))
            good = group.create_task(disk.read(512, 512))
            bad = group.create_task(disk.read(1, 1))
    assert hung.cancelled() and good.done() and isinstance(bad.exception(), UsageError)
    assert caught.value.exceptions == (bad.exception(),)


async def of_a_shield(disk):
    inner = asyncio.ensure_future(disk.read(1000 * 512, 512))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(inner), 0.01)
    assert not inner.done()
    inner.cancel()
    await asyncio.wait([inner])
    assert inner.cancelled()


async def of_a_chain(disk):
    """Each answer's task starts the next reads, from within its own turn."""

    async def step(depth):
        await disk.read(0, 512)
        if depth:
            await asyncio.gather(step(depth - 1), step(depth - 1))

    await step(5)


async def of_tasks_with_one_context(disk):
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(disk.read(0, 512), context=context) for _ in range(5)]
    await asyncio.gather(*tasks)


USES = [
    of_gather,
    of_gather_cancelled,
    of_timeouts,
    of_a_task_group,
    of_a_shield,
    of_a_chain,
    of_tasks_with_one_context,
]


@pytest.mark.parametrize(
    "debug", [pytest.param(True, id="debug"), pytest.param(False, id="not debug", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("factory", FACTORIES)
def test_every_kind_of_task_reads_a_disk(factory, debug):
    """And after each the queue has nobody left, and the next one reads as before."""

    async def body():
        complaints = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        async with rig(back=Answering) as r:
            await r.plug("unused")
            await r.connected()
            loop.set_task_factory(FACTORIES[factory])
            for use in USES:
                await asyncio.wait_for(use(r.disk), 5)
                assert r.front.queue.waiting == 0
            back = r.back
            for raw in back.requests:
                _, _, _, ident, sector = back.abi.rw.unpack_from(raw)
                if sector in back.silent:
                    back.answer(ident, READ, BLKIF_RSP_OKAY)
            await asyncio.wait_for(r.disk.read(0, 512), 5)
            assert r.front.queue.inflight == 0
            loop.set_task_factory(None)
            await r.gone()
        assert not complaints

    asyncio.run(body(), debug=debug)


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_operation_in_every_kind_of_task(factory):
    """The drivers' own tasks, too: what an eager one does is done within whoever started it."""

    async def body():
        async with rig() as r:
            await r.plug("memory:1M")
            await r.connected()
            asyncio.get_running_loop().set_task_factory(FACTORIES[factory])
            disk = r.disk
            work = []
            for n in range(40):
                work += [disk.write(n * 8192, bytes([n]) * 8192), disk.read(n * 8192, 512)]
                if n % 10 == 0:
                    work += [disk.flush(), disk.write_barrier(n * 8192, bytes([n]) * 8192)]
            await asyncio.wait_for(asyncio.gather(*work), 5)
            await asyncio.wait_for(disk.discard(40 * 8192, 8192), 5)
            assert await disk.read(0, 40 * 8192) == b"".join(bytes([n]) * 8192 for n in range(40))
            await asyncio.wait_for(disk.write_barrier(0, b""), 5)
            asyncio.get_running_loop().set_task_factory(None)
            await r.gone()

    asyncio.run(body())
