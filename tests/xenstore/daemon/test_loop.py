"""The loop of the daemon's process: what direct readers may do, and that all else is asyncio's."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xenbus.xenstore.daemon.loop import DirectLoop


@contextmanager
def pairs(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    made = [socket.socketpair() for _ in range(count)]
    try:
        for pair in made:
            for sock in pair:
                sock.setblocking(False)
        yield made
    finally:
        for pair in made:
            for sock in pair:
                sock.close()


def run(main) -> None:
    """Without a deadline of its own: a timer that waits would make the loop look up from its readers. (That
    pytest has one for each test is enough.)"""
    with asyncio.Runner(loop_factory=DirectLoop) as runner:
        runner.run(main())


def test_a_reader_and_a_writer_of_one_descriptor_both_run() -> None:
    async def main() -> None:
        loop, heard, writable = asyncio.get_running_loop(), asyncio.Queue(), asyncio.Event()
        with pairs(1) as [(near, far)]:
            loop.add_reader(near.fileno(), lambda: heard.put_nowait(near.recv(100)))
            loop.add_writer(near.fileno(), writable.set)
            far.send(b"1")
            assert await heard.get() == b"1"
            await writable.wait()
            assert loop.remove_writer(near.fileno())
            far.send(b"2")
            assert await heard.get() == b"2"
            assert loop.remove_reader(near.fileno()) and not loop.remove_reader(near.fileno())

    run(main)


def test_a_reader_that_ends_another_of_the_same_turn_is_the_last_to_run() -> None:
    async def main() -> None:
        loop, ran, done = asyncio.get_running_loop(), [], asyncio.Event()
        with pairs(2) as made:
            ends = [near.fileno() for near, _ in made]

            def first_wins(fd: int) -> None:
                ran.append(fd)
                for other in ends:
                    loop.remove_reader(other)
                loop.call_soon(done.set)

            for fd in ends:
                loop.add_reader(fd, first_wins, fd)
            for _, far in made:
                far.send(b"x")
            await done.wait()
            assert len(ran) == 1

    run(main)


def test_a_reader_that_raises_is_reported_and_the_loop_goes_on() -> None:
    async def main() -> None:
        loop, reports, heard = asyncio.get_running_loop(), [], asyncio.Queue()
        loop.set_exception_handler(lambda _, context: reports.append(context["exception"]))
        with pairs(1) as [(near, far)]:

            def reader() -> None:
                heard.put_nowait(near.recv(100))
                raise ValueError("ours")

            loop.add_reader(near.fileno(), reader)
            for data in (b"1", b"2"):
                far.send(data)
                assert await heard.get() == data
            assert [str(error) for error in reports] == ["ours"] * 2

    run(main)


def test_what_is_always_readable_holds_up_nobody_else() -> None:
    async def main() -> None:
        loop, turns = asyncio.get_running_loop(), []
        with pairs(2) as [(near, far), (left, right)]:
            far.send(b"never read")
            loop.add_reader(near.fileno(), turns.append, 1)
            await asyncio.sleep(0.001)
            right.send(b"a stream")
            reader, writer = await asyncio.open_connection(sock=left)
            assert await reader.readexactly(8) == b"a stream"
            writer.close()
            await writer.wait_closed()
            assert await asyncio.to_thread(os.getpid) == os.getpid()
            assert len(turns) > 3
            loop.remove_reader(near.fileno())

    run(main)


@pytest.mark.parametrize("later", ["call_soon", "call_later", "future", "thread", "stop"])
def test_what_a_reader_leads_to_is_done_without_another_event(later: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        with pairs(1) as [(near, far)]:

            def reader() -> None:
                loop.remove_reader(near.fileno())
                if later == "call_soon":
                    loop.call_soon(done.set_result, None)
                elif later == "call_later":
                    loop.call_later(0.001, done.set_result, None)
                elif later == "future":
                    done.set_result(None)
                elif later == "thread":
                    threading.Thread(target=loop.call_soon_threadsafe, args=(done.set_result, None)).start()
                else:
                    loop.stop()

            loop.add_reader(near.fileno(), reader)
            far.send(b"x")
            await done

    if later == "stop":
        with pytest.raises(RuntimeError, match="stopped before"):
            run(main)
    else:
        run(main)


def test_the_loop_gives_back_its_descriptors() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    run(lambda: asyncio.sleep(0))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
