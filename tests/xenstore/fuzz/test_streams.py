"""Random bytes, truncated and merged messages, flipped bits of recordings, wrong lengths: against the engine,
the codecs, our own client, and what reads saved stores and recordings.

Every input that ever found something is in seeds/ and runs each time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import store_fuzz
from tests.support.store_fuzz import flip, framed, lengthen, seeds

TARGETS: dict[str, Callable[[bytes], None]] = {
    "wire": store_fuzz.wire,
    "oxenstored": store_fuzz.oxenstored,
    "codecs": store_fuzz.codecs,
    "client": store_fuzz.client,
    "state": store_fuzz.state,
    "recording": store_fuzz.recording,
}
SAME = {"oxenstored": "wire"}
KEPT = [(name, path) for name in TARGETS for path in seeds(SAME.get(name, name))]
# Those that are worth changing; the longest ones only slow it down.
RECORDED = {
    name: [path.read_bytes() for path in seeds(SAME.get(name, name)) if path.stat().st_size < 5000]
    for name in TARGETS
}

WORDS = st.sampled_from(
    b"/ /a data data/x /local/domain/6/n /bystander/n @releaseDomain t 0 1 5 6 n5 r0 T F nodes set quota "
    b"check log 4294967295".split(b" ")
)
PAYLOADS = st.one_of(
    st.binary(max_size=40),
    st.lists(WORDS, max_size=5).map(lambda words: b"".join(word + b"\0" for word in words)),
    st.builds(lambda word, size: word + b"\0" + b"x" * size, WORDS, st.integers(0, 4096 - 20)),
)
MESSAGES = st.builds(
    lambda op, payload, req_id, tx_id: framed(op, payload, req_id=req_id, tx_id=tx_id),
    st.integers(0, 28) | st.integers(0, 2**32 - 1),
    PAYLOADS,
    st.integers(0, 2**32 - 1),
    st.integers(0, 3) | st.just(2**32 - 1),
)


@st.composite
def streams(draw: st.DrawFn, target: str) -> bytes:
    """Whole messages, and recordings with something done to them."""
    data = draw(st.sampled_from(RECORDED[target]) | st.lists(MESSAGES, max_size=12).map(b"".join))
    if target in ("wire", "oxenstored"):
        data = bytes([draw(st.integers(0, 15))]) + data[1:]
    for how in draw(
        st.lists(st.sampled_from(["flip", "cut", "splice", "length", "noise", "drop"]), max_size=4)
    ):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if how == "flip":
            data = flip(data, at * 8 + draw(st.integers(0, 7)))
        elif how == "cut":
            data = data[:at]
        elif how == "splice":
            data = data[:at] + draw(st.sampled_from(RECORDED[target]))[at:]
        elif how == "length":
            data = data[:1] + lengthen(
                data[1:], at, draw(st.integers(0, 40) | st.sampled_from([4096, 4097, 2**32 - 1]))
            )
        elif how == "noise":
            data = data[:at] + draw(st.binary(max_size=30)) + data[at:]
        else:
            data = data[:at] + data[at + draw(st.integers(1, 40)) :]
    return data


@pytest.mark.parametrize(("target", "path"), KEPT, ids=[f"{name}-{path.name}" for name, path in KEPT])
def test_what_was_kept(target: str, path: Path) -> None:
    TARGETS[target](path.read_bytes())


@settings(max_examples=120, deadline=None)
@given(streams("wire"))
def test_requests(data: bytes) -> None:
    store_fuzz.wire(data)


@settings(max_examples=120, deadline=None)
@given(streams("oxenstored"))
def test_requests_to_the_other_profile(data: bytes) -> None:
    store_fuzz.oxenstored(data)


@settings(max_examples=100, deadline=None)
@given(streams("client"))
def test_what_a_store_may_say(data: bytes) -> None:
    store_fuzz.client(data)


@settings(max_examples=150, deadline=None)
@given(streams("state"))
def test_saved_stores(data: bytes) -> None:
    store_fuzz.state(data)


@settings(max_examples=100, deadline=None)
@given(streams("recording") | st.text(max_size=80).map(str.encode))
def test_recordings(data: bytes) -> None:
    store_fuzz.recording(data)


@settings(max_examples=200, deadline=None)
@given(PAYLOADS | st.sampled_from(RECORDED["codecs"]))
def test_payloads(data: bytes) -> None:
    store_fuzz.codecs(data)
