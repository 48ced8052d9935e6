"""Requests at any byte over blocks that take whole sectors only."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.drivers.block.nbd.aligned import AlignedBlocks

SECTOR, SECTORS = 512, 8


class Strict:
    """Refuses what is not whole sectors, and gives way within every call."""

    size, sector_size, readonly = SECTOR * SECTORS, SECTOR, False

    def __init__(self):
        self.data = bytearray(self.size)

    async def read_into(self, offset, buffer):
        assert offset % SECTOR == 0 and buffer.nbytes % SECTOR == 0
        await asyncio.sleep(0)
        buffer[:] = self.data[offset : offset + buffer.nbytes]
        await asyncio.sleep(0)

    async def write(self, offset, data):
        assert offset % SECTOR == 0 and data.nbytes % SECTOR == 0
        await asyncio.sleep(0)
        self.data[offset : offset + data.nbytes] = data
        await asyncio.sleep(0)

    async def discard(self, offset, length):
        assert offset % SECTOR == 0 and length % SECTOR == 0
        self.data[offset : offset + length] = bytes(length)

    async def flush(self):
        pass


ranges = st.tuples(st.integers(0, Strict.size - 1), st.integers(1, 1500)).map(
    lambda pair: (pair[0], min(pair[1], Strict.size - pair[0]))
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(["write", "zero", "read", "discard"]), ranges), max_size=10))
def test_it_is_what_a_plain_buffer_is(steps):
    async def main():
        disk, model = Strict(), bytearray(Strict.size)
        blocks = AlignedBlocks(disk)
        for number, (what, (start, length)) in enumerate(steps, 1):
            end = start + length
            if what == "write":
                model[start:end] = bytes([number]) * length
                await blocks.write(start, memoryview(bytes([number]) * length))
            elif what == "zero":
                model[start:end] = bytes(length)
                await blocks.write_zeroes(start, length)
            elif what == "discard":
                first, last = -(-start // SECTOR) * SECTOR, end - end % SECTOR
                model[first:last] = bytes(max(0, last - first))
                await blocks.discard(start, length)
            else:
                got = memoryview(bytearray(length))
                await blocks.read_into(start, got)
                assert got == model[start:end]
            assert disk.data == model

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(cuts=st.sets(st.integers(1, Strict.size - 1), max_size=12))
def test_neighbours_written_at_once_do_not_undo_each_other(cuts):
    edges = [0, *sorted(cuts), Strict.size]

    async def main():
        disk = Strict()
        blocks = AlignedBlocks(disk)
        expected = bytearray()
        writes = []
        for number, (start, end) in enumerate(pairwise(edges), 1):
            expected += bytes([number]) * (end - start)
            writes.append(blocks.write(start, memoryview(bytes([number]) * (end - start))))
        async with asyncio.timeout(5):
            await asyncio.gather(*writes)
        assert disk.data == expected

    asyncio.run(main())


def test_a_whole_sector_written_meanwhile_is_not_undone():
    async def main():
        disk = Strict()
        blocks = AlignedBlocks(disk)
        async with asyncio.timeout(5):
            await asyncio.gather(
                blocks.write(100, memoryview(b"b" * 10)), blocks.write(0, memoryview(b"a" * SECTOR))
            )
        assert disk.data[:100] == b"a" * 100
        assert disk.data[110:SECTOR] == b"a" * (SECTOR - 110)

    asyncio.run(main())


def test_a_cancelled_wait_for_the_lock_lets_the_others_in():
    async def main():
        disk = Strict()
        blocks = AlignedBlocks(disk)
        first = asyncio.create_task(blocks.write(0, memoryview(bytes([1]) * 512)))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(blocks.write(3, memoryview(b"xx")))
        await asyncio.sleep(0)
        behind = asyncio.create_task(blocks.write(512, memoryview(bytes([2]) * 512)))
        await asyncio.sleep(0)
        waiting.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(first, behind)
        assert disk.data[:1024] == bytes([1]) * 512 + bytes([2]) * 512

    asyncio.run(main())
