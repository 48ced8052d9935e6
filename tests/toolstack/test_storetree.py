"""What the store tells of others' devices: cases of nodes as libxl writes them, in a real daemon."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.libxl_nodes import (
    BACK,
    BACK_ERROR,
    CONSOLE,
    FRONT,
    FRONT_ERROR,
    disk,
    host,
)
from tests.support.store_links import Store

from xenbus.errors import Denied, NoEntry
from xenbus.toolstack import storetree
from xenbus.toolstack.storetree import domain_tree, sysctl, walk
from xenbus.xenstore.client import Client

GONE = None
NOT_SERVED = f"nobody serves {BACK}: no driver for back ends of type vbd runs in Domain-0"
NOT_BEGUN = "waits for guest: no front end driver for vbd in the guest, or it is not loaded"


def with_nodes(nodes: dict[str, Any], look: Any) -> Any:
    """What `look(client, store)` answers in a store that holds `nodes` (None: not there)."""

    async def main() -> Any:
        store = Store()
        client, _ = await store.link("memory")
        try:
            async with asyncio.timeout(20):
                for path, value in nodes.items():
                    if value is not None:
                        await client.write(path, value)
                answer = await look(client, store)
                await client.read("/")
                assert set(client.counts().values()) == {0}
                return answer
        finally:
            await client.close()
            await store.close()

    return asyncio.run(main())


async def both(client: Client, _store: Store | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every device of both domains by its name on its bus, and both answers."""
    answers = {domid: await domain_tree(client, domid) for domid in (0, 5)}
    found = {
        device["nameunit"]: device
        for answer in answers.values()
        for device in walk(answer["devices"])
        if "node" in device
    }
    json.dumps(answers)
    return found, answers


def devices(changes: dict[str, Any], front: int = 4, back: int = 4) -> dict[str, Any]:
    return with_nodes(host() | disk(front, back) | changes, both)[0]


# ---- who owes ----

