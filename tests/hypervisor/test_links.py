"""A channel's end on its own: what happens between a binding and the word of it."""

import asyncio
import os

from xenbus.hypervisor.broker_links import BrokerChannel, LinkEnd
from xenbus.hypervisor.broker_wire import LINK_PORTS
from xenbus.hypervisor.memory import F_SEAL_SEAL, add_seals, sealed_memfd


async def _closed(channel):
    pass


def test_a_kick_before_the_word_of_the_binding_is_not_lost():
    async def main():
        bell, other = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        pending = sealed_memfd("pending", 2 * LINK_PORTS)
        add_seals(pending, F_SEAL_SEAL)
        link = LinkEnd((bell, os.dup(other), pending), 0)
        channel = BrokerChannel(1, 0, lambda: None, _closed)
        channel.notify()
        channel.bind(link, 0)
        assert link.outbox[0] == 1
        assert os.eventfd_read(other) == 1
        link.close()
        os.close(other)

    asyncio.run(main())
