"""Header, encode, the incremental parser."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.errors import PeerError, UsageError
from xenbus.xenstore.wire import HEADER_SIZE, PAYLOAD_MAX, Message, Op, Parser, ProtocolError, encode, op_name

MESSAGES = st.builds(
    Message,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=60),
)


def test_header_is_four_little_endian_words() -> None:
    assert encode(Op.WRITE, 7, 9, b"/a\0x") == struct.pack("<IIII", 11, 7, 9, 4) + b"/a\0x"


@pytest.mark.parametrize(
    ("name", "number"),
    [("CONTROL", 0), ("WATCH_EVENT", 15), ("ERROR", 16), ("RESET_WATCHES", 21), ("SET_QUOTA", 26)],
)
def test_operation_numbers_are_those_of_xs_wire(name: str, number: int) -> None:
    assert Op[name] == number
    assert op_name(number) == name


def test_unknown_operation_has_its_number_as_name() -> None:
    assert op_name(4711) == "4711"


def test_payload_at_the_limit_goes_and_one_more_does_not() -> None:
    assert len(encode(Op.WRITE, 1, 0, bytes(PAYLOAD_MAX))) == HEADER_SIZE + PAYLOAD_MAX
    with pytest.raises(UsageError, match="4097"):
        encode(Op.WRITE, 1, 0, bytes(PAYLOAD_MAX + 1))


@settings(max_examples=60)
@given(st.lists(MESSAGES, max_size=8), st.data())
def test_any_cut_of_the_stream_gives_the_same_messages(messages: list[Message], data: st.DataObject) -> None:
    stream = b"".join(message.encode() for message in messages)
    parser, got, position = Parser(), [], 0
    kinds = (bytes, bytearray, memoryview)
    while position < len(stream):
        size = data.draw(st.integers(1, len(stream) - position))
        piece = kinds[size % 3](stream[position : position + size])
        got += parser.feed(piece)
        position += size
    assert got == messages
    assert parser.buffered == 0


def test_a_buffer_that_is_used_again_does_not_change_what_was_parsed() -> None:
    buffer = bytearray(encode(Op.READ, 1, 0, b"/a\0") + encode(Op.READ, 2, 0, b"/b\0")[:10])
    parser = Parser()
    (first,) = parser.feed(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert first.payload == b"/a\0"
    assert parser.feed(encode(Op.READ, 2, 0, b"/b\0")[10:]) == [Message(Op.READ, 2, 0, b"/b\0")]


def test_too_long_a_payload_ends_the_stream_and_what_came_before_is_kept() -> None:
    good, bad = encode(Op.READ, 1, 0, b"/a\0"), struct.pack("<IIII", 11, 2, 0, PAYLOAD_MAX + 1)
    parser = Parser()
    with pytest.raises(ProtocolError, match="4097") as caught:
        parser.feed(good + bad + bytes(100))
    assert isinstance(caught.value, PeerError)
    assert caught.value.messages == [Message(Op.READ, 1, 0, b"/a\0")]
    for _ in range(3):
        with pytest.raises(ProtocolError) as again:
            parser.feed(good)
        assert again.value.messages == []
        assert parser.buffered <= HEADER_SIZE


def test_a_client_may_accept_more() -> None:
    long = struct.pack("<IIII", Op.DIRECTORY, 1, 0, 6600) + bytes(6600)
    assert Parser(limit=65536).feed(long)[0].payload == bytes(6600)


def test_byte_by_byte_is_not_quadratic() -> None:
    stream = encode(Op.WRITE, 1, 0, bytes(PAYLOAD_MAX)) * 4
    parser = Parser()
    begin = time.perf_counter()
    got = [message for at in range(len(stream)) for message in parser.feed(stream[at : at + 1])]
    assert len(got) == 4
    # 16 K steps; copying what is pending at each would move 32 MB and take far longer.
    assert time.perf_counter() - begin < 1


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=200), max_size=6))
def test_noise_gives_messages_or_a_protocol_error_and_holds_little(pieces: list[bytes]) -> None:
    parser = Parser()
    for piece in pieces:
        try:
            parser.feed(piece)
        except ProtocolError:
            pass
        assert parser.buffered <= HEADER_SIZE + PAYLOAD_MAX + 200
