"""What the drivers share: targets and who opens them, options and parameters as nodes have them."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenbus.bus import driver
from xenbus.drivers.nodes import Names, number, number32, queue_folder
from xenbus.drivers.options import Option, read_options
from xenbus.drivers.targets import SchemeRegistry, Target, split_target
from xenbus.errors import PeerError, UsageError

WORD = st.text("abcxyz0189", min_size=1)


@given(rest=st.text("/:@ab1."), options=st.dictionaries(WORD, WORD))
def test_a_target_comes_apart_as_it_was_put_together(rest, options):
    query = "&".join(f"{name}={value}" for name, value in options.items())
    text = f"scheme+x:{rest}?{query}" if options else f"scheme+x:{rest}"
    assert split_target(text) == ("scheme+x", rest, options)


@pytest.mark.parametrize("text", ["", "/dev/x:1", "Upper:x", "1st:x", ":x"])
def test_what_begins_with_no_scheme(text):
    assert split_target(text) is None


def test_options_are_pairs():
    with pytest.raises(UsageError, match="name=value"):
        split_target("a:b?c")


def test_who_opens_what():
    """No folder is read as long as the scheme is known; one that nobody has is named with those there are."""
    registry: SchemeRegistry[Target, str] = SchemeRegistry("thing", "xenbus.drivers.net.ports.schemes")

    @registry.register("a", "b")
    async def opener(target: Target) -> str:
        return target.rest

    assert asyncio.run(registry.open(Target("b:there", "b", "there"))) == "there"
    with pytest.raises(UsageError, match=r"c:x: no thing scheme c \(there are a, b\)"):
        asyncio.run(registry.open(Target("c:x", "c", "x")))
    with pytest.raises(UsageError, match="thing scheme b: registered twice"):
        registry.register("b")(opener)


@given(st.integers(0, 1 << 70))
def test_numbers_have_their_width(value):
    for read, bits in ((number, 64), (number32, 32)):
        if value >> bits:
            with pytest.raises(ValueError, match=f"more than {bits} bits|is not a number"):
                read(b"%d" % value)
        else:
            assert read(b"%d" % value) == value


@pytest.mark.parametrize("raw", [b"", b"-1", b"1 ", b"0x1", b"\xff", b"1" * 21])
def test_what_is_no_number(raw):
    with pytest.raises(ValueError, match="is not a number"):
        number(raw)


def test_a_name_is_said_once():
    said = {"a": b"7", "b": b"7", "c": None, "d": b"4294967296", "e": b"x"}
    names = Names("/front", "port")
    assert names.take(said, "a") == 7
    for key, wrong in {
        "b": "/front/b: port 7 is that of a already",
        "c": "/front/c is missing",
        "d": "/front/d: 4294967296 is no port",
        "e": "/front/e: b'x' is not a number",
    }.items():
        with pytest.raises(PeerError) as caught:
            names.take(said, key)
        assert str(caught.value) == wrong


def test_where_the_keys_of_a_queue_stand():
    assert [queue_folder(1, 0), queue_folder(2, 0), queue_folder(2, 1)] == ["", "queue-0/", "queue-1/"]


def test_options_as_nodes_say_or_the_driver_has_them():
    class Driver:
        deep = 4
        wide = True

    table = (Option("deep", "x-deep", 1, 8), Option("wide", "x-wide"))
    assert read_options(table, Driver, "/n", {"x-deep": b"8", "x-wide": None}) == {"deep": 8, "wide": 1}
    for raw, wrong in {
        b"9": "/n/x-deep: 9, 1 to 8 it can be",
        b"y": "/n/x-deep: b'y' is not a number",
    }.items():
        with pytest.raises(UsageError) as caught:
            read_options(table, Driver, "/n", {"x-deep": raw, "x-wide": None})
        assert str(caught.value) == wrong


def test_what_drivers_share_is_no_driver():
    assert {entry.name for entry in driver._own()} == {"block", "console", "net"}
