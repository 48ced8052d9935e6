"""What is left of a dead guest's devices goes, whichever type their back end has; the living keep theirs."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.embedded_store import embedded_store

from xenbus.bus import XenbusState as S
from xenbus.toolstack import burial
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import list_devices, write_device
from xenbus.toolstack.paths import DevicePaths

OWN = DiskSpec(5, "/img", "xvda", back_kind="xbbd").device()
LINUX = DiskSpec(5, "/img", "xvdb").device()
ALIVE = DiskSpec(6, "/img", "xvda", back_kind="xbbd").device()


def run(test):
    """`test(store, machine)`, as domain 0, with guests 5 and 6 that are introduced and have disks."""

    async def main():
        async with embedded_store(0, 5, 6) as (store, _, machine):
            await store.write("domid", "0")
            for domid in (5, 6):
                await store.introduce(domid, 0, machine.store_port(domid))
            for spec in (OWN, LINUX, ALIVE):
                await write_device(store, spec)
            async with asyncio.timeout(20):
                await test(store, machine)

    asyncio.run(main())


async def die(store, domid):
    """As libxl leaves it: released, and its own directories gone."""
    await store.release(domid)
    for path in (f"/local/domain/{domid}", f"/libxl/{domid}"):
        await store.rm(path)


def test_the_back_type_is_in_the_paths_and_the_record():
    async def test(store, machine):
        assert OWN.paths.back == "/local/domain/0/backend/xbbd/5/51712"
        assert OWN.paths.front == "/local/domain/5/device/vbd/51712"
        assert OWN.paths.back_error == "/local/domain/0/error/backend/xbbd/5/51712/error"
        assert await list_devices(store, 5) == [OWN, LINUX]
        assert OWN.rehomed(front_domid=9).paths.back == "/local/domain/0/backend/xbbd/9/51712"

    run(test)


@pytest.mark.parametrize("path", ["", "/local/domain/0", "/local/domain/0/backend/vbd/5", "/a/b/c/d/e/f/7/8"])
def test_no_back_end_s_path(path):
    with pytest.raises(ValueError, match="no back end"):
        DevicePaths.of_back("vbd", path)


def test_a_dead_guest_s_devices_go_once_they_are_closed():
    async def test(store, machine):
        assert await burial.bury_devices(store, ["xbbd", "vbd"]) == 0
        await die(store, 5)
        found = await burial.dead_devices(store, ["xbbd", "vbd"])
        assert {paths.back for paths in found} == {OWN.paths.back, LINUX.paths.back}
        task = asyncio.create_task(burial.bury_devices(store, ["xbbd"]))
        await asyncio.sleep(0)
        assert await store.exists(OWN.paths.back)
        await store.write(f"{OWN.paths.back}/state", str(int(S.CLOSED)))
        assert await task == 1
        assert not await store.exists("backend/xbbd/5") and await store.exists(LINUX.paths.back)
        assert await store.read_str(f"{ALIVE.paths.back}/state") == "1"

    run(test)


def test_one_that_does_not_close_goes_all_the_same(monkeypatch):
    monkeypatch.setattr(burial, "CLOSE_DEADLINE", 0.05)

    async def test(store, machine):
        await die(store, 5)
        assert await burial.bury_devices(store, ["xbbd"]) == 1
        assert not await store.exists("backend/xbbd/5")

    run(test)


def test_it_wakes_by_itself_and_after_an_error(monkeypatch):
    monkeypatch.setattr(burial, "AGAIN", 0.01)

    async def test(store, machine):
        failures = iter([burial.XenbusError("passing")])
        real = burial.bury_devices

        async def sometimes(store, kinds):
            for failure in failures:
                raise failure
            return await real(store, kinds)

        monkeypatch.setattr(burial, "bury_devices", sometimes)
        task = asyncio.create_task(burial.burying(store, ["xbbd"]))
        await store.write(f"{OWN.paths.back}/state", str(int(S.CLOSED)))
        await die(store, 5)
        await store.wait_for("backend/xbbd/5", lambda value: value is None, 10)
        task.cancel()
        await asyncio.wait({task})

    run(test)
