"""Domains' lives on a real host: made, ended, killed, suspended, restored; nothing is left of any of it.

One `xenbus up` for the module; every test ends with what it began with.
"""

import asyncio
import contextlib
import hashlib
import os
import signal
import time

import pytest
from tests.support.hosts import Site, alive, up

from xenbus.domain.rpc import RemoteError
from xenbus.errors import DeadlineError, NotFound, UsageError, XenbusError
from xenbus.toolstack import domains
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import DeviceFailed, detach_device, wait_connected, write_device
from xenbus.toolstack.paths import DevicePaths

pytestmark = pytest.mark.slow
SIZE = 1 << 20


@pytest.fixture(scope="module")
def host():
    with up() as running:
        yield running


def run(host, test, seconds=45.0):
    """`test(site)`; whatever it made and did not end is an error."""

    async def main():
        async with asyncio.timeout(seconds), Site.open(host.root) as site:
            before = await site.baseline()
            try:
                await test(site)
            except BaseException:
                for info in await site.toolstack.domains():
                    if info.domid:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(info.pid or 0, signal.SIGCONT) if info.pid else None
                        await site.toolstack.destroy(info.domid)
                raise
            left = await site.left(before)
            assert not left, left

    asyncio.run(main())


def _sum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.asynccontextmanager
async def load(site, guest="g"):
    """Verified traffic on the guest's xbd0 meanwhile."""
    await site.operate(guest, "xbd0", "load_start", offset=SIZE // 2, length=SIZE // 2)
    result = {}
    yield result
    result |= await site.operate(guest, "xbd0", "load_stop")
    assert result["requests"] and not result["errors"], result


def test_a_guest_is_made_and_destroyed(host):
    async def test(site):
        info = await site.toolstack.create("g")
        assert (info.name, info.state) == ("g", "running") and alive(info.pid)
        home = f"/local/domain/{info.domid}"
        assert await site.store.read_str(f"{home}/name") == "g"
        for path, perms in {
            home: ["n0", f"r{info.domid}"],
            f"{home}/device": ["n0", f"r{info.domid}"],
            f"{home}/control": ["n0", f"r{info.domid}"],
            f"{home}/control/shutdown": [f"n{info.domid}"],
            f"{home}/data": [f"n{info.domid}"],
            f"/libxl/{info.domid}": ["n0"],
        }.items():
            assert [str(p) for p in await site.store.get_perms(path)] == perms, path
        with pytest.raises(UsageError, match="g: a domain of that name exists"):
            await site.toolstack.create("g")
        with pytest.raises(UsageError, match="a domain's name"):
            await site.toolstack.create("../g")
        await site.toolstack.destroy(info.domid)
        assert not alive(info.pid)
        await site.toolstack.destroy(info.domid)  # once more is nothing
        with pytest.raises(UsageError, match="domain 0"):
            await site.toolstack.destroy(0)

    run(host, test)


def test_a_create_that_fails_half_way_is_unmade(host):
    async def test(site):
        good, bad = DiskSpec(0, "memory:1M"), DiskSpec(0, "memory:1M", "xvdb", back_domid=77)
        with pytest.raises(UsageError, match="no domain 77"):
            await site.toolstack.create("g", [good.device(), bad.device()])

    run(host, test)


@pytest.mark.parametrize("rounds", [0, 1, 2, 5, 20])
def test_a_create_that_is_cancelled_is_unmade(host, rounds):
    """However far it was: also when the host had made the domain and its answer was still under way."""

    async def test(site):
        creating = asyncio.create_task(site.toolstack.create("g", [DiskSpec(0, "memory:1M").device()]))
        for _ in range(rounds):
            await asyncio.sleep(0)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert [info.name for info in await site.toolstack.domains()] == ["Domain-0"]

    run(host, test)


def test_devices_that_were_there_at_boot_and_an_orderly_end_under_load(host):
    async def test(site):
        image = site.image("boot.img", SIZE)
        info = await site.toolstack.create("g", [DiskSpec(0, str(image)).device()])
        paths = DevicePaths("vbd", 51712, info.domid, 0)
        await wait_connected(site.store, paths)
        assert (await site.operate("g", "xbd0", "digest"))["sha256"] == _sum(image)
        await site.operate("g", "xbd0", "load_start", offset=0, length=SIZE)
        await site.toolstack.poweroff(info.domid)
        assert not alive(info.pid)
        assert await site.toolstack.domains() == [await site.toolstack.find("Domain-0")]

    run(host, test)


def test_a_reboot_comes_back_with_its_disks(host):
    async def test(site):
        first, second = site.image("r1.img", SIZE), site.image("r2.img", SIZE)
        info = await site.toolstack.create("g")
        await site.disk("g", first)
        await site.disk("g", second, "xvdb", readonly=True)
        await site.toolstack.shutdown(info.domid, "reboot")

        async def reborn():
            found = [d for d in await site.toolstack.domains() if d.name == "g" and d.domid != info.domid]
            return found and found[0].state == "running" and found[0]

        again = await site.until(reborn)
        for devid in (51712, 51728):
            await wait_connected(site.store, DevicePaths("vbd", devid, again.domid, 0))
        assert again.pid != info.pid and not alive(info.pid)
        assert (await site.operate("g", "xbd0", "digest"))["sha256"] == _sum(first)
        assert (await site.operate("g", "xbd1", "info"))["readonly"]
        await site.toolstack.destroy(again.domid)

    run(host, test)


def test_a_cancelled_suspend_changes_nothing_under_load(host):
    async def test(site):
        image = site.image("s.img", SIZE)
        info = await site.toolstack.create("g")
        await site.disk("g", image)
        async with load(site):
            before = await site.ask("g", "counts")
            for _ in range(3):
                parked = await site.toolstack.suspend(info.domid)
                assert parked.state == "suspended" and parked.domid == info.domid
                resumed = await site.toolstack.resume(info.domid)
                assert resumed.state == "running"
            after = await site.ask("g", "counts")
        for what in ("ports", "watches", "devices"):
            assert before[what] == after[what], what
        assert after["granted_pages"] >= before["granted_pages"]  # the pool may grow with the load
        await site.toolstack.destroy(info.domid)

    run(host, test)


async def settled(site, name):
    """What the domain holds, once two looks in a row find the same: tasks of a handshake end in a moment."""
    last = None
    async with asyncio.timeout(10):
        while (now := await site.ask(name, "counts")) != last:
            last = now
            await asyncio.sleep(0.1)
    return now


def test_a_restore_under_load_has_another_domid_and_its_back_end_elsewhere(host):
    async def test(site):
        image = site.image("m.img", SIZE)
        storage = await site.toolstack.create("storage")
        info = await site.toolstack.create("g")
        await site.disk("g", image)
        counts = await settled(site, "g")
        async with load(site):
            for back in (storage.domid, 0, None):
                old = (await site.toolstack.find("g")).domid
                await site.toolstack.suspend(old)
                info = await site.toolstack.restore(old, back_domid=back)
                assert info.domid > old
                await wait_connected(site.store, DevicePaths("vbd", 51712, info.domid, back or 0))
                assert not await site.store.exists(f"/local/domain/{old}")
                assert not await site.store.exists(f"/libxl/{old}")
        assert (await site.operate("g", "xbd0", "digest"))["sha256"] == _sum(image)
        now = await settled(site, "g")
        for what in ("ports", "watches", "transactions", "devices", "tasks"):
            assert now[what] == counts[what], what
        assert "xbbd" not in await site.lines("storage")
        await site.toolstack.destroy(info.domid)
        await site.toolstack.destroy(storage.domid)

    run(host, test)


def test_a_restore_that_cannot_be_changes_nothing(host):
    async def test(site):
        image = site.image("m.img", SIZE)
        info = await site.toolstack.create("g")
        await site.disk("g", image)
        for call in (site.toolstack.restore(info.domid), site.toolstack.resume(info.domid)):
            with pytest.raises(UsageError, match=r"running, not suspended"):
                await call
        await site.toolstack.suspend(info.domid)
        with pytest.raises(NotFound, match="no domain '77'"):
            await site.toolstack.restore(info.domid, back_domid=77)
        for reason in ("suspend", "poweroff"):
            with pytest.raises(UsageError, match="is suspended: it can't obey"):
                await site.toolstack.shutdown(info.domid, reason)
        await site.toolstack.resume(info.domid)
        assert (await site.operate("g", "xbd0", "digest"))["sha256"] == _sum(image)
        await site.toolstack.destroy(info.domid)

    run(host, test)


def test_of_two_restores_and_a_resume_one_wins_and_the_guest_lives(host):
    async def test(site):
        image = site.image("m.img", SIZE)
        info = await site.toolstack.create("g")
        await site.disk("g", image)
        await site.toolstack.suspend(info.domid)
        results = await asyncio.gather(
            site.toolstack.restore(info.domid),
            site.toolstack.restore(info.domid),
            return_exceptions=True,
        )
        assert sorted(isinstance(result, XenbusError) for result in results) == [False, True], results
        found = await site.toolstack.find("g")
        await wait_connected(site.store, DevicePaths("vbd", 51712, found.domid, 0))
        assert (await site.operate("g", "xbd0", "digest"))["sha256"] == _sum(image)
        await site.toolstack.suspend(found.domid)
        results = await asyncio.gather(
            site.toolstack.restore(found.domid), site.toolstack.resume(found.domid), return_exceptions=True
        )
        assert sorted(isinstance(result, XenbusError) for result in results) == [False, True], results
        found = await site.toolstack.find("g")
        await wait_connected(site.store, DevicePaths("vbd", 51712, found.domid, 0))
        assert (await site.operate("g", "xbd0", "digest"))["sha256"] == _sum(image)
        await site.toolstack.destroy(found.domid)

    run(host, test)


def test_a_guest_that_suspends_by_itself_is_seen_and_can_go_on(host):
    async def test(site):
        info = await site.toolstack.create("g")
        await site.store.write(f"/local/domain/{info.domid}/control/shutdown", "suspend")

        async def parked():
            return (await site.toolstack.find("g")).state == "suspended"

        await site.until(parked)
        assert (await site.toolstack.resume(info.domid)).state == "running"
        await site.ask("g", "counts")
        await site.toolstack.destroy(info.domid)

    run(host, test)


def test_a_suspended_domain_can_be_destroyed_killed_and_detached_from(host):
    async def test(site):
        image = site.image("m.img", SIZE)
        for kill in (False, True):
            info = await site.toolstack.create("g")
            await site.disk("g", image)
            await site.toolstack.suspend(info.domid)
            if kill:
                os.kill(info.pid, signal.SIGKILL)
                await site.gone("g")
            else:
                await site.toolstack.destroy(info.domid)

    run(host, test)


def test_who_does_not_answer_is_told_at_the_deadline_and_the_request_is_withdrawn(host):
    async def test(site):
        info = await site.toolstack.create("g")
        shutdown = f"/local/domain/{info.domid}/control/shutdown"
        os.kill(info.pid, signal.SIGSTOP)
        for reason in ("suspend", "poweroff"):
            with pytest.raises(DeadlineError, match=rf"'{reason}' to be acknowledged; domain {info.domid}"):
                await site.toolstack.shutdown(info.domid, reason, 0.2)
            assert await site.store.read(shutdown) == b""
        os.kill(info.pid, signal.SIGCONT)
        await site.ask("g", "counts")
        assert (await site.toolstack.find("g")).state == "running"
        await site.toolstack.destroy(info.domid)

    run(host, test)


@pytest.mark.parametrize("reason", ["suspend", "poweroff"])
def test_a_guest_that_dies_while_it_is_asked_ends_the_wait(host, reason):
    async def test(site):
        info = await site.toolstack.create("g")
        os.kill(info.pid, signal.SIGSTOP)
        asking = asyncio.create_task(getattr(site.toolstack, reason)(info.domid))

        async def asked():
            return await site.store.read(f"/local/domain/{info.domid}/control/shutdown") == reason.encode()

        await site.until(asked)
        os.kill(info.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            if reason == "poweroff":
                await asking  # it is off
            else:
                with pytest.raises(XenbusError):
                    await asking
        await site.gone("g")

    run(host, test)


def test_sigkill_of_a_guest_under_load_is_buried(host):
    async def test(site):
        image = site.image("k.img", SIZE)
        info = await site.toolstack.create("g")
        await site.disk("g", image)
        await site.disk("g", "memory:1M", "xvdb")
        await site.operate("g", "xbd0", "load_start", offset=0, length=SIZE)
        os.kill(info.pid, signal.SIGKILL)
        began = time.monotonic()
        await site.gone("g")
        assert time.monotonic() - began < 5.0

        async def closed():
            return "xbbd" not in await site.lines("Domain-0")

        await site.until(closed, 5.0)

    run(host, test)


def test_sigkill_of_a_driver_domain_is_an_error_in_the_guest_and_nothing_hangs(host):
    async def test(site):
        image, other = site.image("d.img", SIZE), site.image("e.img", SIZE)
        storage, info = await site.toolstack.create("storage"), await site.toolstack.create("g")
        paths = await site.disk("g", image, back=storage.domid)
        await site.operate("g", "xbd0", "load_start", offset=0, length=SIZE)
        os.kill(storage.pid, signal.SIGKILL)
        await site.gone("storage")
        async with asyncio.timeout(15):
            with pytest.raises(
                (RemoteError, NotFound), match=rf"the back end .*/{storage.domid}/backend.* is gone|no device"
            ):
                await site.operate("g", "xbd0", "digest")
        async with asyncio.timeout(15):
            assert "Connected" not in await site.lines("g")
            assert await detach_device(site.store, paths)
        # The guest is none the worse for it.
        await site.disk("g", other, "xvdb")
        assert (await site.operate("g", "xbd1", "digest"))["sha256"] == _sum(other)
        await site.toolstack.destroy(info.domid)

    run(host, test)


def test_an_orderly_end_does_not_wait_for_ever_for_a_driver_domain_that_hangs(host, monkeypatch):
    monkeypatch.setattr(domains, "CLOSE_DEADLINE", 0.5)

    async def test(site):
        storage, info = await site.toolstack.create("storage"), await site.toolstack.create("g")
        await site.disk("g", "memory:1M", back=storage.domid)
        os.kill(storage.pid, signal.SIGSTOP)
        began = time.monotonic()
        await site.toolstack.poweroff(info.domid)
        assert time.monotonic() - began < 9.0  # it ended by itself, before anybody killed it
        await site.toolstack.destroy(storage.domid)

    run(host, test)


@pytest.mark.parametrize("driver", [False, True], ids=["domain 0", "driver domain"])
def test_a_guest_that_goes_in_the_middle_of_the_handshake_keeps_nobody_waiting(host, driver):
    async def test(site):
        storage = (await site.toolstack.create("storage")).domid if driver else 0
        for delay in (0.0, 0.002, 0.005, 0.01, 0.02):
            info = await site.toolstack.create("g")
            await write_device(site.store, DiskSpec(info.domid, "memory:1M", back_domid=storage).device())
            await asyncio.sleep(delay)
            began = time.monotonic()
            await site.toolstack.destroy(info.domid)
            assert time.monotonic() - began < 5.0, delay
        if driver:
            await site.toolstack.destroy(storage)

    run(host, test)


def test_everybody_buries_at_once(host):
    """Domain 0's monitor, and three operators."""

    async def test(site):
        image = site.image("b.img", SIZE)
        for kill in (False, True):
            info = await site.toolstack.create("g")
            await site.disk("g", image)
            if kill:
                os.kill(info.pid, signal.SIGKILL)
            await asyncio.gather(*(site.toolstack.destroy(info.domid) for _ in range(3)))
            await site.gone("g")

    run(host, test)


def test_attach_while_its_domain_is_destroyed_leaves_nothing(host):
    async def test(site):
        for delay in (0.0, 0.005, 0.02, 0.05):
            info = await site.toolstack.create("g")

            async def attach(domid=info.domid):
                for number in range(100):
                    spec = DiskSpec(domid, "memory:1M", f"d{number}").device()
                    await write_device(site.store, spec)
                    await asyncio.sleep(0)

            attaching = asyncio.create_task(attach())
            await asyncio.sleep(delay)
            await site.toolstack.destroy(info.domid)
            with pytest.raises(UsageError, match="no domain"):
                await attaching

    run(host, test)


def test_destroy_of_a_driver_domain_and_then_of_its_guest(host):
    async def test(site):
        storage, info = await site.toolstack.create("storage"), await site.toolstack.create("g")
        await site.disk("g", "memory:1M", back=storage.domid)
        await site.toolstack.destroy(storage.domid)
        assert not await site.store.exists(f"/local/domain/{storage.domid}")
        await site.toolstack.destroy(info.domid)

    run(host, test)


def test_a_disk_that_cannot_be_opened_says_so_in_the_drivers_words(host):
    async def test(site):
        info = await site.toolstack.create("g")
        for image, words in {"/nowhere/x.img": "/nowhere/x.img", "memory:nonsense": "nonsense"}.items():
            spec = DiskSpec(info.domid, image).device()
            await write_device(site.store, spec)
            with pytest.raises(DeviceFailed, match=words):
                await wait_connected(site.store, spec.paths, 10.0)
            async with asyncio.timeout(10):
                await detach_device(site.store, spec.paths, timeout=5.0)
        await site.toolstack.destroy(info.domid)

    run(host, test)


def test_twenty_disks_come_and_go_together(host):
    async def test(site):
        info = await site.toolstack.create("g")
        names = [f"d{number}" for number in range(20)]
        made = await asyncio.gather(*(site.disk("g", "memory:1M", name) for name in names))
        assert (await site.ask("g", "counts"))["devices"] >= 20
        await asyncio.gather(*(detach_device(site.store, paths, timeout=10.0) for paths in made[:10]))
        await site.toolstack.destroy(info.domid)

    run(host, test)
