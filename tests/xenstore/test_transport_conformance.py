"""One suite for every transport and both clients, against the real daemon."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.store_links import Listener, Store, on_every_link

from xenbus.errors import Conflict, DeadlineError, NoEntry, PeerError, StoreError, UsageError
from xenbus.xenstore.client import Client
from xenbus.xenstore.wire.perms import Access, Perm


@on_every_link
async def test_values_pass_as_they_are(client: Any, other: Client, store: Store) -> None:
    values = [b"", b"\0", b"a\0b\0", bytes(range(256)), b"x" * 4000]
    for value in values:
        await client.write("/v/a", value)
        assert await client.read("/v/a") == value
        assert await other.read("/v/a") == value
    await client.write("/v/a", "né")
    assert await client.read_str("/v/a") == "né"
    assert await client.read("/v/a") == "né".encode()


@on_every_link
async def test_nodes_come_and_go(client: Any, other: Client, store: Store) -> None:
    await client.write("/n/keep", "1")
    await client.mkdir("/n/keep")
    await client.mkdir("/n/deep/er")
    assert await client.read("/n/keep") == b"1"
    assert sorted(await client.directory("/n")) == ["deep", "keep"]
    assert await client.directory("/n/keep") == []
    assert await client.exists("/n/deep/er")
    await client.rm("/n/deep")
    await client.rm("/n/deep")
    assert not await client.exists("/n/deep/er")
    with pytest.raises(NoEntry):
        await client.rm("/n/deep/er")
    with pytest.raises(NoEntry) as caught:
        await client.read("/n/none")
    assert (caught.value.op, caught.value.path) == ("READ", "/n/none")
    with pytest.raises(StoreError, match="EINVAL"):
        await client.rm("/")
    with pytest.raises(StoreError, match="EINVAL"):
        await client.read("/n/")
    with pytest.raises(StoreError, match="E2BIG"):
        await client.write("/n", b"x" * 4096)


@on_every_link
async def test_permissions_make_the_round_trip(client: Any, other: Client, store: Store) -> None:
    await client.write("/p", "")
    perms = [Perm(Access.NONE, 0), Perm(Access.READ, 5), Perm(Access.BOTH, 6)]
    await client.set_perms("/p", perms)
    assert await other.get_perms("/p") == perms
    await client.set_perms("/p", ["r0", "w7"])
    assert await client.get_perms("/p") == [Perm(Access.READ, 0), Perm(Access.WRITE, 7)]
    with pytest.raises(UsageError):
        await client.set_perms("/p", [])
    with pytest.raises(UsageError):
        await client.set_perms("/p", ["q1"])


@on_every_link
async def test_a_long_list_comes_whole(client: Any, other: Client, store: Store) -> None:
    names = [f"child-{n:04}" for n in range(1200)]
    await asyncio.gather(*(other.write(f"/long/{name}", "") for name in names))
    assert sorted(await client.directory("/long")) == names


@on_every_link
async def test_a_transaction_commits_or_leaves_no_trace(client: Any, other: Client, store: Store) -> None:
    async def good(tx: Any) -> bytes:
        await tx.write("/t/a", "1")
        await tx.mkdir("/t/b")
        await tx.set_perms("/t/b", ["r0"])
        assert not await other.exists("/t/a") if isinstance(client, Client) else True
        assert await tx.exists("/t/b")
        assert sorted(await tx.directory("/t")) == ["a", "b"]
        assert (await tx.get_perms("/t/b"))[0].access is Access.READ
        assert await tx.gather("/t", {"a": int}) == {"a": 1}
        return await tx.read("/t/a")

    assert await client.transaction(good) == b"1"
    assert await other.read("/t/a") == b"1"
    escaped = []

    async def bad(tx: Any) -> None:
        escaped.append(tx)
        await tx.rm("/t")
        raise RuntimeError("changed my mind")

    with pytest.raises(RuntimeError):
        await client.transaction(bad)
    assert await other.read("/t/a") == b"1"
    with pytest.raises(UsageError, match="has ended"):
        await escaped[0].read("/t/a")


@on_every_link
async def test_a_conflict_is_run_again_within_its_attempts(client: Any, other: Client, store: Store) -> None:
    await other.write("/c/n", "0")
    runs = 0
    loop = asyncio.get_running_loop()

    def meddle() -> None:
        """From whichever thread the function runs in."""
        if isinstance(client, Client):
            return
        asyncio.run_coroutine_threadsafe(other.write("/c/n", "9"), loop).result(5)

    async def add(tx: Any) -> int:
        nonlocal runs
        runs += 1
        value = int(await tx.read("/c/n"))
        if runs < 3:
            meddle()
            if isinstance(client, Client):
                await other.write("/c/n", "9")
        await tx.write("/c/n", str(value + 1))
        return value

    assert await client.transaction(add) == 9
    assert runs == 3
    assert await other.read("/c/n") == b"10"
    runs = -100
    with pytest.raises(Conflict):
        await client.transaction(add, attempts=2)
    assert runs == -98
    assert await other.read("/c/n") == b"9"


@on_every_link
async def test_a_watch_fires_first_then_for_each_change(client: Any, other: Client, store: Store) -> None:
    events = await Listener.on(client, "/w")
    assert await events.next() == "/w"
    await other.write("/w/a/b", "1")
    assert await events.next() == "/w/a/b"
    await client.write("/w/own", "1")
    assert await events.next() == "/w/own"
    await other.rm("/w/a")
    assert await events.next() == "/w/a"
    await other.write("/wrong", "1")
    await other.write("/w", "2")
    assert await events.next() == "/w"
    assert client.counts()["watches"] == 1
    await events.close()
    await events.close()


@on_every_link
async def test_a_watch_may_be_shallow(client: Any, other: Client, store: Store) -> None:
    events = await Listener.on(client, "/w", depth=0)
    assert await events.next() == "/w"
    await other.write("/w/a", "1")
    await other.write("/w", "1")
    assert await events.next() == "/w"
    await events.close()


@on_every_link
async def test_waiting_for_a_value(client: Any, other: Client, store: Store) -> None:
    waiting = asyncio.create_task(client.wait_for("/f/state", lambda value: value == b"4", 10))
    for state in "1234":
        await other.write("/f/state", state)
    assert await waiting == b"4"
    assert await client.wait_for("/f/none", lambda value: value is None, 5) is None
    with pytest.raises(DeadlineError, match="the back end owed") as caught:
        await client.wait_for("/f/state", lambda value: value == b"6", 0.2, owed_by="the back end")
    assert caught.value.seconds == 0.2


@on_every_link
async def test_gathering(client: Any, other: Client, store: Store) -> None:
    await other.write("/g/id", "7")
    await other.write("/g/name", "x")
    assert await client.gather("/g", {"id": int, "name": bytes}) == {"id": 7, "name": b"x"}
    assert await client.gather("/g", {"id": int, "no": int}, {"no": 3}) == {"id": 7, "no": 3}
    with pytest.raises(NoEntry) as caught:
        await client.gather("/g", {"no": int, "id": int})
    assert caught.value.path == "/g/no"
    with pytest.raises(PeerError, match="/g/name"):
        await client.gather("/g", {"id": int, "name": int})


@on_every_link
async def test_domains_features_quotas_and_control(client: Any, other: Client, store: Store) -> None:
    assert await client.get_domain_path(5) == "/local/domain/5"
    assert not await client.is_introduced(5)
    features = await client.get_feature()
    await client.set_feature(5, features & 4)
    assert await client.get_feature(5) == features & 4
    await client.introduce(5, 0, store.port(5))
    await client.introduce(6, 0, store.port(6))
    assert await client.is_introduced(5)
    await client.set_target(6, 5)
    await client.resume_domain(5)
    await client.release(6)
    assert not await client.is_introduced(6)
    with pytest.raises(NoEntry):
        await client.resume_domain(6)
    assert "nodes" in await client.quota_names()
    await client.set_quota("nodes", 77, 5)
    assert await client.get_quota("nodes", 5) == 77
    assert await client.get_quota("nodes") == 1000
    with pytest.raises(StoreError):
        await client.get_quota("no-such-quota")
    assert "check" in await client.control("help")
    with pytest.raises(StoreError):
        await client.control("no-such-command")


@on_every_link
async def test_everything_can_be_reset(client: Any, other: Client, store: Store) -> None:
    events = await Listener.on(client, "/r")
    assert await events.next() == "/r"
    await client.reset_watches()
    await other.write("/r", "1")
    again = await Listener.on(client, "/r")
    assert await again.next() == "/r"
    await again.close()
    await events.close()


@on_every_link
async def test_more_and_larger_than_a_ring_holds(client: Any, other: Client, store: Store) -> None:
    """Both directions full at once; replies wrap around the ring at every offset."""
    big = bytes(range(251)) * 15
    for n in range(30):
        await other.write(f"/m/{n}", big[: 100 * n])
    found = await client.gather("/m", {str(n): bytes for n in range(30)})
    assert found == {str(n): big[: 100 * n] for n in range(30)}
    for n in range(30):
        await client.write(f"/m/{n}", big[: 121 * n])
    assert await other.read("/m/29") == big[: 121 * 29]
