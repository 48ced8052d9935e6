"""Every operation's codec, permissions and paths."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.errors import PeerError, UsageError
from xenbus.xenstore.wire import (
    CODECS,
    Access,
    Op,
    Perm,
    absolute,
    check_path,
    domain_path,
    encode_event,
    format_perms,
    is_valid_absolute,
    is_valid_relative,
    is_valid_special,
    join,
    parent,
    parse_error,
    parse_event,
    parse_perms,
    split_words,
)

# operation, arguments, payload (docs/misc/xenstore.txt)
REQUESTS: list[tuple[Op, tuple[Any, ...], bytes]] = [
    (Op.CONTROL, ("quota", "set", "nodes", "5"), b"quota\0set\0nodes\x005\0"),
    (Op.DIRECTORY, ("/a",), b"/a\0"),
    (Op.READ, ("a/b",), b"a/b\0"),
    (Op.GET_PERMS, ("@releaseDomain",), b"@releaseDomain\0"),
    (Op.WATCH, ("/a", "tok", None), b"/a\0tok\0"),
    (Op.WATCH, ("/a", "tok", 1), b"/a\0tok\x001\0"),
    (Op.UNWATCH, ("/a", "tok"), b"/a\0tok\0"),
    (Op.TRANSACTION_START, (), b"\0"),
    (Op.TRANSACTION_END, (True,), b"T\0"),
    (Op.TRANSACTION_END, (False,), b"F\0"),
    (Op.INTRODUCE, (5, 1234, 7), b"5\x001234\x007\0"),
    (Op.RELEASE, (5,), b"5\0"),
    (Op.GET_DOMAIN_PATH, (5,), b"5\0"),
    (Op.WRITE, ("/a", b"1\0\xff2"), b"/a\x001\0\xff2"),
    (Op.WRITE, ("/a", b""), b"/a\0"),
    (Op.MKDIR, ("/a",), b"/a\0"),
    (Op.RM, ("/a",), b"/a\0"),
    (Op.SET_PERMS, ("/a", [Perm(Access.NONE, 1), Perm(Access.BOTH, 2)]), b"/a\0n1\0b2\0"),
    (Op.IS_DOMAIN_INTRODUCED, (5,), b"5\0"),
    (Op.RESUME, (5,), b"5\0"),
    (Op.SET_TARGET, (5, 6), b"5\x006\0"),
    (Op.RESET_WATCHES, (), b"\0"),
    (Op.DIRECTORY_PART, ("/a", 17), b"/a\x0017\0"),
    (Op.GET_FEATURE, (), b"\0"),
    (Op.GET_FEATURE, (5,), b"5\0"),
    (Op.SET_FEATURE, (5, 6), b"5\x006\0"),
    (Op.GET_QUOTA, (None, None), b"\0"),
    (Op.GET_QUOTA, ("nodes", None), b"nodes\0"),
    (Op.GET_QUOTA, ("nodes", 5), b"5\0nodes\0"),
    (Op.SET_QUOTA, ("nodes", 9, None), b"nodes\x009\0"),
    (Op.SET_QUOTA, ("nodes", 9, 5), b"5\0nodes\x009\0"),
]

REPLIES: list[tuple[Op, Any, bytes]] = [
    (Op.READ, b"a\0b", b"a\0b"),
    (Op.READ, b"", b""),
    (Op.DIRECTORY, [], b""),
    (Op.DIRECTORY, ["a", "b"], b"a\0b\0"),
    (Op.DIRECTORY_PART, ("12", b"a\0b\0\0"), b"12\0a\0b\0\0"),
    (Op.GET_PERMS, [Perm(Access.NONE, 0), Perm(Access.READ, 5)], b"n0\0r5\0"),
    (Op.TRANSACTION_START, 42, b"42\0"),
    (Op.WRITE, None, b"OK\0"),
    (Op.GET_DOMAIN_PATH, "/local/domain/5", b"/local/domain/5\0"),
    (Op.IS_DOMAIN_INTRODUCED, True, b"T\0"),
    (Op.IS_DOMAIN_INTRODUCED, False, b"F\0"),
    (Op.GET_FEATURE, 14, b"14\0"),
    (Op.GET_QUOTA, "nodes watches", b"nodes watches\0"),
    (Op.CONTROL, "a\nb\n", b"a\nb\n\0"),
]


def test_every_operation_that_a_client_may_send_has_a_codec() -> None:
    assert set(CODECS) == set(Op) - {Op.WATCH_EVENT, Op.ERROR, Op.RESTRICT}
    assert {op for op, _, _ in REQUESTS} == set(CODECS)


@pytest.mark.parametrize(("op", "arguments", "payload"), REQUESTS, ids=lambda value: str(value)[:30])
def test_request(op: Op, arguments: tuple[Any, ...], payload: bytes) -> None:
    assert CODECS[op].request(*arguments) == payload
    assert payload, "an empty payload makes oxenstored wait"
    assert CODECS[op].parse_request(payload) == arguments


@pytest.mark.parametrize(("op", "result", "payload"), REPLIES, ids=lambda value: str(value)[:30])
def test_reply(op: Op, result: Any, payload: bytes) -> None:
    assert CODECS[op].reply(result) == payload
    assert CODECS[op].parse_reply(payload) == result


@pytest.mark.parametrize(
    ("op", "payload"),
    [
        (Op.WRITE, b"EH\0"),
        (Op.TRANSACTION_START, b"one\0"),
        (Op.IS_DOMAIN_INTRODUCED, b"Y\0"),
        (Op.GET_PERMS, b"x5\0"),
        (Op.GET_PERMS, b""),
        (Op.DIRECTORY_PART, b"12"),
        (Op.GET_FEATURE, b"-1\0"),
    ],
)
def test_a_malformed_reply_is_the_peers_fault(op: Op, payload: bytes) -> None:
    with pytest.raises(PeerError):
        CODECS[op].parse_reply(payload)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (Op.READ, ("/a\0b",)),
        (Op.WRITE, ("/a\0", b"")),
        (Op.WATCH, ("/a", "t\0k", None)),
        (Op.WATCH, ("/a", "t", -1)),
        (Op.INTRODUCE, (1, 2)),
        (Op.RELEASE, (-1,)),
        (Op.SET_PERMS, ("/a", [])),
        (Op.SET_PERMS, ("/a", ["q1"])),
    ],
)
def test_what_cannot_be_written_is_the_callers_fault(op: Op, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        CODECS[op].request(*arguments)


@pytest.mark.parametrize(
    ("op", "payload"),
    [
        (Op.READ, b""),
        (Op.READ, b"/a"),
        (Op.READ, b"/a\0/b\0"),
        (Op.WRITE, b"/a"),
        (Op.WATCH, b"/a\0"),
        (Op.TRANSACTION_END, b"X\0"),
        (Op.SET_PERMS, b"/a\0"),
        (Op.RELEASE, b"x\0"),
        (Op.SET_QUOTA, b"nodes\0"),
    ],
)
def test_a_malformed_request_is_refused(op: Op, payload: bytes) -> None:
    with pytest.raises(UsageError):
        CODECS[op].parse_request(payload)


@settings(max_examples=60)
@given(st.sampled_from(sorted(CODECS)), st.binary(max_size=40))
def test_parsers_raise_nothing_but_their_own_errors(op: int, payload: bytes) -> None:
    for parse, fault in ((CODECS[op].parse_request, UsageError), (CODECS[op].parse_reply, PeerError)):
        try:
            parse(payload)
        except fault:
            pass


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))
def test_tokens_of_any_characters_survive(token: str) -> None:
    assert parse_event(encode_event("/a", token)) == ("/a", token)


def test_tokens_of_any_bytes_survive() -> None:
    assert encode_event(*parse_event(b"/a\0\xff\xfe\0")) == b"/a\0\xff\xfe\0"


def test_an_event_without_a_token_is_malformed() -> None:
    with pytest.raises(PeerError):
        parse_event(b"/a\0")


def test_an_errors_name_is_kept_as_it_came() -> None:
    assert parse_error(b"EQUOTA\0") == "EQUOTA"
    assert parse_error(b"ENOENT") == "ENOENT"


def test_words() -> None:
    assert split_words(b"a\0\0b\0") == ["a", "", "b"]
    assert split_words(b"\0") == split_words(b"") == []
    with pytest.raises(UsageError):
        split_words(b"a\0b")


# ---- permissions ----


@given(st.lists(st.builds(Perm, st.sampled_from(Access), st.integers(0, 65535)), min_size=1, max_size=6))
def test_permissions_round_trip(perms: list[Perm]) -> None:
    assert parse_perms(format_perms(perms)) == perms
    assert [Perm.parse(str(perm)) for perm in perms] == perms


@pytest.mark.parametrize("text", ["", "r", "5", "rw5", "x5", "r-1", "r65536", "r 5", "R5", "r5 ", "r٣"])
def test_malformed_permissions(text: str) -> None:
    with pytest.raises(UsageError):
        Perm.parse(text)


def test_access_letters_and_bits() -> None:
    assert [access.letter for access in Access] == ["n", "r", "w", "b"]
    assert Access.READ | Access.WRITE == Access.BOTH


# ---- paths ----


@pytest.mark.parametrize("path", ["/", "/a", "/a/b-c/_d@e/0", "/local/domain/0"])
def test_valid_absolute(path: str) -> None:
    assert is_valid_absolute(path)
    assert check_path(path) == path


@pytest.mark.parametrize("path", ["", "a", "//", "/a/", "/a//b", "/a b", "/a.b", "/ä", "/a\n", "@x", "/a\0"])
def test_invalid_absolute(path: str) -> None:
    assert not is_valid_absolute(path)


def test_relative_and_special() -> None:
    assert is_valid_relative("device/vbd/51712")
    assert not is_valid_relative("@releaseDomain")
    assert not is_valid_relative("a/")
    assert is_valid_special("@releaseDomain/5")
    assert not is_valid_special("@")
    for bad in ("", "a b", "/a/", "/" + "x" * 3072):
        with pytest.raises(UsageError):
            check_path(bad)


def test_path_arithmetic() -> None:
    assert absolute("device/vbd", 5) == "/local/domain/5/device/vbd"
    assert absolute("/x", 5) == "/x"
    assert absolute("@releaseDomain", 5) == "@releaseDomain"
    assert domain_path(7) == "/local/domain/7"
    assert parent("/a/b") == "/a"
    assert parent("/a") == parent("/") == "/"
    assert join("/a/", "b", "c") == "/a/b/c"
    assert join("/", "b") == "/b"
