"""docs/writing-a-driver.md: the driver on that page, run as it stands there."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from tests.support.split import world
from tests.support.until import until

from xenbus.bus import Side, XenbusState, drivers

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-driver.md"


def code() -> str:
    """The page's one block of Python."""
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    return block


def test_the_driver_is_forty_lines_or_less():
    lines = [line for line in code().splitlines() if line.strip()]
    assert len(lines) <= 40


def test_the_driver_of_the_page_works():
    async def run():
        names: dict[str, type] = {}
        exec(compile(code(), str(PAGE), "exec"), names)
        try:
            async with world() as w:
                for side, cls in ((Side.FRONT, names["EchoFront"]), (Side.BACK, names["EchoBack"])):
                    assert cls in list(drivers.candidates(side, "vecho"))  # one decorator registered it
                    w.registry.add(side, "vecho", cls)
                dom0, guest = await w.guest(0), await w.guest(1)
                before = guest.hv.held(), dom0.hv.held()
                await dom0.attach()
                await guest.attach()
                await w.plug("vecho")
                await until(lambda: guest.front.devices)
                dev = guest.front.devices["device/vecho/0"]
                await until(lambda: getattr(dev.driver, "answer", None) == b"HELLO\0")
                assert dev.nameunit == "echo0" and dev.state is XenbusState.CONNECTED
                await w.tool.write(f"{w.back_node('vecho', 0)}/state", "5")
                await until(lambda: dev.state is XenbusState.CLOSED)
                back = dom0.back.devices["backend/vecho/1/0"]
                await until(lambda: back.state is XenbusState.CLOSED)
                await w.unplug("vecho")
                await until(lambda: not guest.front.devices and not dom0.back.devices)
                assert (guest.hv.held(), dom0.hv.held()) == before
        finally:
            for cls in (names["EchoFront"], names["EchoBack"]):
                drivers.remove(cls)

    asyncio.run(run())
