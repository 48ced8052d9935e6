"""The selector that looks before it sleeps: nothing is missed, and an idle loop does not spin."""

from __future__ import annotations

import asyncio
import os
import selectors
import time

import pytest

from xenbus.hypervisor.polling import PollingSelector, polling_loop


def run(coroutine):
    with asyncio.Runner(loop_factory=polling_loop) as runner:
        return runner.run(coroutine)


def test_events_and_timers_come_through():
    async def main():
        loop = asyncio.get_running_loop()
        first, second = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        done = loop.create_future()
        seen = 0

        def ping():
            nonlocal seen
            os.eventfd_read(first)
            seen += 1
            if seen == 2000:
                done.set_result(None)
            else:
                os.eventfd_write(second, 1)

        def pong():
            os.eventfd_read(second)
            os.eventfd_write(first, 1)

        loop.add_reader(first, ping)
        loop.add_reader(second, pong)
        os.eventfd_write(first, 1)
        await asyncio.wait_for(done, 10)
        for fd in (first, second):
            loop.remove_reader(fd)
            os.close(fd)
        began = time.perf_counter()
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert time.perf_counter() - began >= 0.02

    run(main())


@pytest.fixture
def looks(monkeypatch):
    """How often the selector below was asked not to wait, in a list of one."""
    count = [0]
    select = selectors.EpollSelector.select

    def counted(self, timeout=None):
        count[0] += timeout == 0
        return select(self, timeout)

    monkeypatch.setattr(selectors.EpollSelector, "select", counted)
    return count


def test_short_waits_make_it_look_and_long_ones_end_that(looks, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with PollingSelector(window=0.02) as selector:
        bell = os.eventfd(0, os.EFD_NONBLOCK)
        selector.register(bell, selectors.EVENT_READ)
        os.eventfd_write(bell, 1)
        selector.select(1)  # ready at once: a short wait
        os.eventfd_read(bell)
        assert looks == [0]
        for _ in range(3):
            before = looks[0]
            assert selector.select(0.05) == []
            assert looks[0] > before
        before = looks[0]
        assert selector.select(0.05) == []
        assert looks[0] == before
        os.close(bell)


def test_a_timeout_shorter_than_the_window_is_kept():
    with PollingSelector(window=0.5) as selector:
        selector.select(0.001)
        began = time.perf_counter()
        selector.select(0.01)
        assert 0.009 < time.perf_counter() - began < 0.3
