"""A domain's device tree as the store alone shows it, whosever drivers serve it, by Linux's names.

The data that bus/tree.py gives of a live tree, with the store's other half of each device. Reads a store
that others change meanwhile, guests among them: what goes while we look is left out, what may not be read is
said, and no more is read of anything than the bounds below.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator
from typing import Any

from xenbus.bus.state import Side, strstate
from xenbus.bus.tree import lines
from xenbus.errors import NoEntry, StoreError
from xenbus.toolstack.cases import PEER_KEYS, Half, Seen, notes, waits
from xenbus.toolstack.paths import domain_path
from xenbus.xenstore.client import Client

DEVICES_MAX = 1000  # of one bus; the nodes that a guest may have (xenstored, quota "nodes")
NAMES_MAX = 1000  # children of one directory
REFUSED_MAX = 3  # directories that are named as not to be read
TOO_MANY = f"more than {DEVICES_MAX} devices: the others are not shown"
TEXT_MAX = 200  # characters of one value

# What is read of a half's directory. `script` and the hotplug nodes are libxl's, `dev` its name for a disk.
_KEYS = {
    Side.FRONT: ("state", "backend", "backend-id"),
    Side.BACK: (
        "state",
        "frontend",
        "frontend-id",
        "online",
        "hotplug-status",
        "hotplug-error",
        "script",
        "dev",
    ),
}
_DOMAIN = r"/local/domain/(?P<domid>[0-9]{1,5})/"
_PATHS = {
    Side.FRONT: re.compile(_DOMAIN + r"(?P<node>device/(?P<type>[^/]+)/[^/]+|console)"),
    Side.BACK: re.compile(_DOMAIN + r"(?P<node>backend/(?P<type>[^/]+)/[0-9]{1,5}/[^/]+)"),
}
_BUSES = {
    Side.FRONT: ("xenbusb_front0", "Xen Frontend Devices", "device"),
    Side.BACK: ("xenbusb_back0", "Xen Backend Devices", "backend"),
}
LEAVES = (
    "xenstore_path",
    "xenbus_dev_type",
    "xenbus_connection_state",
    "xenbus_peer_domid",
    "xenstore_peer_path",
)


def shown(text: str) -> str:
    """Printable on any terminal, and short."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: TEXT_MAX + 1])
    return text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "..."


