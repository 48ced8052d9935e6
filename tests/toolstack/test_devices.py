"""Attach and detach as the store sees them: both halves at once, permissions, waits that say who owed."""

import asyncio
import contextlib

import pytest
from tests.support.embedded_store import embedded_store

from xenbus.bus import XenbusState as S
from xenbus.errors import DeadlineError, NotFound, UsageError
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import (
    DeviceFailed,
    detach_device,
    list_devices,
    read_state,
    remove_device,
    wait_connected,
    write_device,
)
from xenbus.xenstore.client import Client

SPEC = DiskSpec(5, "/img", "xvda", back_domid=2).device()
PATHS = SPEC.paths
FRONT, BACK = "/local/domain/5/device/vbd/51712", "/local/domain/2/backend/vbd/5/51712"


def run(test, *, domains=(0, 2, 5), attached=True):
    """`test(store, daemon)` with domains that have no driver: the test is both."""

    async def main():
        async with embedded_store(*domains) as (store, daemon, _):
            for domid in domains:
                for leaf in ("device", "backend", "error"):
                    await store.mkdir(f"/local/domain/{domid}/{leaf}")
            if attached:
                await write_device(store, SPEC)
            async with asyncio.timeout(20):
                await test(store, daemon)
            assert store.counts()["watches"] == 0 and store.counts()["transactions"] == 0

    asyncio.run(main())


async def _dump(store, path="/"):
    found = {}
    todo = [path]
    while todo:
        at = todo.pop()
        found[at] = (await store.read(at)).decode()
        todo += [f"{at.rstrip('/')}/{leaf}" for leaf in await store.directory(at)]
    return found


async def _states(store, back, front):
    await store.write(f"{BACK}/state", str(int(back)))
    await store.write(f"{FRONT}/state", str(int(front)))


def test_both_halves_are_as_libxl_writes_them():
    async def test(store, daemon):
        front, back = await _dump(store, FRONT), await _dump(store, BACK)
        assert {key.removeprefix(FRONT + "/"): value for key, value in front.items() if key != FRONT} == {
            "backend": BACK,
            "backend-id": "2",
            "state": "1",
            "virtual-device": "51712",
            "device-type": "disk",
        }
        expected = {
            "frontend": FRONT,
            "frontend-id": "5",
            "online": "1",
            "state": "1",
            "params": "/img",
            "dev": "xvda",
            "mode": "w",
            "device-type": "disk",
        }
        assert (
            expected.items() <= {key.removeprefix(BACK + "/"): value for key, value in back.items()}.items()
        )

    run(test)


def test_each_half_belongs_to_its_end_and_the_other_may_read_it():
    async def test(store, daemon):
        for path in await _dump(store, FRONT):
            assert [str(p) for p in await store.get_perms(path)] == ["n5", "r2"], path
        for path in await _dump(store, BACK):
            assert [str(p) for p in await store.get_perms(path)] == ["n2", "r5"], path
        for path in await _dump(store, PATHS.record):
            assert [str(p) for p in await store.get_perms(path)][:1] == ["n0"], path

    run(test)


def test_both_halves_appear_in_one_transaction():
    async def test(store, daemon):
        seen = []
        async with await Client.connect(daemon.connect_local(0)) as other:
            changed = asyncio.Event()
            await other.watch("/local", lambda path: (seen.append(path), changed.set()))
            await changed.wait()  # the event of the registration
            changed.clear()
            await write_device(store, SPEC)
            await changed.wait()
            # At the first event, whichever it is, all of it is there.
            assert await other.read(f"{FRONT}/state") == b"1"
            assert await other.read(f"{BACK}/state") == b"1"
            assert [str(p) for p in await other.get_perms(f"{BACK}/state")] == ["n2", "r5"]

    run(test, attached=False)


def test_what_exists_already_and_who_does_not():
    async def test(store, daemon):
        before = await _dump(store)
        with pytest.raises(UsageError, match="domain 5 has a vbd 51712 already"):
            await write_device(store, SPEC)
        for spec in (SPEC.rehomed(front_domid=9), SPEC.rehomed(front_domid=5, back_domid=9)):
            with pytest.raises(UsageError, match="no domain 9"):
                await write_device(store, spec)
        assert await _dump(store) == before

    run(test)


def test_the_record_is_enough_to_make_the_device_again():
    async def test(store, daemon):
        assert await list_devices(store, 5) == [SPEC]
        assert await list_devices(store, 2) == []
        again = (await list_devices(store, 5))[0].rehomed(front_domid=2, back_domid=0)
        await write_device(store, again)
        assert await store.read("/local/domain/2/device/vbd/51712/backend") == (
            b"/local/domain/0/backend/vbd/2/51712"
        )

    run(test)


