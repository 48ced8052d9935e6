"""What both clients offer above single requests: batches, transactions known before, trees, marked events."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import xenstored
from tests.support.store_links import Listener, Store, Threaded, on_every_link

from xenbus.errors import Conflict, Denied, LinkDown, NoEntry, StoreError, UsageError
from xenbus.xenstore import calls
from xenbus.xenstore.client import Client
from xenbus.xenstore.session import Session
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transaction import RetryPolicy, commit
from xenbus.xenstore.wire.message import Op, Parser, encode


def core(client: Any) -> Session:
    return client.sync._session if isinstance(client, Threaded) else client._session


def count_writes(client: Any) -> list[list[bytes]]:
    """The messages of each write to the link from now on."""
    link = client.sync._pipe if isinstance(client, Threaded) else client._transport
    writes: list[list[bytes]] = []
    send = link.send

    def counted(messages: Any, *rest: Any) -> None:
        writes.append(list(messages))
        send(messages, *rest)

    link.send = counted
    return writes


def ops(write: list[bytes]) -> list[str]:
    return [Op(message.op).name for data in write for message in Parser().feed(data)]


# ---- names and bytes ----


@on_every_link
async def test_paths_and_values_are_text_or_bytes(client: Any, other: Client, store: Store) -> None:
    await client.write(b"/b/a", bytearray(b"1"))
    await client.write("/b/m", memoryview(b"2"))
    assert await client.read(b"/b/a") == b"1"
    assert await client.dump(b"/b") == {"/b": b"", "/b/a": b"1", "/b/m": b"2"}
    assert await client.gather(b"/b", {"a": int}) == {"a": 1}
    assert await client.get("/b/none") is None
    with pytest.raises(StoreError, match="EINVAL"):
        await client.read(b"/\xff")
    with pytest.raises(TypeError):
        await client.write("/b/n", 5)
    assert not await other.exists("/b/n")


@pytest.mark.parametrize("kind", [Client, SyncClient])
def test_an_operation_says_what_it_takes(kind: Any) -> None:
    assert str(inspect.signature(kind.set_perms)) == (
        "(self, /, path: 'Path', perms: 'Iterable[Perm | str]') -> 'None'"
    )
    assert kind.read.__doc__ == calls.read.__doc__
    for name, operation in vars(calls).items():
        returns = str(getattr(operation, "__annotations__", {}).get("return", ""))
        public = not name.startswith("_") and returns.startswith(("Call[", "Program["))
        if public and name not in ("start", "end", "unwatch", "within", "together"):
            assert hasattr(kind, name), name


# ---- batches ----


@on_every_link
async def test_a_batch_is_one_write_and_each_error_its_own(client: Any, other: Client, store: Store) -> None:
    await other.write("/b/secret/x", "1")
    writes = count_writes(client)
    batch = client.batch()
    first = batch.write("/b/a", "1")
    value = batch.read("/b/a")
    missing = batch.read("/b/none")
    names = batch.directory("/b")
    there = batch.exists("/b/none")
    both = batch.gather("/b", {"a": int, "z": int}, {"z": 0})
    with pytest.raises(UsageError):
        value.result()
    with pytest.raises(StoreError, match="EINVAL"):
        batch.read("/b//")
    outcomes = await batch.send()
    assert [ops(write) for write in writes] == [
        ["WRITE", "READ", "READ", "DIRECTORY", "READ", "READ", "READ"]
    ]
    assert outcomes[:2] == [None, b"1"]
    assert isinstance(outcomes[2], NoEntry) and outcomes[2].path == "/b/none"
    assert outcomes[3:] == [["secret", "a"], False, {"a": 1, "z": 0}]
    assert (first.result(), value.result(), names.result()) == (None, b"1", ["secret", "a"])
    assert there.result() is False and both.error is None
    assert missing.error is outcomes[2]
    with pytest.raises(NoEntry):
        missing.result()
    assert await client.batch().send() == []


@on_every_link
async def test_a_batch_may_be_larger_than_what_may_be_under_way(
    client: Any, other: Client, store: Store
) -> None:
    batch = client.batch()
    replies = [batch.write(f"/many/{n}", str(n)) for n in range(700)]
    await batch.send()
    assert [reply.error for reply in replies] == [None] * 700
    assert len(await other.directory("/many")) == 700


# ---- transactions known before ----


@on_every_link
async def test_what_is_known_before_is_committed_in_two_trips(
    client: Any, other: Client, store: Store
) -> None:
    writes = count_writes(client)
    for n in range(3):
        batch = client.batch()
        batch.write("/c/a", str(n))
        seen = batch.read("/c/a")
        assert await batch.commit() == [None, str(n).encode()]
        assert seen.result() == str(n).encode()
    trips = [["TRANSACTION_START", "WRITE", "READ"], ["TRANSACTION_END"]]
    assert [ops(write) for write in writes] == trips * 3
    assert await other.read("/c/a") == b"2"
    assert await client.batch().commit() == []
    assert len(writes) == 6


@on_every_link
async def test_a_failing_operation_changes_nothing(client: Any, other: Client, store: Store) -> None:
    heard = await Listener.on(other, "/f")
    assert await heard.next() == "/f"
    batch = client.batch()
    before = batch.write("/f/a", "1")
    batch.rm("/f/none/none")
    after = batch.write("/f/b", "1")
    with pytest.raises(NoEntry, match="RM /f/none/none in transaction"):
        await batch.commit()
    assert not await other.exists("/f")
    for reply in (before, after):
        with pytest.raises(UsageError):
            reply.result()
    await client.read("/")
    assert core(client).counts()["transactions"] == 0
    await other.write("/f/c", "")
    assert await heard.next() == "/f/c"
    await heard.close()


@on_every_link
async def test_an_id_that_was_not_foreseen_costs_one_more_trip(
    client: Any, other: Client, store: Store
) -> None:
    await other.write("/g/a", "0")
    writes = count_writes(client)

    async def put(value: str) -> None:
        batch = client.batch()
        batch.write("/g/a", value)
        assert await batch.commit() == [None]
        assert await other.read("/g/a") == value.encode()

    core(client)._last_transaction = 100
    await put("1")
    assert [ops(write) for write in writes] == [
        ["TRANSACTION_START", "WRITE"],
        ["WRITE"],
        ["TRANSACTION_END"],
    ]
    writes.clear()
    await put("2")
    assert len(writes) == 2
    core(client)._last_transaction = 100
    await put("3")
    core(client)._last_transaction = 100
    await put("4")
    writes.clear()
    await put("5")  # wrong twice in a row: nothing is foreseen any more
    assert [ops(write) for write in writes] == [["TRANSACTION_START"], ["WRITE"], ["TRANSACTION_END"]]


def test_an_id_is_foreseen_only_when_it_can_be_nobody_elses() -> None:
    session = Session("the store", 20)
    assert session.foresee() == 1
    session.transactions.add(1)
    assert session.foresee() == 0
    session.transactions.clear()
    session.post(calls.start())
    assert session.foresee() == 0
    assert Session("/dev/xen/xenbus", 1).foresee() == 0
    late = Session("the store", 20)
    late._last_transaction = 0xFFFF_FFFF
    assert late.foresee() == 0  # never the id that means no transaction


@on_every_link
async def test_a_conflict_says_what_was_touched(client: Any, other: Client, store: Store) -> None:
    policy = RetryPolicy(attempts=3, base=0.001, cap=0.002)
    await other.write("/c/seen", "")

    if isinstance(client, Threaded):
        client = client.sync

        def act(tx: Any) -> None:
            tx.read("/c/seen")
            tx.write("/c/made", "1")
            client.write("/c/seen", "")

        with pytest.raises(Conflict) as caught:
            await asyncio.to_thread(client.transaction, act, policy=policy)
    else:

        async def meddle(tx: Any) -> None:
            await tx.read("/c/seen")
            await tx.write("/c/made", "1")
            await client.write("/c/seen", "")

        with pytest.raises(Conflict) as caught:
            await client.transaction(meddle, policy=policy)
    error = caught.value
    assert (error.attempts, error.read, error.wrote) == (3, ("/c/seen",), ("/c/made",))
    assert "after 3 attempts; changed meanwhile was one of /c/made, /c/seen" in str(error)


def test_a_commit_that_conflicts_runs_again() -> None:
    async def main() -> None:
        store = Store()
        client, served = await store.link("memory")
        other, _ = await store.link("memory")
        await client.write("/n", "0")
        batch = client.batch()
        batch.write("/n", "mine")
        send, meddled = client._transport.send, 0

        def meddle(messages: Any) -> None:
            nonlocal meddled
            if "TRANSACTION_END" in ops(messages) and meddled < 2:
                meddled += 1
                store.engine.handle(other_conn, Parser().feed(write_n)[0])
            send(messages)

        other_conn = next(c for c in store.engine.domain(0).connections if c is not served.conn)
        write_n = encode(Op.WRITE, 77, 0, b"/n\0theirs")
        client._transport.send = meddle
        assert await batch.commit() == [None]
        assert meddled == 2
        assert await client.read("/n") == b"mine"
        meddled = -100
        with pytest.raises(Conflict, match=r"after 3 attempts; .* one of /n"):
            await batch.commit(attempts=3)
        await client.close()
        await other.close()
        await store.close()

    asyncio.run(main())


def test_a_commit_that_is_cancelled_or_cut_leaves_nothing() -> None:
    async def main() -> None:
        store = Store()
        client, served = await store.link("memory")
        for turns in range(9):
            batch = client.batch()
            batch.write("/x", str(turns))
            batch.directory("/")
            task = asyncio.create_task(batch.commit())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.read("/")
            assert set(client.counts().values()) == {0}, turns
            assert not served.conn.transactions, turns
        batch = client.batch()
        batch.write("/x", "")
        task = asyncio.create_task(batch.commit())
        await asyncio.sleep(0)
        served.transport.close()
        with pytest.raises(LinkDown):
            await task
        assert set(client.counts().values()) == {0}
        await client.close()
        await store.close()

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["ok", "bad", "rounds"]), max_size=6), st.booleans(), st.booleans())
def test_a_commit_ends_by_commit_or_by_abort_and_never_by_both(kinds, foreseen, conflict) -> None:
    """The program itself, with a store that is played: END(T) goes out only after every reply was good."""
    session = Session("the store", 20)
    if not foreseen:
        session._misses = 2

    def rounds() -> Any:
        for _ in range(3):
            (outcome,) = yield [calls.read("/r")]
            calls.value_of(outcome)
        return "r"

    made = [rounds() if kind == "rounds" else calls.read(f"/{kind}") for kind in kinds]
    program = commit(session, made)
    ends: list[bytes] = []
    error: Exception | None = None
    outcomes: Any = []
    try:
        asked = next(program)
        while True:
            replies: list[Any] = []
            for call in asked:
                if call.op == Op.TRANSACTION_START:
                    replies.append(1)
                elif call.op == Op.TRANSACTION_END:
                    ends.append(call.payload)
                    replies.append(Conflict("EAGAIN", "TRANSACTION_END") if conflict else None)
                else:
                    assert call.tx_id == 1
                    replies.append(NoEntry("ENOENT", "READ", "/bad") if call.path == "/bad" else b"")
            asked = program.send(replies)
    except StopIteration as end:
        outcomes = end.value
    except StoreError as exc:
        error = exc
    aborted = [b"F\0" for message in session.out if message.endswith(b"F\0")]
    if not kinds:
        assert (ends, aborted, outcomes) == ([], [], [])
    elif "bad" in kinds:
        assert isinstance(error, NoEntry) and (ends, aborted) == ([], [b"F\0"])
    else:
        assert (ends, aborted) == ([b"T\0"], [])
        assert (
            isinstance(error, Conflict)
            if conflict
            else outcomes == ["r" if kind == "rounds" else b"" for kind in kinds]
        )


@pytest.mark.parametrize("kind", ["c", "o"])
def test_other_daemons_commit_or_leave_no_trace(kind: str, tmp_path_factory) -> None:
    if why := xenstored.missing(kind):
        pytest.skip(why)
    with (
        xenstored.start(kind, tmp_path_factory.mktemp("d")) as daemon,
        SyncClient.connect(daemon.socket, timeout=10) as client,
    ):
        writes: list[list[bytes]] = []
        send = client._pipe.send

        def counted(messages: Any, timeout: float) -> None:
            writes.append(list(messages))
            send(messages, timeout)

        client._pipe.send = counted  # type: ignore[method-assign]
        for n in range(5):
            batch = client.batch()
            batch.write("/c/a", str(n))
            batch.write("/c/b", str(n))
            seen = batch.read("/c/a")
            batch.commit()
            assert seen.result() == str(n).encode()
        assert [len(write) for write in writes] == [4, 1] * 5  # foreseen from the first one on
        batch = client.batch()
        batch.write("/c/a", "half")
        batch.read("/c/none")
        batch.write("/c/b", "half")
        with pytest.raises(NoEntry):
            batch.commit()
        client.read("/")
        assert set(client.counts().values()) == {0}
        assert client.dump("/c") == {"/c": b"", "/c/a": b"4", "/c/b": b"4"}

        meddled = 0

        def meddle(messages: Any, timeout: float) -> None:
            nonlocal meddled
            if "TRANSACTION_END" in ops(messages) and not meddled:
                meddled = 1
                daemon.toolstack.write("/c/a", "theirs")
            send(messages, timeout)

        client._pipe.send = meddle  # type: ignore[method-assign]
        batch = client.batch()
        seen = batch.read("/c/a")
        batch.write("/c/a", "mine")
        batch.commit()
        assert meddled and seen.result() == b"theirs"
        assert client.read("/c/a") == b"mine"


# ---- trees ----


@on_every_link
async def test_a_walk_goes_level_by_level(client: Any, other: Client, store: Store) -> None:
    for path in ("/w/b/x", "/w/b/y/z", "/w/a"):
        await other.write(path, path[-1])
    writes = count_writes(client)
    nodes = await client.walk("/w", perms=True)
    assert [node.path for node in nodes] == ["/w", "/w/b", "/w/b/x", "/w/b/y", "/w/b/y/z", "/w/a"]
    assert nodes[2].value == b"x" and [str(perm) for perm in nodes[2].perms] == ["n0"]
    assert len(writes) == 4
    assert [node.perms for node in await client.walk("/w/a")] == [None]
    with pytest.raises(NoEntry):
        await client.walk("/w/none")
    assert (await client.dump("/"))["/w/b/y/z"] == b"z"

    async def inside(tx: Any) -> dict[str, bytes | None]:
        await tx.write("/w/mine", "1")
        found: dict[str, bytes | None] = await tx.dump("/w")
        return found

    assert "/w/mine" in await client.transaction(inside)


@on_every_link
async def test_a_wide_walk(client: Any, other: Client, store: Store) -> None:
    names = [f"a-rather-long-name-{n:04}" for n in range(600)]
    await asyncio.gather(*(other.write(f"/wide/{name}", name) for name in names))
    found = await client.dump("/wide")
    assert list(found) == ["/wide", *(f"/wide/{name}" for name in await other.directory("/wide"))]
    assert found["/wide/" + names[7]] == names[7].encode()


def test_what_may_not_be_read_is_none_and_what_went_is_left_out() -> None:
    async def main() -> None:
        store = Store()
        client, _ = await store.link("memory")
        await client.write("/local/domain/5/a", "1")
        await client.write("/local/domain/5/secret/below", "2")
        await client.set_perms("/local/domain/5", ["n0", "r5"])
        await client.set_perms("/local/domain/5/a", ["n0", "r5"])
        guest, _ = await store.link("memory", 5)
        assert await guest.dump("/local/domain/5") == {
            "/local/domain/5": b"",
            "/local/domain/5/a": b"1",
            "/local/domain/5/secret": None,
        }
        walked = {node.path: node.perms for node in await guest.walk("/local/domain/5", perms=True)}
        assert walked["/local/domain/5/secret"] is None and walked["/local/domain/5/a"] is not None
        with pytest.raises(Denied):
            await guest.read("/local/domain/5/secret")
        await client.close()
        await guest.close()
        await store.close()

    asyncio.run(main())


def test_a_walk_of_a_tree_that_loses_nodes_meanwhile() -> None:
    program = calls.walk("/t")
    asked = next(program)
    assert [call.path for call in asked] == ["/t", "/t"]
    asked = program.send([b"", ["gone", "half", "stays"]])
    gone = NoEntry("ENOENT")
    asked = program.send([gone, gone, b"1", gone, b"2", ["x"]])
    assert [call.path for call in asked] == ["/t/stays/x"] * 2
    with pytest.raises(StopIteration) as end:
        program.send([b"3", []])
    assert [node.path for node in end.value.value] == ["/t", "/t/stays", "/t/stays/x"]


# ---- events ----


@on_every_link
async def test_the_first_event_is_marked(client: Any, other: Client, store: Store) -> None:
    heard = await Listener.on(client, "/e")
    first = await heard.next()
    assert (first, first.first, first.resync) == ("/e", True, False)
    await other.write("/e", "1")
    second = await heard.next()
    assert (second, second.first) == ("/e", False)
    await heard.close()


@on_every_link
async def test_a_budget_of_watches(client: Any, other: Client, store: Store) -> None:
    core(client).max_watches = 2
    held = [await Listener.on(client, f"/w/{n}") for n in range(2)]
    writes = count_writes(client)
    with pytest.raises(StoreError, match=r"WATCH /w/3: E2BIG \(this client's own budget of 2 watches"):
        await Listener.on(client, "/w/3")
    assert writes == []
    await held.pop().close()
    held.append(await Listener.on(client, "/w/3"))
    for one in held:
        await one.close()
