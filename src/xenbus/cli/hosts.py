"""What subcommands that talk to a running host share: its toolstack, its domains' answers, devices by name.

Imported by subcommands only once one runs: it brings asyncio along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xenbus.cli.context import need_dir
from xenbus.domain.rpc import RemoteError
from xenbus.errors import LinkDown, UsageError
from xenbus.toolstack.domains import DomainInfo, Toolstack
from xenbus.toolstack.paths import DevicePaths

T = TypeVar("T")


def with_toolstack(directory: Path | None, action: Callable[[Toolstack], Coroutine[Any, Any, T]]) -> T:
    """Run `action` with the toolstack of the host that --dir names. LinkDown if none runs there."""

    async def main() -> T:
        async with await Toolstack.open(need_dir(directory)) as toolstack:
            return await action(toolstack)

    return asyncio.run(main())


async def trees(toolstack: Toolstack) -> dict[DomainInfo, dict[str, Any]]:
    """Every running domain's tree; one that ends meanwhile is left out."""
    found = {}
    for info in await toolstack.domains():
        if info.state in ("running", "suspended"):
            try:
                found[info] = await toolstack.ask(info.name, "tree")
            except LinkDown:
                continue
    return found


@dataclass(slots=True, frozen=True)
class FoundDevice:
    """A device that a name led to: its domain, and what the tree says of it."""

    domain: DomainInfo
    device: dict[str, Any]

    @property
    def paths(self) -> DevicePaths:
        """UsageError for what is no split device (a bus)."""
        parts = str(self.device.get("node", "")).split("/")
        other = self.device.get("otherend", {}).get("id")
        match parts:
            case ["device", kind, devid]:
                return DevicePaths(kind, int(devid), self.domain.domid, other)
            case ["backend", kind, front, devid]:
                return DevicePaths(kind, int(devid), int(front), self.domain.domid)
        raise UsageError(f"{self.device['nameunit']} is no device that can be detached")


async def find_device(toolstack: Toolstack, name: str) -> FoundDevice:
    """`xbd0`, or `guest/xbd0` where several domains have one. Not found, or UsageError naming the choices."""
    wanted, _, unit = name.rpartition("/")
    found = []
    for info, tree in (await trees(toolstack)).items():
        if wanted and wanted not in (info.name, str(info.domid)):
            continue
        found += [FoundDevice(info, device) for device in walk(tree["devices"]) if device["nameunit"] == unit]
    if not found:
        raise RemoteError("NotFound", f"no device {name!r}" + ("" if wanted else " in any domain"))
    if len(found) > 1:
        choices = ", ".join(f"{each.domain.name}/{unit}" for each in found)
        raise UsageError(f"{unit} is in several domains: {choices}")
    return found[0]


def walk(devices: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for device in devices:
        yield device
        yield from walk(device.get("children", []))
