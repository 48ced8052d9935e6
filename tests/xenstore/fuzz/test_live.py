"""Bad input for a daemon that works: on its socket, and in a guest's ring page while its words change. Others
are served meanwhile and hear only what is theirs; afterwards nothing is held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import store_fuzz_live
from tests.support.store_fuzz import framed, seeds
from tests.xenstore.fuzz.test_streams import MESSAGES, streams

TARGETS: dict[str, tuple[Callable[[bytes], None], list[Path]]] = {
    "socket": (store_fuzz_live.socket, seeds("wire")),
    "ring": (store_fuzz_live.ring, seeds("ring")),
}
KEPT = [(name, path) for name, (_, paths) in TARGETS.items() for path in paths]

# A put is one byte of length; longer messages are several.
PUTS = st.one_of(st.binary(max_size=60), MESSAGES, st.just(framed(2, b"/\0", length=4097))).map(
    lambda data: b"".join(
        bytes([0, len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255)
    )
)
VALUES = st.integers(0, 2000) | st.integers(2**32 - 2000, 2**32 - 1) | st.integers(0, 2**32 - 1)
WORDS = st.builds(lambda k, value: bytes([1, k]) + value.to_bytes(4, "little"), st.integers(0, 7), VALUES)
OCTETS = st.builds(
    lambda at, octet: bytes([2]) + at.to_bytes(2, "little") + bytes([octet]),
    st.integers(2048, 2079) | st.integers(0, 4095),
    st.integers(0, 255),
)
KICKS = st.integers(0, 63).map(lambda bits: bytes([3 | bits << 2 & 255]))


@pytest.mark.parametrize(("target", "path"), KEPT, ids=[f"{name}-{path.name}" for name, path in KEPT])
def test_what_was_kept(target: str, path: Path) -> None:
    TARGETS[target][0](path.read_bytes())


@settings(max_examples=60, deadline=None)
@given(streams("wire"))
def test_a_socket(data: bytes) -> None:
    store_fuzz_live.socket(data)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(PUTS, KICKS, KICKS, WORDS, OCTETS), max_size=20).map(b"".join))
def test_a_ring(data: bytes) -> None:
    store_fuzz_live.ring(data)
