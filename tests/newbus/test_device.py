"""Devices, classes and units; choosing a driver; sysctl names; the hold on boot."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenbus.errors import UsageError
from xenbus.newbus import (
    BUS_PROBE_DEFAULT,
    BUS_PROBE_GENERIC,
    BootHold,
    DeviceClass,
    DeviceState,
    Driver,
    Newbus,
    NoMatch,
    NoSuchName,
    ProbeFailed,
    choose,
)


@given(st.lists(st.one_of(st.none(), st.integers(0, 12), st.just("free")), max_size=60))
@settings(max_examples=150, deadline=None)
def test_units_are_the_lowest_free_ones(moves):
    """Against a plain search; None takes any, a number asks for that one, "free" gives the oldest back."""
    units, tree, taken = DeviceClass("x"), Newbus(), []
    for move in moves:
        if move == "free":
            if taken:
                units.give_back(taken.pop(0))
            continue
        lowest = next(n for n in range(100) if n not in taken)
        expected = move if move is not None and move not in taken else lowest
        assert units.take(tree.root, move) == expected
        taken.append(expected)
    assert sorted(units.units) == sorted(taken)


def test_a_unit_is_not_negative():
    with pytest.raises(UsageError):
        DeviceClass("x").take(Newbus().root, -1)


def test_the_tree():
    tree = Newbus()
    bus = tree.add_child(tree.root, name="bus", desc="A bus")
    child = tree.add_child(bus)
    assert child.state is DeviceState.NOTPRESENT and child.nameunit == "" and child.tree is tree
    tree.name(child, "disk", 4, "A disk")
    assert child.state is DeviceState.ALIVE and child.path == "bus0/disk4"
    assert str(child) == "disk4: <A disk> on bus0" and str(bus) == "bus0: <A bus>"
    assert tree.find("disk4") is child and tree.find("disk5") is None and tree.find("disk") is None
    tree.name(child, "tape")
    assert child.nameunit == "tape0" and tree.find("disk4") is None
    tree.delete(bus)
    tree.delete(bus)
    assert tree.find("tape0") is None and list(tree.root.children) == []


def driver(name, answer):
    def probe(cls, dev):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return type(name, (Driver,), {"name": name, "probe": classmethod(probe)})


def test_probe_priorities():
    """0 wins at once, otherwise the highest below it; NoMatch is no."""
    generic, default, specific = (
        driver("generic", BUS_PROBE_GENERIC), driver("default", BUS_PROBE_DEFAULT), driver("specific", 0),
    )  # fmt: skip
    never = driver("never", AssertionError("asked although somebody was sure"))
    no = driver("no", NoMatch("no"))
    assert choose([generic, default, no], None) is default
    assert choose([generic, specific, never], None) is specific
    assert choose([default, driver("equal", BUS_PROBE_DEFAULT)], None) is default
    with pytest.raises(NoMatch):
        choose([no, no], None)


def test_a_broken_probe_is_passed_over_and_not_taken_for_a_missing_driver():
    broken, good = driver("broken", RuntimeError("oops")), driver("good", -5)
    assert choose([broken, good], None) is good
    with pytest.raises(ProbeFailed, match=r"probe of broken: RuntimeError\('oops'\)"):
        choose([broken], None)
    with pytest.raises(ProbeFailed, match="returned 6"):
        choose([driver("positive", 6)], None)


def test_sysctl():
    """FreeBSD's names: dev.<driver>.<unit>.<leaf>."""
    tree = Newbus()
    bus = tree.add_child(tree.root, name="bus", desc="A bus")
    for unit in (10, 2):
        tree.name(tree.add_child(bus), "disk", unit, "A disk")
    tree.sysctl.add("hw.what", lambda: 3)
    assert tree.sysctl.read("hw.what") == 3 and tree.sysctl.read("dev.disk.2.%parent") == "bus0"
    assert list(tree.sysctl.show("dev.disk.2")) == [
        "dev.disk.2.%desc: A disk",
        "dev.disk.2.%driver: disk",
        "dev.disk.2.%location: ",
        "dev.disk.2.%pnpinfo: ",
        "dev.disk.2.%parent: bus0",
    ]
    assert [n for n in tree.sysctl.names() if n.endswith("%driver")] == [
        "dev.bus.0.%driver", "dev.disk.2.%driver", "dev.disk.10.%driver",
    ]  # fmt: skip
    assert list(tree.sysctl.names("dev.disk.10.%desc")) == ["dev.disk.10.%desc"]
    assert list(tree.sysctl.names("dev.dis")) == [] == list(tree.sysctl.names("dev.disk.1"))
    for name in ("dev.disk.3.%desc", "dev.disk.2", "dev.disk.x.%desc", "dev", "nothing", "dev.disk.2.no"):
        with pytest.raises(NoSuchName):
            tree.sysctl.read(name)
    with pytest.raises(UsageError):
        tree.sysctl.add("hw.what", lambda: 4)
    tree.sysctl.remove("hw.what")
    with pytest.raises(NoSuchName):
        tree.sysctl.read("hw.what")


def test_boot_hold():
    """A token counts once, however often it is released or too old."""
    hold, cleared = BootHold(), []
    assert hold.clear and hold.next_expiry() is None
    unsubscribe = hold.subscribe(lambda: cleared.append(1))
    a, b = hold.hold("a", 5.0), hold.hold("b", 9.0)
    assert hold.holders == ["a", "b"] and hold.next_expiry() == 5.0
    a.release()
    a.release()
    assert not hold.clear and hold.expire(8.9) == [] and cleared == []
    assert hold.expire(9.0) == ["b"] and hold.clear and cleared == [1]
    b.release()
    assert not b.held and cleared == [1] and list(hold.late) == ["b"]
    hold.hold("c", 1.0).release()
    assert cleared == [1, 1] and not hold.late
    unsubscribe()
    unsubscribe()
    hold.hold("d", 1.0).release()
    assert cleared == [1, 1]
