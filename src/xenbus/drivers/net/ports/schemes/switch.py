"""`switch:NAME`: a port of a switch that all devices of this process share under that name.

Knows names alone. A switch begins with its first port and ends with its last one.
"""

from __future__ import annotations

import re

from xenbus.drivers.net.ports.registry import Target, port_scheme
from xenbus.drivers.net.ports.switch import Switch, SwitchPort
from xenbus.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}")
SWITCHES_MAX = 256
switches: dict[str, Switch] = {}


class _SharedPort(SwitchPort):
    async def close(self, *, leave: bool = False) -> None:
        await super().close(leave=leave)
        if not self._switch.ports and switches.get(self._switch.name) is self._switch:
            del switches[self._switch.name]


@port_scheme("switch")
async def open_switch(target: Target) -> SwitchPort:
    """UsageError."""
    target.finish_options()
    name = check_switch_name(target.rest)
    switch = switches.get(name)
    if switch is None:
        if len(switches) >= SWITCHES_MAX:
            raise UsageError(f"{target.text}: there are {SWITCHES_MAX} switches, the most")
        switch = switches[name] = Switch(name)
    return switch.plug(_SharedPort)


def check_switch_name(name: str) -> str:
    """UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no switch's name: 1 to 32 letters, digits, `_`, `.`, `-`")
    return name
