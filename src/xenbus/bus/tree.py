"""The device tree as data, for `xenbus tree` and JSON: what each device is, where it stands, who owes a move.

Reads devices; asks no store.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xenbus.bus.device import XenbusDevice
from xenbus.bus.life import waits
from xenbus.bus.state import strstate
from xenbus.newbus import Device


def describe(device: Device) -> dict[str, Any]:
    """`device` and all below it. Values are what JSON can hold; times are seconds."""
    found: dict[str, Any] = {
        "nameunit": device.nameunit,
        "path": device.path,
        "desc": device.desc,
        "device_state": device.state.name,
    }
    if isinstance(device.ivars, XenbusDevice):
        found |= _describe_xenbus(device.ivars)
    found["children"] = [describe(child) for child in device.children]
    return found


def _describe_xenbus(dev: XenbusDevice) -> dict[str, Any]:
    return {
        "node": dev.node,
        "type": dev.type,
        "side": dev.side.value,
        "state": strstate(dev.state),
        "otherend": {
            "id": dev.otherend_id,
            "path": dev.otherend_path,
            "state": strstate(dev.otherend_state),
        },
        "for_seconds": round(dev.bus.now() - dev.since, 1),
        "waits": waits(dev),
        "failed": dev.failed,
        "features": dev.features.as_dict() if dev.features is not None else {},
        "counters": dev.counters,
        "held": dev.counts(),
    }


def lines(tree: dict[str, Any], depth: int = 0) -> Iterator[str]:
    """A line a device of `describe`'s data: `xbd0 at device/vbd/51712: InitWait; waits for ... since 12
    s`; what else is known of it (`peer`, `notes`, which only the store's view has) after it and below."""
    text = tree["nameunit"] or "(no driver)"
    if "node" in tree:
        text += f" at {tree['node']}: {tree['state']}"
        if peer := tree.get("peer"):
            text += f"; {peer}"
        if tree["waits"]:
            text += f"; {tree['waits']}"
            if tree["for_seconds"] is not None:
                text += f" since {tree['for_seconds']:.0f} s"
    if tree["nameunit"] or depth:
        yield "  " * depth + text
        depth += 1
    for note in tree.get("notes", ()):
        yield "  " * depth + f"! {note}"
    for child in tree["children"]:
        yield from lines(child, depth)
