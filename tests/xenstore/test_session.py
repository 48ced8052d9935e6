"""The client's core, without any I/O: bytes in, bytes out, a clock that is a number."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.errors import Conflict, DeadlineError, LinkDown, NoEntry, PeerError, StoreError
from xenbus.xenstore import calls
from xenbus.xenstore.calls import Call, Listing, checked
from xenbus.xenstore.session import Session, WatchRecord
from xenbus.xenstore.transaction import RetryPolicy
from xenbus.xenstore.wire.codecs import CODECS
from xenbus.xenstore.wire.message import Message, Op, Parser, encode


class Slot:
    """A waiter that counts how often it was told something."""

    def __init__(self) -> None:
        self.told = 0
        self.value: bytes | Exception | None = None
        self.cancelled = False

    def done(self) -> bool:
        return self.cancelled or self.told > 0

    def set_result(self, result: bytes) -> None:
        self.told += 1
        self.value = result

    def set_exception(self, exception: Exception) -> None:
        self.told += 1
        self.value = exception


def make(limit: int = 20, **kwargs: int) -> Session:
    return Session("the store", limit, **kwargs)


def ask(session: Session, path: str = "/a", op: Op = Op.READ, tx_id: int = 0, deadline: float = inf) -> Slot:
    slot = Slot()
    call = Call(op, path, path.encode() + b"\0", CODECS[op].parse_reply)
    call.tx_id = tx_id
    session.submit(call, slot, deadline, 1.0)
    return slot


def sent(session: Session) -> list[Message]:
    """What the session wants sent, parsed; each item is one whole message."""
    messages = []
    for data in session.out:
        (message,) = Parser().feed(data)
        messages.append(message)
    session.out.clear()
    return messages


def answer(session: Session, message: Message, payload: bytes, op: int | None = None) -> None:
    reply = encode(message.op if op is None else op, message.req_id, message.tx_id, payload)
    session.receive(reply)


def event(path: str, token: int) -> bytes:
    return encode(Op.WATCH_EVENT, 0, 0, f"{path}\0{token}\0".encode())


def watch(session: Session, path: str, callback) -> tuple[WatchRecord, Slot]:
    record = WatchRecord(path, session.new_token(), callback)
    slot = Slot()
    session.submit(calls.watch(path, record.token), slot, inf, 1.0)
    session.watches[record.token] = record
    return record, slot


# ---- matching ----

ACTIONS = st.lists(
    st.tuples(st.sampled_from("ssssrrrrrecx"), st.integers(0, 1 << 16)), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(1, 5), st.data())
def test_any_interleaving_gives_each_waiter_its_own_reply_once(actions, limit, data) -> None:
    session = make(limit)
    slots: dict[str, Slot] = {}
    at_store: list[Message] = []
    arrived: list[str] = []
    heard: dict[int, list[str]] = {1: [], 2: []}
    expected: dict[int, list[str]] = {1: [], 2: []}
    for token in heard:
        assert session.new_token() == token
        session.watches[token] = WatchRecord("/w", token, heard[token].append)
    stream = b""
    strays = 0
    for action, number in actions:
        if action == "s":
            path = f"/p{len(slots)}"
            slots[path] = ask(session, path)
        elif action == "r" and at_store:
            message = at_store.pop(number % len(at_store))
            name = message.payload.rstrip(b"\0")
            bad = number % 3 == 0
            stream += encode(
                Op.ERROR if bad else message.op, message.req_id, 0, b"ENOENT\0" if bad else b"v" + name
            )
        elif action == "e":
            token = number % 3
            stream += event(f"/w/{number}", token)
            if token:
                expected[token].append(f"/w/{number}")
            else:
                strays += 1
        elif action == "c" and slots:
            slot = slots[f"/p{number % len(slots)}"]
            slot.cancelled = slot.cancelled or not slot.told
        elif action == "x":
            cut = number % (len(stream) + 1)
            session.receive(stream[:cut])
            stream = stream[cut:]
        new = sent(session)
        arrived += [message.payload.rstrip(b"\0").decode() for message in new]
        at_store += new
        assert session.counts()["unanswered"] >= len(at_store)
        assert len(at_store) <= limit
        assert len({message.req_id for message in at_store}) == len(at_store)
    session.receive(stream)
    # Everything sent goes out in the order it was asked for; what was cancelled in the queue never does.
    assert arrived == sorted(arrived, key=lambda path: int(path[2:]))
    for path, slot in slots.items():
        assert slot.told <= 1
        if slot.told:
            assert not slot.cancelled
            own = slot.value == b"v" + path.encode() or (
                isinstance(slot.value, NoEntry) and slot.value.path == path
            )
            assert own, (path, slot.value)
    assert heard == expected
    assert session.strays == strays
    session.drop_all(LinkDown("pulled"))
    assert all(slot.done() for slot in slots.values())
    assert all(slot.told <= 1 for slot in slots.values())
    assert session.counts() == {"watches": 0, "transactions": 0, "waiters": 0, "unanswered": 0}


def test_more_than_the_limit_wait_in_order_and_do_not_fail() -> None:
    session = make(2)
    slots = [ask(session, f"/{n}") for n in range(5)]
    first = sent(session)
    assert [m.payload for m in first] == [b"/0\0", b"/1\0"]
    answer(session, first[1], b"x")
    assert [m.payload for m in sent(session)] == [b"/2\0"]
    assert slots[1].value == b"x"
    assert not slots[4].done()
    assert session.counts()["waiters"] == 4


def test_request_ids_wrap_and_skip_zero_and_those_in_use() -> None:
    session = make(3)
    slow = ask(session)
    (held,) = sent(session)
    session._last_id = 0xFFFFFFFF
    ask(session)
    (second,) = sent(session)
    assert held.req_id == 1
    assert second.req_id == 2
    answer(session, held, b"mine")
    assert slow.value == b"mine"


def test_errors_keep_their_name_known_or_not() -> None:
    session = make()
    for name, kind in (("ENOENT", NoEntry), ("EAGAIN", Conflict), ("EQUOTA", StoreError)):
        slot = ask(session, "/a/b", tx_id=7)
        (message,) = sent(session)
        answer(session, message, name.encode() + b"\0", Op.ERROR)
        assert type(slot.value) is kind
        assert (slot.value.name, slot.value.path, slot.value.op, slot.value.tx_id) == (
            name,
            "/a/b",
            "READ",
            7,
        )


def test_a_reply_of_another_kind_is_the_stores_fault() -> None:
    session = make()
    slot = ask(session)
    (message,) = sent(session)
    with pytest.raises(PeerError, match="answered READ with WRITE"):
        answer(session, message, b"OK\0", Op.WRITE)
    assert isinstance(slot.value, PeerError)


def test_a_reply_too_large_is_taken_up_to_a_cap() -> None:
    session = make(reply_cap=8000)
    slot = ask(session, op=Op.DIRECTORY)
    (message,) = sent(session)
    header = message.op.to_bytes(4, "little") + message.req_id.to_bytes(4, "little") + bytes(4)
    session.receive(header + (6600).to_bytes(4, "little") + b"a" * 6600)
    assert slot.value == b"a" * 6600
    good = ask(session)
    (again,) = sent(session)
    with pytest.raises(PeerError):
        session.receive(encode(again.op, again.req_id, 0, b"first") + header + (8001).to_bytes(4, "little"))
    assert good.value == b"first"


def test_the_kernel_answers_watches_without_a_number() -> None:
    session = make()
    _, first = watch(session, "/a", print)
    read = ask(session)
    _, second = watch(session, "/b", print)
    messages = sent(session)
    session.receive(encode(Op.WATCH, 0, 0, b"OK\0"))
    assert first.told
    assert not second.told
    session.receive(encode(Op.READ, messages[1].req_id, 0, b"r") + encode(Op.WATCH, 0, 0, b"OK\0"))
    assert read.value == b"r"
    assert second.told


def test_a_quota_is_named() -> None:
    session = make()
    _, slot = watch(session, "/a", print)
    (message,) = sent(session)
    session.receive(encode(Op.ERROR, message.req_id, 0, b"E2BIG\0"))
    assert str(slot.value) == "WATCH /a: E2BIG (the domain's quota of watches is used up)"


def test_an_oversized_request_never_reaches_the_store() -> None:
    session = make()
    with pytest.raises(StoreError) as caught:
        calls.write("/a", b"x" * 4094)
    assert caught.value.name == "E2BIG"
    assert not session.out


@pytest.mark.parametrize("path", ["", "/a/", "//", "/a//b", "/a b", "/a\0", "/é", "a" * 4000])
def test_a_bad_path_is_einval_before_it_is_sent(path: str) -> None:
    with pytest.raises(StoreError) as caught:
        checked(Op.READ, path)
    assert caught.value.name == "EINVAL"


@pytest.mark.parametrize("path", ["/", "/a", "a/b", "@releaseDomain/5", "/local/domain/0/a_b-c@d"])
def test_a_good_path_passes(path: str) -> None:
    assert checked(Op.READ, path) == path


# ---- who went away ----


def test_a_late_watch_is_taken_back() -> None:
    session = make()
    record, slot = watch(session, "/a", print)
    (message,) = sent(session)
    slot.cancelled = True
    del session.watches[record.token]
    answer(session, message, b"OK\0")
    (undo,) = sent(session)
    assert (undo.op, undo.payload) == (Op.UNWATCH, b"/a\x001\0")
    answer(session, undo, b"OK\0")
    assert session.counts()["unanswered"] == 0


def test_a_late_transaction_is_aborted() -> None:
    session = make()
    slot = ask(session, "", Op.TRANSACTION_START)
    (message,) = sent(session)
    slot.cancelled = True
    answer(session, message, b"42\0")
    (undo,) = sent(session)
    assert (undo.op, undo.tx_id, undo.payload) == (Op.TRANSACTION_END, 42, b"F\0")
    assert session.counts()["transactions"] == 0


@pytest.mark.parametrize("op", [Op.TRANSACTION_END, Op.UNWATCH])
def test_an_end_is_sent_even_if_nobody_waits_for_it(op: Op) -> None:
    session = make(1)
    ask(session)
    (first,) = sent(session)
    gone, end = ask(session, "/gone"), ask(session, "/x", op)
    gone.cancelled = end.cancelled = True
    answer(session, first, b"")
    assert [message.op for message in sent(session)] == [op]


def test_a_late_reply_is_dropped_and_gives_its_place_back() -> None:
    session = make(1)
    slot = ask(session, "/slow", deadline=5.0)
    (message,) = sent(session)
    assert session.expire(5.0) == inf
    assert isinstance(slot.value, DeadlineError)
    assert "READ /slow" in str(slot.value)
    assert slot.value.owed_by == "the store"
    after = ask(session, "/next")
    assert sent(session) == []  # the store still owes the first one
    answer(session, message, b"late")
    (second,) = sent(session)
    answer(session, second, b"new")
    assert slot.told == 1
    assert after.value == b"new"


def test_deadlines_expire_in_the_queue_too_and_the_next_one_is_told() -> None:
    session = make(1)
    first, second, third = (ask(session, deadline=at) for at in (10.0, 3.0, 7.0))
    assert session.expire(2.0) == 3.0
    assert session.expire(2.9) == 3.0
    assert not second.told
    assert session.expire(3.0) == 7.0
    assert not first.told
    assert isinstance(second.value, DeadlineError)
    assert session.expire(8.0) == 10.0
    assert third.told
    assert not first.told


def test_what_everybody_gave_up_is_not_kept() -> None:
    session = make(1)
    ask(session)
    for _ in range(50):
        ask(session, deadline=1.0)
        ask(session).cancelled = True
    end = ask(session, "", Op.TRANSACTION_END, 3, deadline=1.0)
    session.post(calls.unwatch("/a", 1))
    session.expire(2.0)
    assert isinstance(end.value, DeadlineError)
    assert session.counts()["unanswered"] == 3  # the first, and the two that the store must hear


def test_a_dead_link_fails_everybody_at_once_and_for_ever() -> None:
    session = make(1)
    slots = [ask(session, f"/{n}") for n in range(3)]
    cause = OSError("gone")
    session.drop_all(cause)
    session.drop_all(LinkDown("again"))
    slots.append(ask(session))
    session.post(calls.reset_watches())
    for slot in slots:
        assert slot.told == 1
        assert isinstance(slot.value, LinkDown)
        assert slot.value.__cause__ is cause
    assert session.out == []


# ---- watches ----


def test_a_callback_that_raises_is_logged_and_the_others_hear(caplog) -> None:
    session = make()
    heard: list[str] = []

    def bad(path: str) -> None:
        raise RuntimeError("boom")

    one, _ = watch(session, "/a", bad)
    two, _ = watch(session, "/b", heard.append)
    session.receive(event("/a", one.token) + event("/b/c", two.token))
    assert heard == ["/b/c"]
    assert "boom" in caplog.text


@pytest.mark.parametrize("payload", [b"", b"/a\0", b"/a\0x\0", b"/a\x00-1\0", b"/a\0" + b"9" * 400 + b"\0"])
def test_a_malformed_event_is_a_stray(payload: bytes) -> None:
    session = make()
    watch(session, "/a", lambda path: pytest.fail("called"))
    session.receive(encode(Op.WATCH_EVENT, 0, 0, payload))
    assert session.strays == 1


def test_an_event_with_more_words_is_understood() -> None:
    session = make()
    heard: list[str] = []
    record, _ = watch(session, "@releaseDomain", heard.append)
    session.receive(encode(Op.WATCH_EVENT, 0, 0, b"@releaseDomain\0%d\0more\0" % record.token))
    assert heard == ["@releaseDomain"]


# ---- policies ----


def test_retry_is_at_once_first_then_jittered_then_given_up() -> None:
    policy = RetryPolicy(attempts=5, base=0.01, cap=0.05, budget=10.0)
    assert policy.pause(1, 0.0, 0.99) == 0.0
    assert policy.pause(2, 0.0, 0.5) == pytest.approx(0.02)
    assert policy.pause(4, 0.0, 0.5) == pytest.approx(0.025)
    assert policy.pause(5, 0.0, 0.5) is None
    assert policy.pause(1, 10.0, 0.5) is None


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, unique=True), st.data())
@settings(max_examples=50, deadline=None)
def test_a_listing_in_parts_is_of_one_generation(names, data) -> None:
    """A store that changes once, somewhere in the middle, between any two parts."""
    old = "".join(f"{name}\0" for name in ["gone", *names]).encode() + b"\0"
    new = "".join(f"{name}\0" for name in names).encode() + b"\0"
    change = data.draw(st.integers(0, 4))
    listing = Listing()
    for step in range(1000):
        whole = old if step < change else new
        generation = "1" if step < change else "2"
        size = data.draw(st.integers(1, 20))
        if listing.add((generation, whole[listing.offset : listing.offset + size])):
            break
    assert listing.names() in (names, ["gone", *names])
    assert listing.restarts <= 1


def test_an_empty_listing() -> None:
    listing = Listing()
    assert listing.add(("5", b"\0"))
    assert listing.names() == []


def test_what_is_lost_or_late_is_named_with_its_transaction() -> None:
    session = make()
    late, lost = ask(session, "/a", tx_id=7, deadline=1.0), ask(session, "/b", Op.WRITE, tx_id=7)
    session.expire(2.0)
    session.drop_all(LinkDown("gone"))
    assert (
        str(late.value)
        == "waited 1 s for the reply to READ /a in transaction 7; the store owed the next move"
    )
    assert str(lost.value) == "WRITE /b in transaction 7: gone"
