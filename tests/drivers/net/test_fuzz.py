"""Rings full of noise: each half serves what is good, or closes the device with a reason; nothing is left."""

from __future__ import annotations

import asyncio
import random
import struct

import pytest
from tests.drivers.net.test_chain import ADD, GSO
from tests.support.raw_vif import DATA_PAGES, RawBack, RawFront
from tests.support.until import until
from tests.support.vif import frame, rig

from xenbus.bus import XenbusState
from xenbus.drivers.net import Packet, Xn, netif

S = XenbusState
QUICK, SLOW = range(3), range(3, 30)
SEEDS = [*QUICK, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW)]
EDGES = (0, 1, 13, 14, 60, 1514, 4095, 4096, 4097, 0x7FFF, 0x8000, 0xFFFF)


async def open_or_closed(r, dev, node):
    """Whether it still stands. If not, it says why."""
    await asyncio.sleep(0)
    if dev.state is S.CONNECTED:
        return True
    assert await r.error_of(node)
    return False


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_from_a_front_end(seed):
    dice = random.Random(seed)

    def request(front):
        match dice.randrange(12):
            case 0:
                return dice.randbytes(netif.TX_SLOT_SIZE)
            case 1:
                return dice.choice((GSO, ADD)).ljust(netif.TX_SLOT_SIZE, b"\0")
            case _:
                ref = dice.choice(front.data.refs) if dice.randrange(20) else dice.randrange(1 << 32)
                flags = dice.choice((0, 0, 0, 1, 3, 4, 8, 12))
                size = dice.choice(EDGES) if dice.randrange(2) else dice.randrange(60, 4096)
                offset = dice.choice((0, 0, 0, 8, 4000))
                return netif.TX_REQUEST.pack(ref, offset, flags, dice.randrange(1 << 16), size)

    async def run():
        async with rig(front=RawFront) as r:
            await r.plug(mtu="9000")
            await r.states(S.CONNECTED, S.CONNECTED)
            front, dev = r.front, r.back_dev
            for _ in range(60):
                for _ in range(dice.randrange(min(front.tx.free(), 40) + 1)):
                    front.put_extra(request(front))
                for _ in range(dice.randrange(min(front.rx.free(), 20) + 1)):
                    # Never granted, or now and then a ring itself, into which a packet is written then.
                    ref = dice.choice((0, 7, 5000)) if dice.randrange(40) else front.pages.refs[0]
                    lies = {} if dice.randrange(10) else {"ref": ref}
                    front.post(dice.randrange(DATA_PAGES), ident=dice.randrange(1 << 16), **lies)
                front.push()
                r.far.put_many([Packet(frame(dice.choice((60, 1514, 9014)))) for _ in range(5)])
                if not await open_or_closed(r, dev, r.bnode):
                    break
                await until(lambda: not r.back._links or not r.back._links[0].tx._bringing)
            await r.gone()

    asyncio.run(run())


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_from_a_back_end(seed):
    dice = random.Random(seed)

    def response(slot):
        match dice.randrange(12):
            case 0:
                return dice.randbytes(netif.RX_SLOT_SIZE)
            case 1:
                return GSO
            case _:
                flags = dice.choice((0, 0, 0, 1, 3, 4, 8, 12, 16))
                size = dice.choice(EDGES) if dice.randrange(2) else dice.randrange(60, 4096)
                ident = slot if dice.randrange(20) else dice.randrange(1 << 16)
                return struct.pack("<HHHH", ident, dice.choice((0, 0, 0, 8, 4000)), flags, size)

    async def run():
        async with rig(Xn, RawBack) as r:
            await r.plug(mtu="9000")
            await r.states(S.CONNECTED, S.CONNECTED)
            await until(lambda: r.front.cable.connected and r.back.posted)
            back, dev = r.back, r.front_dev
            for _ in range(60):
                for _ in range(dice.randrange(len(back.posted) + 1)):
                    slot, _ = back.posted.pop(0)
                    back.rx.put_response(response(slot))
                for *_, ident, _ in back.requests[: dice.randrange(len(back.requests) + 1)]:
                    back.answer(
                        ident if dice.randrange(200) else dice.randrange(300), dice.choice((0, -1, 1))
                    )
                del back.requests[:]
                if back.tx is not None:
                    back.push()
                r.near.put_many([Packet(frame(dice.choice((60, 1514, 9014)))) for _ in range(5)])
                if not await open_or_closed(r, dev, r.fnode):
                    break
                await asyncio.sleep(0)
            await r.gone()

    asyncio.run(run())
