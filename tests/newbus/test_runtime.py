"""Mailboxes, deadlines that hold, waiting for boot."""

from __future__ import annotations

import asyncio
import logging
import signal

import pytest
from tests.support.until import until

from xenbus.errors import DeadlineError, XenbusError
from xenbus.newbus import BootHold
from xenbus.newbus.runtime import Mailbox, runaways, sync_limit, wait_boot, within


def test_events_come_in_order_one_at_a_time_and_equal_ones_that_wait_are_one():
    async def run():
        heard, gate = [], asyncio.Event()

        async def handle(event):
            heard.append(event)
            await gate.wait()

        box = Mailbox("box", handle)
        assert box.idle
        box.post("a")
        await until(lambda: heard == ["a"])
        for event in ("b", "a", "b", "c", "a"):
            box.post(event)
        assert len(box) == 3
        gate.set()
        await until(lambda: box.idle)
        assert heard == ["a", "b", "a", "c"]
        assert len(asyncio.all_tasks()) == 1  # nothing waits for the next event

    asyncio.run(run())


def test_an_event_that_fails_loses_itself_alone(caplog):
    async def run():
        heard = []

        async def handle(event):
            heard.append(event)
            raise RuntimeError("no")

        box = Mailbox("box", handle)
        box.post(1)
        box.post(2)
        await until(lambda: box.idle)
        assert heard == [1, 2]

    with caplog.at_level(logging.CRITICAL, "xenbus.newbus"):
        asyncio.run(run())


def test_pause_clear_and_cancel():
    async def run():
        heard, dropped = [], []

        class Waited:
            def dropped(self):
                dropped.append(self)

        async def handle(event):
            heard.append(event)
            if event == "hang":
                await asyncio.Event().wait()

        box = Mailbox("box", handle)
        box.pause()
        box.post("a")
        await asyncio.sleep(0)
        assert heard == [] and len(box) == 1
        box.go_on()
        await until(lambda: box.idle)
        box.post("hang")
        await until(lambda: heard == ["a", "hang"])
        waited = Waited()
        box.post(waited)
        task = box.cancel()
        await asyncio.wait({task}, timeout=1)
        assert task.cancelled() and dropped == [waited] and box.idle
        box.post("b")
        await until(lambda: box.idle)
        assert heard == ["a", "hang", "b"]
        box.post("last")
        await box.stand_still()
        box.clear()
        assert box.idle

    asyncio.run(run())


def test_within():
    async def run():
        async def answer():
            return 42

        async def fail():
            raise KeyError("x")

        assert await within(1, answer(), "an answer", "us") == 42
        with pytest.raises(KeyError):
            await within(1, fail(), "an answer", "us")
        with pytest.raises(DeadlineError, match="for an answer; its driver owed"):
            await within(0.01, asyncio.Event().wait(), "an answer", "its driver")

    asyncio.run(run())


def test_a_callback_that_ends_as_cancelled_is_its_own_failure():
    """Of a task that it awaited and somebody cancelled: not taken for a cancellation of who waits here."""

    async def run():
        async def stray():
            other = asyncio.ensure_future(asyncio.Event().wait())
            asyncio.get_running_loop().call_soon(other.cancel)
            await other

        with pytest.raises(XenbusError, match="attach of xbd0 ended as cancelled"):
            await within(1, stray(), "attach of xbd0", "its driver")

    asyncio.run(run())


def test_a_callback_that_swallows_its_cancellation_holds_up_nobody(monkeypatch, caplog):
    monkeypatch.setattr("xenbus.newbus.runtime.CANCEL_GRACE", 0.01)

    async def run():
        gate = asyncio.Event()

        async def deaf():
            while not gate.is_set():
                try:
                    await gate.wait()
                except asyncio.CancelledError:
                    pass

        with pytest.raises(DeadlineError):
            await within(0.01, deaf(), "the end", "nobody")
        assert runaways() == 1
        gate.set()
        await until(lambda: runaways() == 0)

    with caplog.at_level(logging.CRITICAL, "xenbus.newbus"):
        asyncio.run(run())


def test_a_cancelled_wait_ends_what_it_waited_for():
    async def run():
        ended = asyncio.Event()

        async def work():
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        task = asyncio.ensure_future(within(5, work(), "x", "y"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(run())


def test_wait_boot():
    async def run():
        hold, now = BootHold(), asyncio.get_running_loop().time
        assert await wait_boot(hold, 1) == []
        token = hold.hold("quick", now() + 5)
        hold.hold("slow", now() + 0.02)
        asyncio.get_running_loop().call_later(0.01, token.release)
        assert await wait_boot(hold, 1) == ["slow"]
        hold.hold("never", now() + 5)
        with pytest.raises(DeadlineError, match="never owed the next move"):
            await wait_boot(hold, 0.01)

    asyncio.run(run())


@pytest.mark.timeout(20, method="thread")  # or SIGALRM is the test runner's
def test_synchronous_code_that_does_not_end():
    def forever():
        while True:
            pass

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(DeadlineError, match="for a probe"), sync_limit(0.02, "a probe", "its driver"):
        forever()
    with sync_limit(0.02, "two probes", "their drivers"):
        for _ in range(2):
            with pytest.raises(DeadlineError):
                forever()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before
