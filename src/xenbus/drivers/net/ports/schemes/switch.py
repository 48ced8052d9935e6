"""`switch:NAME?OPTIONS`: a port of a switch that all devices of this process share under that name.

Knows names, and joins a switch to what is outside it. A switch begins with its first device and ends with its
last one.

source: `own` drops what does not come from the device's own address, as its driver's link has it; `any`
uplink: another far side (`tap:up0`), for the whole switch: opened by the first device that names it, closed
        with the switch
"""

from __future__ import annotations

import asyncio
import re

from xenbus.drivers.net.packet import ALL, Link, Port
from xenbus.drivers.net.ports.registry import Target, open_port, parse_target, port_scheme
from xenbus.drivers.net.ports.switch import Switch, SwitchPort
from xenbus.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}")
SWITCHES_MAX = 256
UPLINKS_MAX = 8  # of one switch
switches: dict[str, SharedSwitch] = {}


class SharedSwitch(Switch):
    """One that has a name in this process. uplinks: what was joined to it, by target."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.uplinks: dict[str, Port] = {}
        self._joining = asyncio.Lock()

    async def join(self, target: str) -> None:
        """Once for each target. UsageError, PortError."""
        if parse_target(target).scheme == "switch":
            raise UsageError(f"switch {self.name}: {target} would be a loop: an uplink is no switch")
        async with self._joining:
            if target in self.uplinks:
                return
            if len(self.uplinks) >= UPLINKS_MAX:
                raise UsageError(f"switch {self.name}: it has {UPLINKS_MAX} uplinks, the most")
            far = await open_port(target)
            try:
                port = self.add(_Uplink(self))
            except UsageError:
                await far.close()
                raise
            self.uplinks[target] = far
            far.start(port)  # each is the other one's end
            port.start(far)

    async def release(self, *, leave: bool) -> None:
        """When its last device is gone: what is left is uplinks. leave: see Port."""
        if any(isinstance(port, _DevicePort) for port in self.ports):
            return
        if switches.get(self.name) is self:
            del switches[self.name]
        uplinks, self.uplinks = self.uplinks, {}
        for far in uplinks.values():
            await far.close(leave=leave)
        for port in list(self.ports):
            await port.close()


class _DevicePort(SwitchPort):
    def __init__(self, switch: SharedSwitch) -> None:
        super().__init__(switch)
        self._shared = switch

    async def close(self, *, leave: bool = False) -> None:
        await super().close(leave=leave)
        await self._shared.release(leave=leave)


class _Uplink(SwitchPort):
    def _announce(self) -> None:
        """What is outside has Ethernet's own MTU, if it was not told another one."""
        if self.driver is not None:
            self.driver.link(Link(ALL))


@port_scheme("switch")
async def open_switch(target: Target) -> SwitchPort:
    """UsageError, PortError."""
    uplink, source = target.options.pop("uplink", ""), target.options.pop("source", "any")
    target.finish_options()
    if source not in ("own", "any"):
        raise UsageError(f"{target.text}: source is `own` or `any`")
    name = check_switch_name(target.rest)
    switch = switches.get(name)
    if switch is None:
        if len(switches) >= SWITCHES_MAX:
            raise UsageError(f"{target.text}: there are {SWITCHES_MAX} switches, the most")
        switch = switches[name] = SharedSwitch(name)
    port = _DevicePort(switch)
    switch.add(port)
    port.own_source_only = source == "own"
    if uplink:
        try:
            await switch.join(uplink)
        except BaseException:
            await port.close()
            raise
    return port


def check_switch_name(name: str) -> str:
    """UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no switch's name: 1 to 32 letters, digits, `_`, `.`, `-`")
    return name