@pytest.mark.parametrize(
    ("vdev", "target", "words"),
    [
        ("nonsense", "/img", "nonsense"),
        ("xvda", "a\0b", "NUL"),
        ("", "/img", "no such virtual device"),
        ("xvda9999", "/img", "xvda"),
    ],
)
def test_disks_that_make_no_sense(vdev, target, words):
    with pytest.raises(UsageError, match=words):
        DiskSpec(1, target, vdev).device()


def test_a_relative_image_is_made_absolute_and_a_scheme_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert DiskSpec(1, "a.img").device().back["params"] == f"{tmp_path}/a.img"
    for target in ("memory:16M", "nbd+unix:///?socket=s"):
        assert DiskSpec(1, target).device().back["params"] == target


# -- waiting for Connected


def test_it_is_connected_when_both_ends_are():
    async def test(store, daemon):
        waiting = asyncio.create_task(wait_connected(store, PATHS, 5.0))
        for back, front in [(S.INIT_WAIT, S.INITIALISING), (S.INIT_WAIT, S.INITIALISED), (S.CONNECTED, 3)]:
            await _states(store, back, front)
            await asyncio.sleep(0)
        assert not waiting.done()
        await _states(store, S.CONNECTED, S.CONNECTED)
        await waiting

    run(test)


BACK_OWES, FRONT_OWES = "back end in domain 2", "front end in domain 5"


@pytest.mark.parametrize(
    ("back", "front", "who"),
    [
        (S.INITIALISING, S.INITIALISING, BACK_OWES),
        (S.INITIALISING, S.INITIALISED, BACK_OWES),
        (S.INIT_WAIT, S.INITIALISING, FRONT_OWES),
        (S.INIT_WAIT, S.INIT_WAIT, FRONT_OWES),
        (S.INIT_WAIT, S.INITIALISED, BACK_OWES),
        (S.INIT_WAIT, S.CONNECTED, BACK_OWES),
        (S.INITIALISED, S.INITIALISED, BACK_OWES),
        (S.CONNECTED, S.INITIALISED, FRONT_OWES),
        (S.CONNECTED, S.INITIALISING, FRONT_OWES),
        (S.UNKNOWN, S.INITIALISED, BACK_OWES),
        (S.INIT_WAIT, S.UNKNOWN, FRONT_OWES),
    ],
)
def test_the_deadline_says_who_owed_the_next_move(back, front, who):
    async def test(store, daemon):
        await _states(store, back, front)
        with pytest.raises(DeadlineError, match=who) as caught:
            await wait_connected(store, PATHS, 0.01)
        assert back.name in caught.value.what and front.name in caught.value.what

    run(test)


def test_garbage_in_a_state_is_nobodys_connection():
    async def test(store, daemon):
        for garbage in ("", "4x", "-1", "99"):
            await store.write(f"{BACK}/state", garbage)
            await store.write(f"{FRONT}/state", "4")
            with pytest.raises(DeadlineError, match="back end"):
                await wait_connected(store, PATHS, 0.01)
            assert await read_state(store, BACK) is S.UNKNOWN

    run(test)


@pytest.mark.parametrize("side", ["back_error", "front_error"])
def test_a_drivers_words_end_the_wait_at_once(side):
    async def test(store, daemon):
        waiting = asyncio.create_task(wait_connected(store, PATHS, 10.0))
        await _states(store, S.INIT_WAIT, S.INITIALISING)
        await store.write(getattr(PATHS, side), "22 the image is made of cheese")
        with pytest.raises(DeviceFailed, match="made of cheese"):
            await waiting

    run(test)


@pytest.mark.parametrize("gone", [FRONT, BACK])
def test_a_half_that_goes_or_closes_ends_the_wait_at_once(gone):
    async def test(store, daemon):
        waiting = asyncio.create_task(wait_connected(store, PATHS, 10.0))
        await store.write(f"{gone}/state", "5")
        with pytest.raises(DeviceFailed, match="CLOSING"):
            await waiting
        await store.rm(gone)
        with pytest.raises(DeviceFailed, match="gone"):
            await wait_connected(store, PATHS, 10.0)

    run(test)


def test_a_wait_that_is_cancelled_or_loses_the_store_leaves_no_watch():
    async def test(store, daemon):
        waiting = asyncio.create_task(wait_connected(store, PATHS, 10.0))
        while store.counts()["watches"] < 4:  # noqa: ASYNC110
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert store.counts()["watches"] == 0
        async with await Client.connect(daemon.connect_local(0)) as other:
            waiting = asyncio.create_task(wait_connected(other, PATHS, 10.0))
            while other.counts()["watches"] < 4:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await other.close()
            with contextlib.suppress(DeadlineError), pytest.raises(ConnectionError):
                async with asyncio.timeout(5):
                    await waiting

    run(test)


