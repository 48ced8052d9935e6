"""The lab's guests themselves: what tests say to them, and that they outlive a save and a restore."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.dom0 import dom0
from tests.support.xl_guest import GuestError, python_guest, xl_guest

# What these show every other test stands on, the pairings above all.
pytestmark = [pytest.mark.timeout(240), pytest.mark.features]

RUNTIME = """
from xenbus.domain.runtime import DomainRuntime
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.xenstore.client import Client

async def connect():
    return await Client.connect("/dev/xen/xenbus")

store = await connect()
domid = int(await store.read_str("domid"))
await store.close()
runtime = DomainRuntime("front", LinuxHypervisor(domid), connect)
await runtime.start()
domid
"""


def test_python_in_a_guest():
    async def main():
        async with dom0() as runtime, python_guest(runtime.store, "python") as guest:
            assert await guest.call("x = 6\nx * factor", factor=7) == 42
            assert await guest.call("bytes(data) * 2", data=b"\0\xff") == b"\0\xff\0\xff"
            big = bytes(range(256)) * 200
            assert await guest.call("data[::-1]", data=big) == big[::-1]
            with pytest.raises(GuestError, match="ZeroDivisionError") as caught:
                await guest.call("def f():\n  1 / 0\nf()")
            assert caught.value.kind == "ZeroDivisionError"
            assert await guest.call("x + 1") == 7
            answers = await asyncio.gather(
                guest.call("ev = asyncio.Event(); await ev.wait(); 'waited'"), guest.call("ev.set()")
            )
            assert answers == ["waited", None]
            assert "xen_evtchn" in await guest.run("cat /proc/modules")
            assert await guest.call(RUNTIME) == guest.domid
            assert await guest.call("await runtime.stop()") is None
            await guest.run("modprobe xen-blkfront")

    asyncio.run(main())


@pytest.mark.parametrize("kind", [xl_guest, python_guest])
def test_saved_and_restored(kind, tmp_path):
    async def main():
        async with dom0() as runtime, kind(runtime.store, "saved", vcpus=2) as guest:
            await guest.run("echo before >/tmp/mark")
            old = guest.domid
            await guest.checkpoint(tmp_path / "copy")
            (tmp_path / "copy").unlink()
            assert await guest.run("cat /tmp/mark") == "before\n"
            for _ in range(2):
                await guest.save(tmp_path / "saved")
                await guest.restore(tmp_path / "saved")
                assert guest.domid > old
                old = guest.domid
                assert await guest.run("cat /tmp/mark") == "before\n"

    asyncio.run(main())
