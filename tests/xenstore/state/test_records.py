"""The codec of the record stream: every record there and back, both versions and byte orders; what is wrong
is named with its record and its byte."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.errors import UsageError
from xenbus.xenstore.state.records import (
    ConnectionData,
    DomainData,
    GlobalData,
    GlobalQuotaData,
    NodeData,
    Reader,
    Record,
    Ring,
    Socket,
    StateError,
    TransactionData,
    WatchData,
    Writer,
    decode,
    encode,
)

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFF_FFFF)
ID = st.integers(1, 0xFFFF_FFFF)
FD = st.integers(-1, 0x7FFF_FFFF)
TEXT = st.binary(max_size=40).map(lambda raw: raw.replace(b"\0", b"_"))
PERM = st.tuples(st.sampled_from([0, 1, 2, 3, 0x80, 0x83]), U16)
PERMS = st.lists(PERM, min_size=1, max_size=4).map(tuple)
NAMES = st.dictionaries(st.text("abc-", min_size=1, max_size=9), U32, max_size=4)


@st.composite
def connections(draw: st.DrawFn) -> ConnectionData:
    outbound = draw(st.binary(max_size=60))
    target = st.none() | U16.filter(lambda domid: domid != 0x7FF4)
    spec = draw(st.builds(Socket, FD) | st.builds(Ring, U16, target, U32))
    partial = draw(st.integers(0, len(outbound)))
    unique = draw(st.none() | st.integers(0, 2**64 - 1))
    return ConnectionData(draw(ID), spec, draw(st.binary(max_size=60)), outbound, partial, unique)


def quotas(draw: st.DrawFn) -> GlobalQuotaData:
    first = draw(NAMES)
    return GlobalQuotaData(first, {k: v for k, v in draw(NAMES).items() if k not in first})


RECORDS = st.lists(
    st.builds(GlobalData, FD, FD)
    | connections()
    | st.builds(WatchData, ID, TEXT, TEXT, st.none() | st.integers(0, 0xFFFE))
    | st.builds(TransactionData, ID, ID)
    | st.builds(NodeData, TEXT, st.binary(max_size=40), PERMS)
    | st.builds(NodeData, TEXT, st.binary(max_size=40), PERMS, ID, ID, st.sampled_from([1, 2, 3]))
    | st.builds(NodeData, TEXT, st.just(b""), st.just(()), ID, ID, st.sampled_from([0, 1]))
    | st.composite(quotas)()
    | st.builds(DomainData, U16, U32, NAMES),
    max_size=8,
)


def without_version_2(record: Record) -> Record:
    if isinstance(record, WatchData):
        return WatchData(record.conn_id, record.path, record.token)
    if isinstance(record, DomainData):
        return DomainData(record.domid, None, record.quotas)
    return record


@given(RECORDS, st.sampled_from([1, 2]), st.booleans())
def test_there_and_back(records: list[Record], version: int, big: bool) -> None:
    data = encode(records, version, big=big)
    assert len(data) % 8 == 0
    expected = records if version == 2 else [without_version_2(record) for record in records]
    assert decode(data) == expected
    assert (Reader(data).version, Reader(data).big) == (version, big)


@given(RECORDS, st.data())
@settings(max_examples=60)
def test_what_is_cut_off_is_an_error_at_every_byte(records: list[Record], data: st.DataObject) -> None:
    stream = encode(records)
    for size in range(len(stream)) if len(stream) < 200 else [data.draw(st.integers(0, len(stream) - 1))]:
        with pytest.raises(StateError) as caught:
            decode(stream[:size])
        assert 0 <= caught.value.offset <= size
    with pytest.raises(StateError, match="after END"):
        decode(stream + b"\0")


@given(RECORDS, st.data())
def test_a_changed_byte_is_an_error_or_another_stream_but_nothing_else(
    records: list[Record], data: st.DataObject
) -> None:
    stream = bytearray(encode(records))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        reader = Reader(bytes(stream))
        found = decode(bytes(stream))
    except StateError as error:
        assert 0 <= error.offset <= len(stream)
    else:
        assert decode(encode(found, reader.version, big=reader.big)) == found


def test_the_bytes_are_those_of_the_document() -> None:
    """Written out by hand from xenstore-migration.md, so that no shared mistake hides."""
    node = NodeData(b"/a", b"xyz", ((0, 0), (0x81, 5)))
    body = struct.pack("<IIHHHH", 0, 0, 3, 3, 0, 2) + b"n\0\0\0" + b"r\1\5\0" + b"/a\0xyz"
    assert len(body) == 30
    header = b"xenstore" + b"\0\0\0\2" + b"\0\0\0\0"
    stream = header + struct.pack("<II", 5, 32) + body + b"\0\0" + bytes(8)
    assert encode([node]) == stream
    # The document's own way: the length without the padding.
    assert decode(header + struct.pack("<II", 5, 30) + body + b"\0\0" + bytes(8)) == [node]
    watch = struct.pack("<II", 8, 24) + struct.pack("<IHHHH", 7, 3, 4, 2, 0) + b"/a\0tok\0" + bytes(5)
    assert decode(header + watch + bytes(8)) == [WatchData(7, b"/a", b"tok", 2)]
    ring = ConnectionData(3, Ring(5, None, 9), b"in", b"out", 1, 77)
    body = struct.pack("<IHHHHIHHI", 3, 0, 1, 5, 0x7FF4, 9, 2, 1, 3) + b"inout" + bytes(3)
    assert encode([ring]) == header + struct.pack("<II", 2, 40) + body + struct.pack("<Q", 77) + bytes(8)


HEAD = Writer().header()


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) & 7)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "header at byte 0: 0 bytes"),
        (b"xenstorm" + bytes(8), "header at byte 0: begins with"),
        (b"xenstore\0\0\0\3\0\0\0\0", "version 3"),
        (b"xenstore\0\0\0\1\0\0\0\2", "flags 0x2"),
        (HEAD, r"record 0 \(none\) at byte 16: ends without an END"),
        (HEAD + record(9, b""), r"record 0 \(type 0x9\) at byte 16: no such record"),
        (HEAD + record(4, bytes(7)) + bytes(8), r"record 0 \(TRANSACTION_DATA\) at byte 16: 7 bytes where 8"),
        (HEAD + record(4, bytes(8)) + bytes(8), "transaction 0 of connection 0"),
        (HEAD + record(4, bytes(16)) + bytes(8), "16 bytes, 8 belong there"),
        (HEAD + record(0, bytes(8)), "END.*should have none"),
        (HEAD + struct.pack("<II", 5, 0xFFFF_FFFF), "4294967295 bytes, but 0 are left"),
        (HEAD + record(2, struct.pack("<IHH8xHHI", 1, 2, 0, 0, 0, 0)) + bytes(8), "connection type 2"),
        (HEAD + record(2, struct.pack("<IHH8xHHI", 1, 1, 0, 0, 1, 0)) + bytes(8), "partial response of 1"),
        (HEAD + record(3, struct.pack("<IHH", 1, 2, 1) + b"ab\0") + bytes(8), "no NUL-terminated"),
        (HEAD + record(5, struct.pack("<I4xHHHH", 0, 2, 0, 0, 1) + b"x\0\0\0/\0") + bytes(8), "sion 0x78"),
        (HEAD + record(6, struct.pack("<HHI", 1, 0, 5) + b"nodes") + bytes(8), "1 quotas, but the names of"),
        (HEAD + record(7, bytes(4)) + bytes(8), "too few"),
        (encode([], 1)[:-8] + record(8, bytes(16)) + bytes(8), "of version 2, in a stream of version 1"),
    ],
)  # fmt: skip
def test_nonsense_is_named(data: bytes, text: str) -> None:
    with pytest.raises(StateError, match=text):
        decode(data)


def test_what_does_not_fit_is_the_callers_fault() -> None:
    with pytest.raises(UsageError, match="no room"):
        encode([NodeData(b"/a", bytes(70000), ((0, 0),))])
    with pytest.raises(UsageError, match="no room"):
        encode([ConnectionData(1, Socket(3), bytes(70000))])
    with pytest.raises(UsageError, match="version 3"):
        Writer(3)
