"""Linux's xen-blkfront and our xbbd with each feature on and off, and with several queues."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from tests.support.dom0 import MIB, dom0, plugged, random_file
from tests.support.xl_guest import xl_guest
from xenbus.drivers.block.blkif import Op

pytestmark = pytest.mark.timeout(300)

# options of the disk; how many queues a guest of two CPUs takes, how many pages each ring has
CASES = {
    "all of it": ((), 2, 1),
    "one queue": ((("xbbd-max-queues", "1"),), 1, 1),
    "single pages": ((("xbbd-max-ring-page-order", "0"),), 2, 1),
    "no persistent grants": ((("xbbd-max-persistent-grants", "0"),), 2, 1),
    "no indirect requests": ((("xbbd-max-indirect-segments", "0"),), 2, 1),
    "no flush": ((("xbbd-flush", "0"),), 2, 1),
    "neither flush nor barrier": ((("xbbd-flush", "0"), ("xbbd-barrier", "0")), 2, 1),
    "no discard": ((("discard-enable", "0"),), 2, 1),
    "nothing at all": (
        tuple(
            (key, "0")
            for key in (
                "xbbd-max-ring-page-order", "xbbd-max-persistent-grants", "xbbd-max-indirect-segments",
                "xbbd-flush", "xbbd-barrier", "discard-enable",
            )
        ),
        2,
        1,
    ),
}  # fmt: skip


def test_linux_with_each_of_them(tmp_path):
    """One guest, a disk for each case: what it reads and writes is right, and on the rings that it says."""

    async def main():
        file = tmp_path / "disk.img"
        async with dom0() as runtime, xl_guest(runtime.store, "switches", vcpus=2) as guest:
            for name, (options, queues, pages) in CASES.items():
                expected = random_file(file, 8 * MIB)
                async with plugged(runtime, guest.domid, str(file), options=options):
                    await guest.run("for i in $(seq 100); do [ -b /dev/xvda ] && break; sleep 0.1; done")
                    back = next(
                        dev.driver for bus in runtime.buses for dev in bus.devices.values() if dev.driver
                    )
                    leaves = back.sysctl()
                    assert (leaves["queues"](), leaves["ring_pages"]()) == (queues, queues * pages), name
                    for cpu in range(2):  # blkfront's queues are its CPUs'
                        read = await guest.run(f"taskset {1 << cpu} sha256sum /dev/xvda")
                        assert read.split()[0] == expected, name
                        await guest.run("echo 3 >/proc/sys/vm/drop_caches")
                    await guest.run("dd if=/dev/urandom of=/tmp/new bs=64k count=32 2>/dev/null")
                    for cpu in range(2):
                        dd = f"dd if=/tmp/new of=/dev/xvda bs=64k seek={64 * cpu} conv=fsync"
                        await guest.run(f"taskset {1 << cpu} {dd} 2>/dev/null")
                    new = (await guest.run("sha256sum /tmp/new")).split()[0]
                    for start in (0, 4 * MIB):
                        there = file.read_bytes()[start : start + 2 * MIB]
                        assert hashlib.sha256(there).hexdigest() == new, name
                    used = [link.queue._ring.rsp_prod_pvt for link in back._links]
                    assert all(used), f"{name}: a queue was never used: {used}"
                    requests, off = back.counters.requests, dict(options)
                    assert back.counters.errors == 0, f"{name}: {back.counters.last_error}"
                    assert bool(requests[Op.INDIRECT]) == ("xbbd-max-indirect-segments" not in off), name
                    assert bool(requests[Op.FLUSH_DISKCACHE]) == ("xbbd-flush" not in off), name
                    kept = leaves["persistent_grants"]()
                    assert bool(kept) == ("xbbd-max-persistent-grants" not in off), name

    asyncio.run(main())
