"""The parts of a console alone: its log in a file, and one end of the ring without a device."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xenbus.drivers.console.consif import ConsoleRing
from xenbus.drivers.console.link import ConsoleLink
from xenbus.drivers.console.logfile import LogFile


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(writes=st.lists(st.binary(max_size=3000), max_size=12), limit=st.integers(1, 4096))
def test_a_log_and_what_came_before_are_the_last_of_it(writes, limit, tmp_path):
    path, before = tmp_path / "log", tmp_path / "log.1"
    for old in (path, before):
        old.unlink(missing_ok=True)
    log = LogFile(path, limit)
    for data in writes:
        log.write(data)
        assert path.stat().st_size <= limit and (not before.exists() or before.stat().st_size == limit)
    log.close()
    log.write(b"after its end")
    said = b"".join(writes)
    kept = (before.read_bytes() if before.exists() else b"") + path.read_bytes()
    assert said.endswith(kept) and len(kept) >= min(len(said), limit)


class Behind:
    def __init__(self, to_send=b""):
        self.got, self.to_send, self.space = b"", bytearray(to_send), 1 << 16

    def room(self):
        return self.space

    def put(self, data):
        self.got += data

    def peek(self):
        return self.to_send

    def sent(self, count):
        del self.to_send[:count]


class Channel:
    kicks = 0

    def notify(self):
        self.kicks += 1


def with_link(check, to_send=b""):
    async def run():
        page = memoryview(bytearray(4096))
        ours, theirs = ConsoleRing(page, front=False), ConsoleRing(page, front=True)
        behind, channel = Behind(to_send), Channel()
        link = ConsoleLink(ours, behind, lambda error: pytest.fail(str(error)))
        check(link, theirs, behind, channel)
        link.stop()

    asyncio.run(run())


def test_whoever_begins_kicks_though_nothing_moves():
    """The one before may have taken all there was and not have come to say so: the other end would wait."""

    def check(link, theirs, behind, channel):
        link.start(channel)
        assert channel.kicks == 1

    with_link(check)


def test_a_move_is_followed_by_a_kick_and_no_move_by_none():
    def check(link, theirs, behind, channel):
        link.start(channel)
        channel.kicks = 0
        link.kicked()
        assert channel.kicks == 0
        theirs.transmit.write(b"hello")
        link.kicked()
        assert (behind.got, channel.kicks) == (b"hello", 1)
        behind.to_send += bytes(1500)
        link.pump()
        assert (theirs.receive.readable, len(behind.to_send), channel.kicks) == (1024, 476, 2)
        link.pump()  # there is no room
        assert channel.kicks == 2
        behind.space = 0
        theirs.transmit.write(b"more")
        link.kicked()
        assert (behind.got, channel.kicks) == (b"hello", 2)
        assert link.take_rest() == b"more"

    with_link(check)