def walk(devices: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each device of such data, those above first."""
    for device in devices:
        yield device
        yield from walk(device["children"])


def with_live(stored: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    """The store's view of a domain, but what a daemon of ours drives there as the daemon itself says it."""
    driven = {device["node"]: device for device in walk(live["devices"]) if "node" in device}
    for bus in stored["devices"][0]["children"]:
        here = [driven.pop(device["node"], device) for device in bus["children"]]
        side = bus["side"]
        bus["children"] = here + [driven.pop(node) for node in list(driven) if driven[node]["side"] == side]
    return answer(stored["domid"], stored["devices"])


async def domain_tree(store: Client, domid: int) -> dict[str, Any]:
    """What a control socket answers to `tree`: `domid`, `devices`, `lines`."""
    reader = _Reader(store)
    buses = await asyncio.gather(*(_bus(reader, domid, side) for side in (Side.FRONT, Side.BACK)))
    root = {
        "nameunit": "xenstore0",
        "path": "xenstore0",
        "desc": "XenStore",
        "device_state": None,
        "children": list(buses),
    }
    return answer(domid, [root])


def answer(domid: int, roots: list[dict[str, Any]]) -> dict[str, Any]:
    return {"domid": domid, "devices": roots, "lines": [line for root in roots for line in lines(root)]}


def sysctl(tree: dict[str, Any]) -> list[tuple[str, object]]:
    """The seed's five leaves (`dev.vbd-51712.xenstore_path`) of devices that no daemon of ours drives."""
    found: list[tuple[str, object]] = []
    for device in walk(tree["devices"]):
        if device.get("source") == "store":
            other = device["otherend"]
            values = (device["node"], device["type"], device["state"], other["id"], other["path"])
            base = f"dev.{device['nameunit']}."
            found += [(base + leaf, value) for leaf, value in zip(LEAVES, values, strict=True)]
    return found


async def _bus(reader: _Reader, domid: int, side: Side) -> dict[str, Any]:
    name, desc, folder = _BUSES[side]
    nodes, refused = await reader.below(f"{domain_path(domid)}/{folder}", 2 if side is Side.FRONT else 3)
    seen = await asyncio.gather(*(_see(reader, domid, side, node) for node in nodes[:DEVICES_MAX]))
    return {
        "nameunit": name,
        "path": f"xenstore0/{name}",
        "desc": desc,
        "device_state": None,
        "side": side.value,
        "notes": [f"{path} is not ours to read" for path in refused[:REFUSED_MAX]]
        + ([TOO_MANY] if len(nodes) > DEVICES_MAX else []),
        "children": [_describe(each, f"xenstore0/{name}") for each in seen if each is not None],
    }


async def _see(reader: _Reader, domid: int, side: Side, path: str) -> Seen | None:
    """None for what is no device (device/suspend/event-channel), or went meanwhile."""
    own = await reader.half(side, path)
    key = PEER_KEYS[side][0]
    if own is None or not {"state", key} & (own.values.keys() | own.unreadable):
        return None
    peer = await reader.half(side.peer, own.values.get(key, ""))
    return Seen(side, own, peer or Half())


def _describe(seen: Seen, bus: str) -> dict[str, Any]:
    own, peer = seen.own, seen.peer
    state = strstate(own.state)
    text = f"{seen.side.peer.value} {peer.name} in {peer.where}: {strstate(peer.state)}" if peer.path else ""
    return {
        "nameunit": own.name,
        "path": f"{bus}/{own.name}",
        "desc": "",
        "device_state": None,
        "source": "store",
        "node": own.path.split("/", 4)[4],
        "type": own.type,
        "side": seen.side.value,
        "state": state,
        "otherend": {
            "id": peer.domid if peer.path else None,
            "path": peer.path,
            "state": strstate(peer.state),
            "type": peer.type,
            "domain": peer.domain,
        },
        "dev": seen.back.values.get("dev", ""),
        "online": seen.back.values.get("online", ""),
        "hotplug_status": seen.back.values.get("hotplug-status", ""),
        "for_seconds": None,
        "waits": waits(seen),
        "failed": own.values.get("error", ""),
        "peer": text,
        "notes": notes(seen),
        "children": [],
    }


class _Reader:
    """One look at a store. What several devices share, their peers' domains, is read once."""

    def __init__(self, store: Client) -> None:
        self._store = store
        self._domains: dict[int, asyncio.Task[str | None]] = {}

    async def below(self, path: str, depth: int) -> tuple[list[str], list[str]]:
        """The nodes that many directories further down, numbers in their order, and the directories on the
        way that the store would not list."""
        found, refused = [path], []
        for _ in range(depth):
            lists = await asyncio.gather(*(self._names(each) for each in found[: DEVICES_MAX + 1]))
            pairs = list(zip(found, lists, strict=False))
            refused += [each for each, names in pairs if names is None]
            found = [f"{each}/{name}" for each, names in pairs for name in names or ()]
        return found, refused

    async def _names(self, path: str) -> list[str] | None:
        """None if the store will not say."""
        try:
            names = await self._store.directory(path)
        except NoEntry:
            return []
        except StoreError:
            return None
        return sorted(names, key=_by_number)[:NAMES_MAX]

    async def half(self, side: Side, path: str) -> Half | None:
        """None if `path` names no half of that side."""
        match = _PATHS[side].fullmatch(path)
        if match is None:
            return None
        domid, node = int(match["domid"]), match["node"]
        kind = match["type"] or "console"
        error = f"{domain_path(domid)}/error/{node}/error"
        keys = _KEYS[side]
        domain, values, text = await asyncio.gather(
            self.domain(domid),
            asyncio.gather(*(self._value(f"{path}/{key}") for key in keys)),
            self._value(error),
        )
        found = dict(zip(keys, values, strict=True)) | {"error": text}
        half = Half(path, domid, domain, shown(kind), shown(_name(side, node)))
        half.values = {key: value for key, value in found.items() if isinstance(value, str)}
        half.unreadable = frozenset(key for key, value in found.items() if isinstance(value, StoreError))
        if not half.values and not half.unreadable:
            half.there = await self._value(path) is not None
        return half

    async def _value(self, path: str) -> str | StoreError | None:
        """None if it is not there, the error if it cannot be read for another reason."""
        try:
            return shown(await self._store.read_str(path))
        except NoEntry:
            return None
        except StoreError as error:
            return error

    async def domain(self, domid: int) -> str | None:
        """Its name, "" if that may not be read, None if there is no such domain."""
        task = self._domains.get(domid)
        if task is None:
            task = self._domains[domid] = asyncio.ensure_future(self._domain(domid))
        return await task

    async def _domain(self, domid: int) -> str | None:
        name = await self._value(f"{domain_path(domid)}/name")
        if isinstance(name, str):
            return name
        if name is None and await self._value(domain_path(domid)) is None:
            return None
        return ""


def _by_number(name: str) -> tuple[int, str]:
    return (len(name), name) if name.isdecimal() else (0, name)


def _name(side: Side, node: str) -> str:
    """As Linux does (its frontend_bus_id, backend_bus_id): the path below the bus, with `-` for `/`."""
    return node.partition("/")[2].replace("/", "-") or node