# (front's state, back's state, other changes, what the front waits for, what the back waits for)
CASES = {
    "connected": (4, 4, {}, "", ""),
    "back is not served": (1, 1, {f"{BACK}/hotplug-status": GONE}, NOT_SERVED, NOT_SERVED),
    "front has not begun": (1, 2, {}, NOT_BEGUN, NOT_BEGUN),
    "back has to connect": (
        3,
        2,
        {},
        f"waits for backend {BACK} (domain 0, INIT_WAIT) to reach CONNECTED",
        "waits for its own driver: frontend is INITIALISED",
    ),
    "front has to connect": (
        3,
        4,
        {},
        "waits for its own driver: backend is CONNECTED",
        "waits for the front end in guest to go from Initialised to Connected",
    ),
    "front comes back to a back end that is still connected": (
        1,
        4,
        {},
        "waits for its own driver: backend is CONNECTED",
        "waits for the front end in guest to go from Initialising to Connected",
    ),
    "netfront is connected first": (
        4,
        2,
        {},
        "waits for the back end in Domain-0 to go from InitWait to Connected",
        "waits for its own driver: frontend is CONNECTED",
    ),
    "back is closing": (
        4,
        5,
        {f"{BACK}/online": "0"},
        "its own driver has to close: the back end is Closing",
        f"waits for frontend {FRONT} (domain 5, CONNECTED) to reach CLOSED",
    ),
    "front has closed, back has not": (
        6,
        4,
        {},
        "waits for the back end in Domain-0 to go from Connected to Closed",
        "its own driver has to close: the front end is Closed",
    ),
    "both are closed": (6, 6, {}, "", ""),
    "hotplug script has not come": (
        3,
        2,
        {f"{BACK}/hotplug-status": GONE, f"{BACK}/physical-device": GONE},
        "waits for the back end's hotplug script /etc/xen/scripts/block: no hotplug-status yet",
        "waits for the back end's hotplug script /etc/xen/scripts/block: no hotplug-status yet",
    ),
    "hotplug script failed with a word": (
        1,
        2,
        {f"{BACK}/hotplug-status": "error", f"{BACK}/hotplug-error": "/dev/sdx does not exist"},
        "the back end's hotplug script failed: /dev/sdx does not exist",
        "the back end's hotplug script failed: /dev/sdx does not exist",
    ),
    "hotplug script failed": (
        1,
        2,
        {f"{BACK}/hotplug-status": "error"},
        "the back end's hotplug script says 'error'",
        "the back end's hotplug script says 'error'",
    ),
    "back gave up": (
        1,
        6,
        {BACK_ERROR: "2 opening /dev/loop0"},
        "its back end gave up: 2 opening /dev/loop0",
        "this end gave up: 2 opening /dev/loop0",
    ),
    "front gave up": (
        6,
        4,
        {FRONT_ERROR: "22 reading backend fields"},
        "this end gave up: 22 reading backend fields",
        "its front end gave up: 22 reading backend fields",
    ),
    "front names nobody": (
        1,
        2,
        {f"{FRONT}/backend": GONE},
        "no backend node: whoever made the device has to name its back end",
        NOT_BEGUN,
    ),
    "front names what is no back end": (
        1,
        2,
        {f"{FRONT}/backend": "/local/domain/0/vm"},
        "backend is '/local/domain/0/vm', which is no back end: "
        "whoever made the device has to name its back end",
        NOT_BEGUN,
    ),
    "own state is missing": (
        GONE,
        2,
        {},
        "no state node: whoever made the device has to write it",
        f"waits for frontend {FRONT} (domain 5, UNKNOWN) to reach INITIALISED",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_who_owes_the_next_move(case):
    front, back, changes, front_waits, back_waits = case
    nodes = host() | disk(front, back) | changes
    if front is GONE:
        nodes[f"{FRONT}/state"] = GONE
    found = with_nodes(nodes, both)[0]
    assert found["vbd-51712"]["waits"] == front_waits
    assert found["vbd-5-51712"]["waits"] == back_waits


def without(prefix: str, nodes: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in nodes.items() if not f"{path}/".startswith(f"{prefix}/")}


def test_the_other_half_is_not_there():
    nodes = host() | disk(4, 4)
    front = with_nodes(without(BACK, nodes), both)[0]["vbd-51712"]
    assert front["waits"] == f"the directory of its back end {BACK} is not there: the toolstack has to act"
    back = with_nodes(without(FRONT, nodes), both)[0]["vbd-5-51712"]
    assert back["waits"].startswith(f"the directory of its front end {FRONT} is not there")


def test_the_other_half_s_domain_is_gone():
    nodes = without("/local/domain/5", host() | disk(4, 4))
    back = with_nodes(nodes, both)[0]["vbd-5-51712"]
    assert back["waits"] == "the domain of its front end (5) is gone: the toolstack has to remove this"
    assert back["otherend"]["domain"] is None


def test_a_console_owes_nothing():
    """xenconsoled does no handshake: both halves stay as they were written."""
    console = devices({})["console-5-0"]
    assert (console["state"], console["waits"]) == ("Initialising", "")
    assert console["otherend"]["path"] == CONSOLE


def test_what_is_no_device_is_left_out():
    assert set(devices({})) == {"vbd-51712", "vbd-5-51712", "console-5-0"}


# ---- what else is told ----

NOTES = {
    "a state that is none": ({f"{FRONT}/state": "banana"}, "state is 'banana', which is none"),
    "a peer's": ({f"{BACK}/state": "99"}, "the back end's state is '99', which is none"),
    "an error": ({FRONT_ERROR: "22 no"}, "error: 22 no"),
    "a peer's error": ({BACK_ERROR: "22 no"}, "error of the back end: 22 no"),
    "the script's error": ({f"{BACK}/hotplug-error": "no"}, "hotplug-error: no"),
    "offline": ({f"{BACK}/online": "0"}, "online is 0: the toolstack wants the device gone"),
    "offline and closed": (
        {f"{BACK}/online": "0", f"{BACK}/state": "6"},
        "online is 0 and the back end is Closed: the toolstack may remove the device",
    ),
    "two domids": ({f"{FRONT}/backend-id": "7"}, "backend-id is '7', but the path is of domain 0"),
    "no domid": ({f"{FRONT}/backend-id": GONE}, "no backend-id node"),
    "somebody else's": (
        {f"{BACK}/frontend": "/local/domain/9/device/vbd/51712"},
        "its back end names another front end: /local/domain/9/device/vbd/51712",
    ),
}


@pytest.mark.parametrize(("changes", "note"), NOTES.values(), ids=NOTES)
def test_notes(changes, note):
    assert devices(changes)["vbd-51712"]["notes"] == [note]


def test_a_device_in_order_has_no_notes():
    found = devices({})
    assert [device["notes"] for device in found.values()] == [[], [], []]


# ---- how it is shown ----


def test_lines():
    _, answers = with_nodes(host() | disk(1, 2) | {BACK_ERROR: "5 late"}, both)
    assert answers[5]["lines"] == [
        "xenstore0",
        "  xenbusb_front0",
        "    vbd-51712 at device/vbd/51712: Initialising; backend vbd-5-51712 in Domain-0: InitWait; "
        + NOT_BEGUN,
        "      ! error of the back end: 5 late",
        "  xenbusb_back0",
    ]
    assert answers[0]["lines"][-2:] == [
        "    vbd-5-51712 at backend/vbd/5/51712: InitWait; frontend vbd-51712 in guest: Initialising; "
        + NOT_BEGUN,
        "      ! error: 5 late",
    ]


def test_the_type_of_the_back_end_may_be_another():
    qdisk = "/local/domain/0/backend/qdisk/5/51712"
    found = devices(
        {f"{FRONT}/backend": qdisk, f"{qdisk}/state": "4", f"{qdisk}/frontend": FRONT, f"{BACK}/state": GONE}
    )
    assert found["vbd-51712"]["otherend"]["type"] == "qdisk"
    assert found["qdisk-5-51712"]["otherend"] == {
        "id": 5,
        "path": FRONT,
        "state": "Connected",
        "type": "vbd",
        "domain": "guest",
    }


def test_sysctl():
    _, answers = with_nodes(host() | disk(4, 4), both)
    assert sysctl(answers[5]) == [
        ("dev.vbd-51712.xenstore_path", "device/vbd/51712"),
        ("dev.vbd-51712.xenbus_dev_type", "vbd"),
        ("dev.vbd-51712.xenbus_connection_state", "Connected"),
        ("dev.vbd-51712.xenbus_peer_domid", 0),
        ("dev.vbd-51712.xenstore_peer_path", BACK),
    ]


# ---- a store that others change, and that guests write ----


@given(
    st.dictionaries(
        st.sampled_from(sorted(host() | disk(4, 4) | {BACK_ERROR: "", FRONT_ERROR: ""})),
        st.none() | st.binary(max_size=300) | st.integers(0, 9).map(str),
        max_size=6,
    )
)
@settings(max_examples=100, deadline=None)
def test_whatever_nodes_hold_lines_are_printable_and_short(changes):
    _, answers = with_nodes(host() | disk(4, 4) | changes, both)
    for answer in answers.values():
        for line in answer["lines"]:
            assert line.isprintable()
            assert len(line) < 5 * storetree.TEXT_MAX


def test_nodes_that_go_while_we_look():
    """Everything below a path vanishes after the n-th request, for each n there is."""

    async def look(client: Client, store: Store) -> int:
        real, left = client.read, 0

        async def read(path: str) -> bytes:
            nonlocal left
            left -= 1
            if left == 0:
                for gone in (FRONT, BACK):
                    if await client.exists(gone):
                        await client.rm(gone)
            return await real(path)

        client.read = read  # type: ignore[method-assign]
        for n in range(1, 40):
            for path, value in disk(1, 2).items():
                await client.write(path, value)
            left = n
            found, _ = await both(client)
            everything = {"vbd-51712", "vbd-5-51712", "console-5-0"}
            assert set(found) <= everything if left <= 0 else set(found) == everything
            assert "console-5-0" in found
            left = -1
        return n

    assert with_nodes(host(), look) == 39


def test_nodes_that_may_not_be_read():
    """A guest sees its own domain, and of its peer what it may read."""

    async def look(client: Client, store: Store) -> tuple[Any, Any]:
        guest = await store.guest(client, 5)
        await client.set_perms("/local/domain/5/device", ["n0", "r5"])
        for path in ("/local/domain/5", "/local/domain/5/device/vbd", FRONT):
            await client.set_perms(path, ["n5", "r0"])
        for key in ("state", "backend", "backend-id"):
            await client.set_perms(f"{FRONT}/{key}", ["n5", "r0"])
        with pytest.raises(Denied):
            await guest.read(f"{BACK}/state")
        try:
            closed = await domain_tree(guest, 5)
            for path in (BACK, f"{BACK}/state"):
                await client.set_perms(path, ["n0", "r5"])
            opened = await domain_tree(guest, 5)
            other = await domain_tree(guest, 0)
        finally:
            await guest.close()
        assert other["lines"] == [
            "xenstore0",
            "  xenbusb_front0",
            "    ! /local/domain/0/device is not ours to read",
            "  xenbusb_back0",
            "    ! /local/domain/0/backend is not ours to read",
        ]
        return [list(walk(answer["devices"]))[2] for answer in (closed, opened)]

    closed, opened = with_nodes(host() | disk(4, 4), look)
    assert closed["waits"] == f"unknown: {BACK}/state is not ours to read"
    assert closed["state"] == "Connected"
    assert (opened["waits"], opened["otherend"]["state"]) == ("", "Connected")


def test_more_devices_than_are_shown(monkeypatch):
    monkeypatch.setattr(storetree, "DEVICES_MAX", 4)
    nodes = host() | {f"/local/domain/5/device/vbd/{n}/backend": BACK for n in range(10)}
    _, answers = with_nodes(nodes, both)
    front = answers[5]["devices"][0]["children"][0]
    assert len(front["children"]) == 3  # and one node of the four is no device
    assert front["notes"] == [storetree.TOO_MANY]


def test_there_is_no_such_domain():
    async def look(client: Client, store: Store) -> Any:
        with pytest.raises(NoEntry):
            await client.read("/local/domain/77")
        return await domain_tree(client, 77)

    assert with_nodes({}, look)["lines"] == ["xenstore0", "  xenbusb_front0", "  xenbusb_back0"]
