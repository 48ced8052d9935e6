"""Mirrors show what the store holds, whatever happened and in whatever order it was heard of."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import xenstored
from tests.support.store_links import Store
from tests.support.until import until

from xenbus.errors import LinkDown, NoEntry
from xenbus.xenstore.client import Client
from xenbus.xenstore.events import MAX_EVENTS
from xenbus.xenstore.image import MAX_DIRTY, Change, Image
from xenbus.xenstore.reconnect import Reconnect
from xenbus.xenstore.session import Event, ResyncEvent
from xenbus.xenstore.sync import SyncClient

ROOT = "/m/r"
PATHS = ["/m", ROOT, *(f"{ROOT}/{name}" for name in ("a", "a/b", "a/b/c", "d", "d/e", "a/x/y/z"))]
STEPS = st.lists(
    st.tuples(st.sampled_from("wwwwrrmps"), st.sampled_from(PATHS), st.integers(0, 3)), max_size=25
)


async def held(client: Client, path: str = ROOT) -> dict[str, bytes | None]:
    try:
        found: dict[str, bytes | None] = await client.dump(path)
    except NoEntry:
        return {}
    return found


async def act(client: Client, what: str, path: str, number: int) -> None:
    """One thing that somebody does; in a transaction, several."""
    try:
        if what == "w":
            await client.write(path, str(number))
        elif what == "m":
            await client.mkdir(path)
        elif (what == "r" and path != "/m") or number == 0:
            await client.rm(path)
        elif what == "p":
            await client.set_perms(path, [["n0"], ["n0", "r5"], ["r0"], ["n5"]][number])
    except NoEntry:
        pass


# ---- what it shows ----


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_it_shows_what_the_store_holds(steps) -> None:
    async def main() -> None:
        store = Store()
        client, _ = await store.link("memory")
        other, _ = await store.link("unix")
        guest, _ = await store.link("memory", 5)
        await other.write(f"{ROOT}/a/b", "")
        await other.set_perms("/m", ["r0"])
        async with client.mirror(ROOT) as mirror:
            for what, path, number in steps:
                if what == "s":
                    await mirror.synced()
                    assert dict(mirror) == await held(other)
                elif number == 3:
                    # Not waited for: several at once, and looks in between.
                    await asyncio.gather(*(act(other, what, path, n) for n in range(3)))
                else:
                    await act(other, what, path, number)
            await mirror.synced()
            assert dict(mirror) == await held(other)
            for path in mirror:
                names = await other.directory(path)
                assert sorted(mirror.directory(path)) == sorted(names)
        await client.read("/")
        assert set(client.counts().values()) == {0}
        for one in (client, other, guest):
            await one.close()
        await store.close()

    asyncio.run(main())


@settings(max_examples=25, deadline=None)
@given(STEPS)
def test_a_guest_is_shown_what_it_may_read(steps) -> None:
    async def main() -> None:
        store = Store()
        other, _ = await store.link("unix")
        await other.write(f"{ROOT}/a/b", "")
        await other.set_perms("/m", ["n0", "r5"])
        await other.set_perms(ROOT, ["n0", "r5"])
        guest, _ = await store.link("memory", 5)
        async with guest.mirror(ROOT) as mirror:
            for what, path, number in steps:
                if path != "/m":
                    await act(other, what, path, number)
            await mirror.synced()
            try:
                expected = await held(guest)
            except Exception as exc:  # noqa: BLE001
                expected = {}
                assert "EACCES" in str(exc)
            assert dict(mirror) == expected
        await guest.close()
        await other.close()
        await store.close()

    asyncio.run(main())


REAL = [pytest.param("c", marks=xenstored.needs("c")), pytest.param("o", marks=xenstored.needs("o"))]


@pytest.mark.parametrize("kind", REAL)
def test_it_shows_what_other_daemons_hold(kind: str) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="xb-") as folder,
        xenstored.start(kind, Path(folder)) as daemon,
    ):

        @settings(max_examples=12, deadline=None)
        @given(STEPS)
        def run(steps) -> None:
            async def main() -> None:
                async with (
                    await Client.connect(daemon.socket, timeout=10) as client,
                    await Client.connect(daemon.socket, timeout=10) as other,
                ):
                    await act(other, "r", "/m", 0)
                    async with client.mirror(ROOT) as mirror:
                        for what, path, number in steps:
                            if what == "s":
                                await mirror.synced()
                            else:
                                await act(other, what, path, number)
                        await mirror.synced()
                        assert dict(mirror) == await held(other)

            asyncio.run(main())

        run()


@settings(max_examples=25, deadline=None)
@given(STEPS)
def test_a_blocking_one_shows_the_same(steps) -> None:
    async def main() -> None:
        store = Store()
        other, _ = await store.link("memory")
        client, _ = store.blocking("unix", timeout=10)
        mirror = await asyncio.to_thread(client.mirror(ROOT).__enter__)
        shown: dict[str, bytes | None] = dict(mirror)
        for what, path, number in steps:
            if what != "s":
                await act(other, what, path, number)
                continue
            for change in await asyncio.to_thread(mirror.update, 0.0):
                shown.pop(change.path, None) if change.gone else shown.update({change.path: change.value})
            assert shown == dict(mirror)
        await asyncio.to_thread(mirror.synced)
        assert dict(mirror) == await held(other)
        await asyncio.to_thread(mirror.__exit__)
        await asyncio.to_thread(client.read, "/")
        assert set(client.counts().values()) == {0}
        client.close()
        await other.close()
        await store.close()

    asyncio.run(main())


def mirrored(test: Any) -> Any:
    """`test(client, mirror, other, served)` with a mirror of ROOT, which is not there yet."""

    def run() -> None:
        async def main() -> None:
            store = Store()
            client, served = await store.link("memory")
            other, _ = await store.link("memory")
            try:
                async with asyncio.timeout(20):
                    async with client.mirror(ROOT, limit=50) as mirror:
                        await test(client, mirror, other, served)
            finally:
                await client.close()
                await other.close()
                await store.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


@mirrored
async def test_reads_cost_nothing_and_ones_own_writes_are_seen(client, mirror, other, served) -> None:
    assert dict(mirror) == {} and ROOT not in mirror and mirror.get(ROOT) is None
    with pytest.raises(KeyError):
        mirror[ROOT]
    await client.write(f"{ROOT}/a/b", "1")
    await mirror.synced()
    sends: list[Any] = []
    client._transport.send = sends.append
    assert mirror[f"{ROOT}/a/b"] == b"1" and mirror[f"{ROOT}/a"] == b""
    assert mirror.directory(ROOT) == ["a"] and len(mirror) == 3 and not mirror.stale
    await asyncio.sleep(0)
    assert sends == []
    del client._transport.send


@mirrored
async def test_changes_come_in_order_and_the_last_of_each(client, mirror, other, served) -> None:
    changes = mirror.changes()
    late = mirror.changes()
    await other.write(f"{ROOT}/a", "1")
    assert [await anext(changes), await anext(changes)] == [
        Change(ROOT, b""),
        Change(f"{ROOT}/a", b"1"),
    ]
    await other.write(f"{ROOT}/a", "2")
    await other.write(f"{ROOT}/b", "x")
    await mirror.synced()
    await other.rm(f"{ROOT}/a")
    await mirror.synced()
    assert [await anext(changes), await anext(changes)] == [
        Change(f"{ROOT}/b", b"x"),
        Change(f"{ROOT}/a", None, gone=True),
    ]
    assert [(await anext(late)).path for _ in range(3)] == [ROOT, f"{ROOT}/b", f"{ROOT}/a"]
    await other.rm("/m")
    assert {await anext(changes), await anext(changes)} == {
        Change(ROOT, None, gone=True),
        Change(f"{ROOT}/b", None, gone=True),
    }


@mirrored
async def test_it_ends_with_the_link(client, mirror, other, served) -> None:
    waiting = asyncio.create_task(anext(mirror.changes()))
    await asyncio.sleep(0)
    served.transport.close()
    with pytest.raises(LinkDown, match="mirror of /m/r"):
        await waiting
    with pytest.raises(LinkDown):
        mirror.get(ROOT)
    with pytest.raises(LinkDown):
        await mirror.synced()


@mirrored
async def test_it_is_bounded(client, mirror, other, served) -> None:
    await asyncio.gather(*(other.write(f"{ROOT}/{n}", "") for n in range(49)))
    await mirror.synced()
    assert len(mirror) == 50
    await other.write(f"{ROOT}/one-more", "")
    with pytest.raises(LinkDown, match="more than 50 nodes at and below /m/r"):
        await mirror.synced()


def test_it_goes_on_over_a_reconnection() -> None:
    async def main() -> None:
        store = Store()
        other, _ = await store.link("memory")
        dial, sessions = store.dialled()
        await other.write(f"{ROOT}/a", "1")
        client = await Client.connect(dial, reconnect=Reconnect(base=0.01, cap=0.02))
        async with client.mirror(ROOT) as mirror:
            for turns in range(6):
                writing = asyncio.create_task(other.write(f"{ROOT}/n", str(turns)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                sessions[-1].transport.close()
                await writing
                await other.write(f"{ROOT}/{turns}", "")
                await until(lambda: client.connected and len(sessions) == turns + 2)  # noqa: B023
                await mirror.synced()
                assert dict(mirror) == await held(other)
        await client.read("/")
        assert set(client.counts().values()) == {0}
        await client.close()
        await other.close()
        await store.close()

    asyncio.run(main())


def test_a_mirror_is_closed_at_any_moment() -> None:
    async def main() -> None:
        store = Store()
        client, served = await store.link("memory")
        await client.write(f"{ROOT}/a", "1")

        async def use() -> None:
            async with client.mirror(ROOT) as mirror:
                await anext(mirror.changes())

        for turns in range(20):
            task = asyncio.create_task(use())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.read("/")
            assert set(client.counts().values()) == {0}, turns
            assert not served.conn.watches and not client._dependents
        await client.close()
        await store.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_relative_paths_and_the_whole_store() -> None:
    async def main() -> None:
        store = Store()
        dom0, _ = await store.link("memory")
        guest, _ = await store.link("memory", 5)
        await dom0.mkdir("/local/domain/5")
        await dom0.set_perms("/local/domain/5", ["n5"])
        async with guest.mirror("device") as mine, dom0.mirror("/") as everything:
            await guest.write("device/vbd/0/state", "1")
            await mine.synced()
            await everything.synced()
            assert mine["device/vbd/0/state"] == b"1" and mine.directory("device") == ["vbd"]
            assert everything["/local/domain/5/device/vbd/0/state"] == b"1"
            assert dict(everything) == await dom0.dump("/")
            await guest.rm("device/vbd")
            await mine.synced()
            assert dict(mine) == {"device": b""}
            await dom0.rm("/local/domain/5/device")
            await mine.synced()
            assert len(mine) == 0
        await guest.close()
        await dom0.close()
        await store.close()

    asyncio.run(main())


# ---- its bounds ----


def test_what_it_was_told_is_bounded() -> None:
    image = Image("/m", 10)
    for n in range(3 * MAX_DIRTY):
        image.hear(Event(f"/m/{n}"))
    assert len(image._dirty) <= MAX_DIRTY and "/m" in image._dirty
    image = Image("/m", 10)
    image.hear(Event("/m/a"))
    image.hear(ResyncEvent("/m/b"))
    assert list(image._dirty) == ["/m/a", "/m"]
    image = Image("/m", 10)
    image.hear(Event("/elsewhere"))
    assert list(image._dirty) == ["/m"]


@mirrored
async def test_changes_nobody_reads_are_bounded(client, mirror, other, served) -> None:
    changes = mirror.changes()
    changes.put([Change(f"{ROOT}/{n}", b"") for n in range(MAX_EVENTS + 1)])
    assert await anext(changes) == Change(ROOT, None, resync=True)


def test_what_failed_to_be_looked_at_still_is_to_be() -> None:
    image = Image("/m", 10)
    image.hear(Event("/m/a"))
    program = image.refresh()
    next(program)
    image.hear(Event("/m/b"))
    with pytest.raises(LinkDown):
        program.send([LinkDown("x")] * 3)
    assert list(image._dirty) == ["/m/a", "/m/b"] and image.stale


def test_a_blocking_mirror_by_hand(tmp_path) -> None:
    async def main() -> None:
        store = Store()
        await store.daemon.listen_unix(tmp_path / "s")

        def work() -> None:
            with SyncClient.connect(tmp_path / "s") as client, SyncClient.connect(tmp_path / "s") as other:
                other.write("/m/a", "1")
                with client.mirror("/m") as mirror:
                    assert dict(mirror) == {"/m": b"", "/m/a": b"1"}
                    assert mirror.update() == []
                    other.write("/m/b", "2")
                    assert mirror.update(5) == [Change("/m/b", b"2")]
                    client.write("/m/b", "3")
                    assert mirror.stale and mirror["/m/b"] == b"2"
                    assert mirror.synced() == [Change("/m/b", b"3")]
                    assert client.poll_watch(0) is None

        await asyncio.to_thread(work)
        await store.close()

    asyncio.run(main())
