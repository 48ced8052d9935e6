"""What a process serves of a real domain: which types are left to Linux, and what it must not have."""

from __future__ import annotations

import pytest

from xenbus.bus import Side, drivers
from xenbus.domain.native import Served
from xenbus.drivers.block.xbbd import OWN_TYPE, Xbbd
from xenbus.drivers.block.xbd import Xbd
from xenbus.errors import UsageError
from xenbus.toolstack.xenhost import OWN_TYPES

BOTH = frozenset({Side.FRONT, Side.BACK})


def test_linux_s_types_are_left_alone_unless_they_are_claimed():
    drivers.load_entry_points()
    part = drivers.only(Served().accepts)
    assert list(part.candidates(Side.BACK, OWN_TYPE)) == [Xbbd] and OWN_TYPE in OWN_TYPES["vbd"]
    assert list(part.candidates(Side.BACK, "vbd")) == [] and "vbd" not in part.types(Side.BACK)
    part = drivers.only(Served(BOTH, frozenset({"vbd"})).accepts)
    assert list(part.candidates(Side.BACK, "vbd")) == [Xbbd]
    assert list(part.candidates(Side.FRONT, "vbd")) == [Xbd]
    assert Served(BOTH, frozenset({"vbd"})).types() == {
        "frontend": part.types(Side.FRONT),
        "backend": part.types(Side.BACK),
    }


def test_beside_every_type_of_linux_s_that_we_have_there_is_one_of_ours():
    drivers.load_entry_points()
    for kind, own in OWN_TYPES.items():
        assert not Served().accepts(Side.BACK, kind) and not Served().accepts(Side.FRONT, kind)
        for back_type in own:
            assert Served().accepts(Side.BACK, back_type)
            mine = set(drivers.candidates(Side.BACK, back_type))
            assert mine and mine == set(drivers.candidates(Side.BACK, kind))


def test_drivers_that_come_later_are_found_too():
    part = drivers.only(lambda side, name: name == "late")

    class Late(Xbbd):
        name = "late"

    part.add(Side.BACK, "late", Late)
    try:
        assert (
            list(part.candidates(Side.BACK, "late")) == [Late] == list(drivers.candidates(Side.BACK, "late"))
        )
    finally:
        part.remove(Late)
    assert not list(part.candidates(Side.BACK, "late"))


@pytest.mark.parametrize("side, bus", [(Side.BACK, "xen-backend"), (Side.FRONT, "xen")])
def test_what_linux_s_driver_has_cannot_be_claimed(tmp_path, side, bus):
    served = Served(frozenset({side}), frozenset({"vbd"}))
    served.check(tmp_path)
    (tmp_path / "sys/bus" / bus / "drivers/vbd").mkdir(parents=True)
    with pytest.raises(UsageError, match="Linux's own driver has every"):
        served.check(tmp_path)
    Served(frozenset({side})).check(tmp_path)


def test_a_driver_that_is_told_to_take_nothing_has_what_it_had(tmp_path):
    """hvc_xen is part of Debian's kernel, and its driver has a name of its own."""
    served, bus = Served(frozenset({Side.FRONT}), frozenset({"console"})), tmp_path / "sys/bus/xen"
    driver, probes = bus / "drivers/xenconsole", bus / "drivers_autoprobe"
    driver.mkdir(parents=True)
    (driver / "module").mkdir()
    probes.write_text("1\n")
    with pytest.raises(UsageError, match=r"\(hvc_xen\): .* write 0 to /sys/bus/xen/drivers_autoprobe"):
        served.check(tmp_path)
    probes.write_text("0\n")
    served.check(tmp_path)
    (driver / "console-1").mkdir()
    with pytest.raises(UsageError, match="Linux's own driver has every frontend"):
        served.check(tmp_path)


def test_what_nobody_drives_cannot_be_claimed(tmp_path):
    with pytest.raises(UsageError, match="no driver for 'vtoaster'"):
        Served(claims=frozenset({"vtoaster"})).check(tmp_path)
