"""A raw front end connected to xbbd, for tests that put on its ring what they like. No test here."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.support.raw_vbd import RawFront
from tests.support.until import until
from tests.support.vbd import rig
from xenbus.bus import XenbusState
from xenbus.drivers.block import blkif

MIB = 1 << 20
OKAY, ERROR, UNSUPPORTED = blkif.BLKIF_RSP_OKAY, blkif.BLKIF_RSP_ERROR, blkif.BLKIF_RSP_EOPNOTSUPP


# The same check again, with other numbers.
TWINS = (
    "255 segments", "never granted write", "far beyond the disk", "discard of nothing", "indirect barrier",
    "65535 indirect", "a ring-ref of 40 bits", "an order that is none", "a size that is none",
)  # fmt: skip


def content(length: int = MIB) -> bytes:
    return random.Random(5).randbytes(length)


def lying(**attributes):
    return type("RawFront", (RawFront,), attributes)


def with_raw_front(path, check, *, front=RawFront, **keys):
    """Runs `check(rig, front)` with both Connected; afterwards nothing may be held."""
    path.write_bytes(content())

    async def run():
        async with rig(front=front) as r:
            await r.plug(str(path), **keys)
            await until(lambda: r.guest.front.devices and r.dom0.back.devices)
            front_dev, back_dev = r.front_dev, r.back_dev
            await until(lambda: front_dev.state is back_dev.state is XenbusState.CONNECTED)
            await check(r, r.front)
            await r.gone()

    asyncio.run(run())


def marked(cases):
    """All of them, each check once among the quick ones."""
    return [pytest.param(case, marks=pytest.mark.slow) if case in TWINS else case for case in cases]
