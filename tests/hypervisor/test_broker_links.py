"""One end of a link by itself: the other end is a hand that writes bytes and rings."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.support.hypervisor_actor import open_files
from xenbus.errors import HypervisorError
from xenbus.hypervisor import broker_links
from xenbus.hypervisor.broker_links import BrokerChannel, LinkEnd
from xenbus.hypervisor.broker_wire import LINK_PORTS
from xenbus.hypervisor.memory import SIZE_SEALS, Region, add_seals, sealed_memfd

SIZE = 2 * LINK_PORTS


class OtherSide:
    """Rings side 0 of a link."""

    def __init__(self) -> None:
        pending = sealed_memfd("test", SIZE)
        add_seals(pending, SIZE_SEALS)
        self.region = Region.of_fd(pending, SIZE, writable=True)
        bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.bell = os.dup(bells[0])
        self.end = LinkEnd((bells[0], bells[1], pending), 0)

    def ring(self, *indices: int) -> None:
        for index in indices:
            self.region.view[index] = 1
        os.eventfd_write(self.bell, 1)

    def channel(self, index, handler):
        channel = BrokerChannel(index + 1, 1, handler, _gone)
        channel.bind(self.end, index)
        return channel

    def close(self) -> None:
        self.end.close()
        self.end.close()
        os.close(self.bell)
        self.region.close()


async def _gone(_):
    pass


async def turns():
    for _ in range(4):
        await asyncio.sleep(0)


def run(test):
    async def main():
        other = OtherSide()
        try:
            await test(other)
        finally:
            other.close()

    before = open_files()
    asyncio.run(main())
    assert open_files() == before


@pytest.mark.parametrize("ordered", [True, False], ids=["total store order", "weaker order"])
def test_handlers_run_for_the_bytes_that_are_set(ordered, monkeypatch):
    async def test(other):
        hits = []
        for index in (0, 7, 300):
            other.channel(index, lambda index=index: hits.append(index))
        other.ring(7, 300)
        await turns()
        assert hits == ([7, 300] if ordered else [0, 7, 300])
        assert not any(other.region.view[:400])
        other.ring()
        await turns()
        assert hits == ([7, 300] if ordered else [0, 7, 300] * 2)

    monkeypatch.setattr(broker_links, "_TOTAL_STORE_ORDER", ordered)
    run(test)


def test_a_kick_that_came_before_the_channel_is_not_lost():
    async def test(other):
        hits = []
        other.channel(5, lambda: None)
        other.ring(3)  # within what is looked at
        other.ring(40)  # and beyond
        await turns()  # the doorbell is read, nobody listens
        for index in (3, 40):
            other.channel(index, lambda index=index: hits.append(index))
        await turns()
        assert hits == [3, 40]

    run(test)


def test_a_notify_before_the_word_of_the_binding_is_not_lost():
    """The binder may have told its peer by the store, which is faster than the broker's word."""

    async def test(other):
        channel = BrokerChannel(1, 1, lambda: None, _gone)
        channel.notify()
        channel.bind(other.end, 9)
        assert other.region.view[LINK_PORTS + 9] == 1
        assert os.eventfd_read(other.end.doorbell) == 1
        channel.unbind()
        channel.bind(other.end, 10)
        assert other.region.view[LINK_PORTS + 10] == 0

    run(test)


def test_closing_within_a_handler_silences_the_others_at_once():
    async def test(other):
        hits = []
        channels = []

        def first():
            hits.append("first")
            channels[1].drop()
            other.end.close()

        channels.append(other.channel(0, first))
        channels.append(other.channel(1, lambda: hits.append("second")))
        other.ring(0, 1)
        await turns()
        assert hits == ["first"]
        channels[0].notify()
        await channels[0].close()
        channels[0].unmask()

    run(test)


def test_an_index_used_again_does_not_hear_of_the_last_owner():
    async def test(other):
        hits = []
        old = other.channel(2, lambda: hits.append("old"))
        other.ring(2)
        old.drop()
        other.channel(2, lambda: hits.append("new"))
        await turns()
        assert hits == []

    run(test)


def test_a_pending_map_that_could_be_cut_short_is_refused():
    async def main():
        pending = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(pending, SIZE)
        with pytest.raises(HypervisorError):
            LinkEnd((os.eventfd(0), os.eventfd(0), pending), 0)

    before = open_files()
    asyncio.run(main())
    assert open_files() == before
