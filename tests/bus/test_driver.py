"""Registration: one decorator, or an installed package's entry point; nothing else is touched."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from xenbus.bus import ANY_TYPE, DriverRegistry, Side, XenbusDriver, back_driver, drivers, front_driver
from xenbus.errors import UsageError


def test_a_decorator_registers_for_its_side_and_types():
    @front_driver("zig", "zag")
    @back_driver("zig")
    class Zig(XenbusDriver):
        name = "zig"

    try:
        assert Zig in drivers.candidates(Side.FRONT, "zag") and Zig in drivers.candidates(Side.BACK, "zig")
        assert Zig not in drivers.candidates(Side.BACK, "zag")
    finally:
        drivers.remove(Zig)
    assert Zig not in drivers.candidates(Side.FRONT, "zig")


def test_drivers_for_a_type_come_before_those_for_any():
    registry = DriverRegistry()
    general, special = (type(name, (XenbusDriver,), {"name": name}) for name in ("general", "special"))
    registry.add(Side.FRONT, ANY_TYPE, general)
    registry.add(Side.FRONT, "vbd", special)
    registry.add(Side.FRONT, "vbd", special)
    assert list(registry.candidates(Side.FRONT, "vbd")) == [special, general]
    assert list(registry.candidates(Side.FRONT, "vif")) == [general]


@pytest.mark.parametrize("name", ["", "x y", "disk0", "9p"])
def test_a_name_makes_units(name):
    with pytest.raises(UsageError):
        DriverRegistry().add(Side.FRONT, "x", type("D", (XenbusDriver,), {"name": name}))


def test_a_package_that_cannot_be_imported_is_logged_and_stops_no_other(monkeypatch, caplog):
    loaded = []

    class Entry:
        value = "some.package"

        def __init__(self, name):
            self.name = name

        def load(self):
            loaded.append(self.name)
            if self.name == "broken":
                raise ImportError("no such module")

    def entries(*, group):
        assert group == "xenbus.drivers"
        return [Entry("broken"), Entry("good")]

    monkeypatch.setattr(metadata, "entry_points", entries)
    registry = DriverRegistry()
    with caplog.at_level(logging.ERROR, "xenbus.bus"):
        registry.load_entry_points()
        registry.load_entry_points()
    assert loaded == ["broken", "good"] and "broken" in caplog.text


def test_the_installed_block_driver_is_found():
    """[project.entry-points."xenbus.drivers"] of this very package."""
    assert "block" in {entry.name for entry in metadata.entry_points(group="xenbus.drivers")}
    registry = DriverRegistry()
    registry.load_entry_points()
    names = {cls.name for side in Side for cls in drivers.candidates(side, "vbd")}
    assert {"xbd", "xbbd"} <= names


def test_our_drivers_are_found_in_a_tree_that_is_not_installed():
    """`PYTHONPATH=src python3 -m xenbus`, with what Debian has: no metadata says what there is."""
    source = Path(importlib.util.find_spec("xenbus").origin).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(source)!r})\n"
        "from importlib.metadata import entry_points\n"
        "from xenbus.bus.driver import Side, drivers\n"
        "assert not entry_points(group='xenbus.drivers')\n"
        "drivers.load_entry_points()\n"
        "print(sorted(cls.name for side in Side for cls in drivers.candidates(side, 'vbd')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "['xbbd', 'xbd']\n", done.stderr
