"""An I/O as tasks see it: awaited, cancelled, timed out, failed, in debug mode and not."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from xenbus.drivers.block.diskio import READ, Io


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