# -- detach


async def _play_back(store, daemon, *, obey=True):
    """The back end's driver of domain 2: closes when it is asked to."""
    async with await Client.connect(daemon.connect_local(2)) as driver:
        await driver.wait_for(f"{BACK}/state", lambda value: value == b"5", 10.0)
        assert await driver.read(f"{BACK}/online") == b"0"
        if obey:
            await driver.write(f"{BACK}/state", "6")


def test_an_orderly_detach_leaves_nothing_in_the_store():
    async def test(store, daemon):
        before = await _dump(store)
        await write_device(store, SPEC)
        await store.write(PATHS.back_error, "an old story")
        await store.write(PATHS.front_error, "another")
        await _states(store, S.CONNECTED, S.CONNECTED)
        driver = asyncio.create_task(_play_back(store, daemon))
        assert await detach_device(store, PATHS, timeout=5.0)
        await driver
        after = await _dump(store)
        after.pop("/libxl/5")  # a domain's builder makes it
        after.pop("/libxl")
        assert after == before
        with pytest.raises(NotFound, match="domain 5 has no vbd 51712"):
            await detach_device(store, PATHS)

    run(test, attached=False)


def test_a_device_that_no_driver_has_touched_goes_at_once():
    async def test(store, daemon):
        assert await detach_device(store, PATHS, timeout=5.0)
        assert not await store.exists(FRONT) and not await store.exists(BACK)

    run(test)


def test_a_neighbour_stays():
    async def test(store, daemon):
        other = DiskSpec(5, "/img2", "xvdb", back_domid=2).device()
        await write_device(store, other)
        kept = await _dump(store, other.paths.front) | await _dump(store, other.paths.back)
        await remove_device(store, PATHS)
        assert await _dump(store, other.paths.front) | await _dump(store, other.paths.back) == kept
        assert await list_devices(store, 5) == [other]

    run(test)


def test_at_the_deadline_nothing_is_removed_unless_it_is_forced():
    async def test(store, daemon):
        await _states(store, S.CONNECTED, S.CONNECTED)
        with pytest.raises(DeadlineError, match=r"to close \(back CLOSING, front CONNECTED\); the front end"):
            await detach_device(store, PATHS, timeout=0.02)
        assert await store.exists(FRONT) and await store.exists(BACK)
        await store.write(f"{FRONT}/state", "6")
        with pytest.raises(DeadlineError, match="the back end in domain 2 owed"):
            await detach_device(store, PATHS, timeout=0.02)
        assert not await detach_device(store, PATHS, timeout=0.02, force=True)
        assert not await store.exists(FRONT) and not await store.exists(BACK)

    run(test)


@pytest.mark.parametrize("garbage", ["", "x", "99"])
def test_a_device_whose_state_is_garbage_can_be_got_rid_of(garbage):
    async def test(store, daemon):
        await store.write(f"{BACK}/state", garbage)
        driver = asyncio.create_task(_play_back(store, daemon))
        assert await detach_device(store, PATHS, timeout=5.0)
        await driver

    run(test)


def test_a_device_whose_back_end_is_gone_goes_at_once():
    async def test(store, daemon):
        await store.rm("/local/domain/2")
        assert await detach_device(store, PATHS, timeout=5.0)
        assert not await store.exists(FRONT)
        assert await list_devices(store, 5) == []

    run(test)


def test_two_detaches_at_a_time_are_one():
    async def test(store, daemon):
        await _states(store, S.CONNECTED, S.CONNECTED)
        driver = asyncio.create_task(_play_back(store, daemon))
        results = await asyncio.gather(
            *(detach_device(store, PATHS, timeout=5.0) for _ in range(3)), return_exceptions=True
        )
        await driver
        assert True in results
        assert all(result is True or isinstance(result, NotFound) for result in results)
        assert not await store.exists(FRONT)

    run(test)


def test_many_at_once_do_not_meet():
    """Attach and detach share parents, which come and go: conflicts are run again."""

    async def test(store, daemon):
        async def life(number):
            spec = DiskSpec(5, "memory:1M", f"xvd{chr(ord('b') + number)}", back_domid=2).device()
            for _ in range(3):
                await write_device(store, spec)
                await detach_device(store, spec.paths, timeout=1.0, force=True)

        await asyncio.gather(*(life(number) for number in range(8)))
        assert await list_devices(store, 5) == []
        assert await store.directory("/local/domain/2/backend") == []

    run(test, attached=False)
