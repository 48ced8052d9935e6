"""xn and xnb against each other: every kind of packet and every feature, on the real store and hypervisor."""

from __future__ import annotations

import asyncio

from tests.support.vif import frame, with_rig



def test_frames_both_ways():
    async def check(r):
        assert (await r.exchange(frame(60))).data == frame(60)
        assert (await r.exchange(frame(1514, 2), back=True)).data == frame(1514, 2)
        assert r.front_dev.nameunit == "xn0"
        assert r.back_dev.nameunit == "xnb0"

    with_rig(check)
