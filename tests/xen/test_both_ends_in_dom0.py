"""Our xbd and our xbbd, both in dom0, on real grants, event channels and the real store."""

from __future__ import annotations

import asyncio
import hashlib
import random

import pytest

from tests.support.dom0 import MIB, dom0, plugged, random_file, sha256

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("size", [4096, 65536, MIB])
def test_reads_and_writes_arrive(tmp_path, size):
    async def main():
        file = tmp_path / "disk.img"
        expected = random_file(file, 8 * MIB)
        async with dom0() as runtime:
            for _ in range(2):
                async with plugged(runtime, 0, str(file)) as spec:
                    disk = runtime.buses[0].devices[f"device/vbd/{spec.paths.devid}"].driver.disk
                    await disk.connected(10)
                    parts = [await disk.read(at, size) for at in range(0, 8 * MIB, max(size, 65536))]
                    if size >= 65536:
                        assert hashlib.sha256(b"".join(parts)).hexdigest() == expected
                    data = random.Random(size).randbytes(size)
                    await asyncio.gather(*(disk.write(n * MIB, data) for n in range(8)))
                    await disk.flush()
                    assert await disk.read(3 * MIB, size) == data
                there = file.read_bytes()
                assert all(there[n * MIB : n * MIB + size] == data for n in range(8))
                expected = sha256(file)

    asyncio.run(main())
