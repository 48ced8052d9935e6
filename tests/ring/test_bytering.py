"""Byte rings: a stream comes out as it went in, whatever the pieces; wild indices are refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import c_header

from xenbus.errors import PeerError, UsageError
from xenbus.ring.bytering import (
    XENCONS_IN,
    XENCONS_OUT,
    XENSTORE_REQ,
    XENSTORE_RSP,
    ByteRingEnd,
    RingError,
)

LAYOUTS = [XENSTORE_REQ, XENSTORE_RSP, XENCONS_IN, XENCONS_OUT]


def page() -> memoryview:
    return memoryview(bytearray(4096))


@pytest.mark.parametrize(
    ("layout", "struct_name", "ring", "kind"),
    [
        (XENSTORE_REQ, "xenstore_domain_interface", "req", "xs_wire.h"),
        (XENSTORE_RSP, "xenstore_domain_interface", "rsp", "xs_wire.h"),
        (XENCONS_IN, "xencons_interface", "in", "console.h"),
        (XENCONS_OUT, "xencons_interface", "out", "console.h"),
    ],
)
def test_layout_is_the_header_s(layout, struct_name, ring, kind, tmp_path):
    names = [f"{ring}_cons", f"{ring}_prod"]
    wanted = [f"offsetof(struct {struct_name}, {name})" for name in (ring, *names)]
    size = f"sizeof(((struct {struct_name} *)0)->{ring})"
    found = c_header.values(tmp_path, kind, [*wanted, size])
    assert (found[wanted[0]], found[size], found[wanted[1]], found[wanted[2]]) == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_it_reads_and_writes(layout):
    offset, size, cons, prod = layout
    view = page()
    end = ByteRingEnd(view, *layout)
    assert end.write(b"abc") == 3
    assert bytes(view[offset : offset + 3]) == b"abc"
    assert struct.unpack_from("<I", view, prod) == (3,)
    assert end.read(2) == b"ab"
    assert struct.unpack_from("<I", view, cons) == (2,)
    assert (end.readable, end.writable, end.size) == (1, size - 1, size)


def test_the_two_directions_of_a_page_do_not_overlap():
    for pair in ((XENSTORE_REQ, XENSTORE_RSP), (XENCONS_IN, XENCONS_OUT)):
        view = page()
        a, b = (ByteRingEnd(view, *layout) for layout in pair)
        assert a.write(b"a" * a.size) == a.size
        assert b.write(b"b" * b.size) == b.size
        assert a.read() == b"a" * a.size
        assert b.read() == b"b" * b.size


@settings(max_examples=60, deadline=None)
@given(
    start=st.sampled_from([0, 1000, 2**32 - 1, 2**32 - 1024, 2**31]),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 1500)), max_size=40),
)
def test_stream_comes_out_as_it_went_in(start, steps):
    view = page()
    struct.pack_into("<II", view, 2048, start, start)
    writer, reader = ByteRingEnd(view, *XENSTORE_REQ), ByteRingEnd(view, *XENSTORE_REQ)
    source = bytes(i * 7 % 251 for i in range(1500))
    sent, got = bytearray(), bytearray()
    for is_write, amount in steps:
        if is_write:
            room = writer.writable
            n = writer.write(memoryview(source)[:amount])
            assert n == min(room, amount)
            sent += source[:n]
        else:
            data = reader.read(amount)
            assert len(data) == min(amount, len(sent) - len(got))
            got += data
        assert reader.readable == len(sent) - len(got)
        assert writer.unread() == sent[len(got) :]
        assert writer.writable == 1024 - reader.readable
    got += reader.read()
    assert got == sent


@pytest.mark.parametrize(("cons", "prod"), [(0, 1025), (1, 0), (2**31, 0), (0, 2**32 - 1), (5, 4)])
def test_indices_that_jump(cons, prod):
    view = page()
    end = ByteRingEnd(view, *XENSTORE_REQ)
    struct.pack_into("<II", view, 2048, cons, prod)
    for operation in (
        lambda: end.read(1),
        lambda: end.write(b"x"),
        lambda: end.readable,
        lambda: end.writable,
        lambda: end.unread(),
    ):
        with pytest.raises(RingError) as caught:
            operation()
        assert isinstance(caught.value, PeerError)
        assert str(prod) in str(caught.value)
    assert bytes(view[:1024]) == bytes(1024)


def test_release_lets_the_page_go():
    memory = bytearray(4096)
    view = memoryview(memory)
    end = ByteRingEnd(view, *XENSTORE_REQ)
    end.release()
    end.release()
    view.release()
    memory.clear()  # BufferError if a slice were held


def test_geometry_that_makes_no_sense():
    for layout in ((0, 1000, 2048, 2052), (0, 1024, 2050, 2054), (4000, 1024, 0, 4), (0, 1024, 4096, 4100)):
        with pytest.raises(UsageError):
            ByteRingEnd(page(), *layout)
