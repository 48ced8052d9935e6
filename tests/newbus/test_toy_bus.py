"""The toy bus of the package's own page, run as it stands there; attach, detach, suspend and resume on it."""

from __future__ import annotations

import asyncio
import textwrap

import pytest

from xenbus import newbus
from xenbus.errors import UsageError
from xenbus.newbus import DeviceState, Driver, Newbus, NoMatch, detach, probe_and_attach, resume, suspend


def test_the_page(capsys):
    text = newbus.__doc__
    block = text[text.index("    import asyncio") : text.index("The same calls")]
    exec(compile(textwrap.dedent(block), "newbus page", "exec"), {})
    assert capsys.readouterr().out == "lamp0: <A lamp> at slot 3 on toybus0\ndev.lamp.0.on: True\n"


class Part(Driver):
    name = "part"
    heard: list[str]

    async def attach(self):
        self.tell("attach")

    async def detach(self):
        self.tell("detach")

    async def suspend(self):
        self.tell("suspend")

    async def resume(self, cancelled):
        self.tell(f"resume {cancelled}")

    def tell(self, what):
        self.heard.append(f"{self.dev.nameunit} {what}")
        if self.dev.ivars == what:
            raise RuntimeError(what)


async def family(*troubles):
    tree = Newbus()
    parent = tree.add_child(tree.root)
    Part.heard = []
    await probe_and_attach(parent, [Part])
    for trouble in troubles:
        await probe_and_attach(tree.add_child(parent, trouble), [Part])
    Part.heard.clear()
    return tree, parent


def test_detach_children_first():
    async def run():
        tree, parent = await family(None, None)
        await detach(parent)
        await detach(parent)
        assert Part.heard == ["part2 detach", "part1 detach", "part0 detach"]
        assert all(dev.state is DeviceState.NOTPRESENT for _, dev in tree.root.walk())
        assert tree.classes["part"].units == {}

    asyncio.run(run())


def test_a_detach_that_is_refused_keeps_what_is_above():
    async def run():
        tree, parent = await family("detach", None)
        with pytest.raises(RuntimeError):
            await detach(parent)
        assert [dev.nameunit for _, dev in parent.walk() if dev.attached] == ["part0", "part1"]
        assert sorted(tree.classes["part"].units) == [0, 1]

    asyncio.run(run())


def test_a_failed_attach_leaves_no_unit():
    async def run():
        tree, parent = await family()
        child = tree.add_child(parent, "attach")
        with pytest.raises(RuntimeError):
            await probe_and_attach(child, [Part])
        assert child.state is DeviceState.NOTPRESENT and child.softc is None and child.nameunit == ""
        with pytest.raises(NoMatch):
            await probe_and_attach(child, [])
        with pytest.raises(UsageError):
            await probe_and_attach(parent, [Part])

    asyncio.run(run())


def test_suspend_and_resume():
    async def run():
        _tree, parent = await family(None, None)
        await suspend(parent)
        await resume(parent, cancelled=False)
        assert Part.heard == [
            "part1 suspend", "part2 suspend", "part0 suspend",
            "part0 resume False", "part1 resume False", "part2 resume False",
        ]  # fmt: skip

    asyncio.run(run())


def test_a_suspend_that_is_refused_is_taken_back():
    async def run():
        _tree, parent = await family(None, "suspend")
        with pytest.raises(RuntimeError):
            await suspend(parent)
        assert Part.heard == ["part1 suspend", "part2 suspend", "part1 resume True"]

    asyncio.run(run())
