"""The commands without --dir, on what looks to them like a Xen host: an embedded one's store and sockets.

To the commands, its domains are domains with a daemon of ours each; what they don't drive is the store's.
"""

from __future__ import annotations

import json

import pytest

from xenbus.toolstack import xenhost


@pytest.fixture
def xenbus(host, command, monkeypatch):
    monkeypatch.delenv("XENBUS_DIR", raising=False)
    monkeypatch.setenv("XENBUS_STORE", str(host.root / "xenstored" / "socket"))
    monkeypatch.setenv("XENBUS_RUN", str(host.root / "control"))
    yield command
    command("domain", "destroy", "g", "--dir", str(host.root))


def foreign(xenbus, domid: str) -> None:
    """A keyboard that nobody serves."""
    front, back = f"/local/domain/{domid}/device/vkbd/0", f"/local/domain/0/backend/vkbd/{domid}/0"
    for path, value in {
        f"{front}/backend": back,
        f"{front}/backend-id": "0",
        f"{back}/frontend": front,
        f"{back}/frontend-id": domid,
        f"{back}/online": "1",
        f"{back}/state": "1",
        f"{front}/state": "6",
    }.items():
        assert xenbus("store", "write", path, value)[0] == 0


@pytest.mark.slow
def test_live_answers_stand_in_the_store_s_view(xenbus, host, tmp_path, monkeypatch):
    at = ("--dir", str(host.root))
    assert xenbus("domain", "create", "g", *at)[0] == 0
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    assert xenbus("attach", "block", "--domain", "g", "--image", str(image), *at)[0] == 0
    domid = str(json.loads(xenbus("domain", "list", "g", "--json")[1])[0]["domid"])
    foreign(xenbus, domid)

    code, out, err = xenbus("tree")
    assert (code, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    assert f"xbbd0 at backend/vbd/{domid}/51712: Connected" in lines
    assert "xbd0 at device/vbd/51712: Connected" in lines
    vkbd = f"vkbd-{domid}-0 at backend/vkbd/{domid}/0: Initialising; frontend vkbd-0 in g: Closed"
    assert any(line.startswith(vkbd) for line in lines)
    assert not any("vbd-" in line for line in lines)
    (tree,) = json.loads(xenbus("tree", "g", "--json")[1])
    fronts = [device["nameunit"] for device in tree["devices"][0]["children"][0]["children"]]
    assert sorted(fronts) == ["vkbd-0", "xbd0"]

    values = xenbus("sysctl", "-a", "--domain", "g")[1].splitlines()
    assert "dev.xbd.0.xenbus_connection_state: Connected" in values
    assert "dev.vkbd-0.xenbus_connection_state: Closed" in values
    assert not any(line.startswith("dev.vbd-") for line in values)

    with monkeypatch.context() as nobody:
        nobody.setenv("XENBUS_RUN", str(tmp_path))
        lines = [line.strip() for line in xenbus("tree", "g")[1].splitlines()]
        assert (
            f"vbd-51712 at device/vbd/51712: Connected; backend vbd-{domid}-51712 in Domain-0: Connected"
            in lines
        )
        assert xenbus("sysctl", "g/dev.xbd.0")[0] == 3

    assert xenbus("detach", "g/xbd0") == (0, "", "")
    assert "xbd0" not in xenbus("tree")[1]


def test_what_only_an_embedded_host_can_do(xenbus):
    code, _, err = xenbus("domain", "create", "h")
    assert code == 2 and "which host? Give --dir DIR" in err


def test_no_host_at_all(xenbus, monkeypatch):
    monkeypatch.setattr(xenhost, "_SIGNS", ())
    monkeypatch.delenv("XENBUS_STORE")
    for words in (["tree"], ["sysctl", "-a"], ["domain", "list"], ["detach", "xbd0"]):
        code, _, err = xenbus(*words)
        assert code == 2
        assert err == (
            "xenbus: which host? Give --dir DIR, or set XENBUS_DIR; this machine is no Xen domain\n"
        )


def test_no_store_answers(xenbus, monkeypatch, tmp_path):
    monkeypatch.setenv("XENBUS_STORE", str(tmp_path / "none"))
    code, _, err = xenbus("tree")
    assert code == 6 and "none" in err
