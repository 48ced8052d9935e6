"""What subcommands that talk to a running host share: which one, its domains' answers, devices by name.

Imported by subcommands only once one runs: it brings asyncio along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xenbus.cli.context import need_dir
from xenbus.errors import LinkDown, NotFound, UsageError, XenbusError
from xenbus.toolstack.devices import list_devices
from xenbus.toolstack.domains import DomainInfo, Toolstack
from xenbus.toolstack.paths import DevicePaths
from xenbus.toolstack.xenhost import AnyHost, XenHost, on_xen

T = TypeVar("T")
PATIENCE = 5.0  # seconds that a domain has to answer


def with_toolstack(directory: Path | None, action: Callable[[AnyHost], Coroutine[Any, Any, T]]) -> T:
    """Run `action` with the embedded host that --dir names, or without one with the Xen host that this
    machine is. UsageError if it is none, LinkDown if nobody answers there."""
    if directory is not None:
        return with_embedded(directory, action)
    if not on_xen():
        need_dir(None, "this machine is no Xen domain")

    async def main() -> T:
        async with await XenHost.open() as host:
            return await action(host)

    return asyncio.run(main())


def with_embedded(directory: Path | None, action: Callable[[Toolstack], Coroutine[Any, Any, T]]) -> T:
    """The same for what only an embedded host can do."""

    async def main() -> T:
        async with await Toolstack.open(need_dir(directory)) as toolstack:
            return await action(toolstack)

    return asyncio.run(main())


async def ask_all(
    toolstack: AnyHost, infos: Iterable[DomainInfo], method: str, **params: object
) -> dict[DomainInfo, Any]:
    """What each domain answers, asked together, or the XenbusError that came of it.

    One that ends meanwhile, or is not up yet, is left out; one that hangs costs PATIENCE, once for all.
    """

    async def ask(info: DomainInfo) -> Any:
        try:
            return await toolstack.ask(info.name, method, timeout=PATIENCE, **params)
        except XenbusError as error:
            return error

    infos = [info for info in infos if info.state in ("running", "suspended")]
    answers = await asyncio.gather(*(ask(info) for info in infos))
    pairs = zip(infos, answers, strict=True)
    return {info: answer for info, answer in pairs if not isinstance(answer, LinkDown)}


async def trees(toolstack: AnyHost) -> dict[DomainInfo, dict[str, Any]]:
    """Every running domain's tree; `error` in it says why one has none."""
    answers = await ask_all(toolstack, await toolstack.domains(), "tree")
    return {info: _tree(info, answer) for info, answer in answers.items()}


def _tree(info: DomainInfo, answer: Any) -> dict[str, Any]:
    if not isinstance(answer, XenbusError):
        return dict(answer)
    words = f"does not answer: {answer}"
    return {"domid": info.domid, "devices": [], "lines": [words], "error": words}


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
        path = str(self.device.get("otherend", {}).get("path", ""))
        match parts:
            case ["device", kind, devid]:
                try:
                    return DevicePaths.of_back(kind, path)
                except ValueError:
                    return DevicePaths(kind, int(devid), self.domain.domid, other)
            case ["backend", kind, front, devid]:
                front_kind = path.split("/")[-2] if path.count("/") > 2 else kind
                own = "" if front_kind == kind else kind
                return DevicePaths(front_kind, int(devid), int(front), self.domain.domid, own)
        raise UsageError(f"{self.device['nameunit']} is no device that can be detached")


async def find_device(toolstack: AnyHost, name: str) -> FoundDevice:
    """`xbd0`, or `guest/xbd0` where several domains have one; or as the toolstack knows it, `guest/xvda` or
    `guest/vif0`, which finds the device of a guest that does not answer, too. NotFound, or UsageError naming
    the choices.
    """
    wanted, _, unit = name.rpartition("/")
    found = []
    for info, tree in (await trees(toolstack)).items():
        if not unit or (wanted and wanted not in (info.name, str(info.domid))):
            continue
        recorded = await _recorded(toolstack, info, unit)
        named = [
            device
            for device in walk(tree["devices"])
            if recorded.pop(device.get("node"), None) or device["nameunit"] == unit
        ]
        found += [FoundDevice(info, device) for device in (*named, *recorded.values())]
    if not found:
        raise NotFound(f"no device {name!r}" + ("" if wanted else " in any domain"))
    if len(found) > 1:
        choices = ", ".join(f"{each.domain.name}/{unit}" for each in found)
        raise UsageError(f"{unit} is in several domains: {choices}")
    return found[0]


async def _recorded(toolstack: AnyHost, info: DomainInfo, vdev: str) -> dict[str | None, dict[str, Any]]:
    """By node, the devices that the toolstack gave to a domain under this name; as far as it knows them."""
    return {
        (node := f"device/{spec.paths.kind}/{spec.paths.devid}"): {
            "nameunit": vdev,
            "node": node,
            "otherend": {"id": spec.paths.back_domid, "path": spec.paths.back},
        }
        for spec in await list_devices(toolstack.store, info.domid)
        if vdev == spec.back.get("dev", f"{spec.paths.kind}{spec.paths.devid}")
    }


def walk(devices: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for device in devices:
        yield device
        yield from walk(device.get("children", []))
