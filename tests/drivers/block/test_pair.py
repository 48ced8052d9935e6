"""xbd and xbbd against each other: every operation, layout and feature, on the real store and hypervisor."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.support.vbd import rig
from xenbus.drivers.block import Xbbd, Xbd, blkif


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def image(tmp_path, length: int = 4 << 20):
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(length))
    return path


def test_read_write_flush(tmp_path):
    path = image(tmp_path)

    async def run():
        async with rig() as r:
            await r.plug(str(path))
            await r.connected()
            disk = r.disk
            assert disk.size == 4 << 20
            assert disk.sector_size == 512
            assert await disk.read(0, 4096) == path.read_bytes()[:4096]
            buffer = bytearray(4 << 20)
            await disk.read_into(0, buffer)
            assert buffer == path.read_bytes()
            await disk.write(8192, b"x" * 5120)
            await disk.flush()
            assert path.read_bytes()[8192 : 8192 + 5120] == b"x" * 5120
            assert await disk.read(7168, 8192) == path.read_bytes()[7168 : 7168 + 8192]
            await r.gone()

    asyncio.run(run())
