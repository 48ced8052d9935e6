"""`xenbus attach net` on a real host: nodes, both halves Connected, what the trees say, taken away again."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support import netlab
from tests.support.hosts import Site, up
from tests.support.station import Station

from xenbus.cli.demo.stage import differences
from xenbus.cli.main import run

pytestmark = pytest.mark.slow
MAC = "00:16:3e:11:22:33"


@pytest.fixture(scope="module")
def host():
    with up() as running:
        yield running


@pytest.fixture
def xenbus(host, monkeypatch, capsys):
    monkeypatch.setenv("XENBUS_DIR", str(host.root))
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*words):
        capsys.readouterr()
        code = run(list(words))
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        return int(code), out, err

    for name in ("g", "h"):
        call("domain", "create", name)  # unless an earlier test did
    yield call
    for name in ("g/vif0", "g/vif1", "h/vif0"):
        call("detach", name)


def site(host, test):
    async def main():
        async with Site.open(host.root) as found:
            return await test(found)

    return asyncio.run(main())


def gone(xenbus, word, name="g"):
    """The guest's bus hears of a removal in its own time."""
    end = time.monotonic() + 10
    while word in (text := xenbus("tree", name)[1]):
        assert time.monotonic() < end, text


def attach(xenbus, name, *words):
    code, out, err = xenbus("attach", "net", "--domain", name, "--json", *words)
    assert code == 0, err
    return json.loads(out)


def values(xenbus, name):
    domain = name.partition("/")[0]
    return dict(json.loads(xenbus("sysctl", name, "--json")[1])[domain])


def test_two_guests_on_a_switch(host, xenbus):
    first = attach(xenbus, "g", "--mac", MAC)
    second = attach(xenbus, "h", "--switch", "lan", "--mtu", "9000", "--queues", "2")
    domids = [each["front"].split("/")[3] for each in (first, second)]
    assert first == {
        "front": f"/local/domain/{domids[0]}/device/vif/0",
        "back": f"/local/domain/0/backend/vif/{domids[0]}/0",
        "devid": 0,
        "mac": MAC,
    }
    assert second["mac"].startswith("00:16:3e:") and second["mac"] != MAC
    assert attach(xenbus, "g")["devid"] == 1
    tree = xenbus("tree")[1]
    assert "xn0 at device/vif/0: Connected" in tree and "xn1 at device/vif/1: Connected" in tree
    assert f"xnb1 at backend/vif/{domids[1]}/0: Connected" in tree
    said = values(xenbus, "h/dev.xn.0")
    assert (said["dev.xn.0.mac"], said["dev.xn.0.mtu"], said["dev.xn.0.queues"]) == (second["mac"], 9000, 2)
    back = [str(value) for value in values(xenbus, "Domain-0/dev.xnb").values()]
    assert sum("switch lan" in value for value in back) == 3
    assert xenbus("detach", "g/xn0") == (0, "", "")
    assert attach(xenbus, "g")["devid"] == 0  # the lowest free number


def test_detached_they_hold_nothing(host, xenbus):
    found = []
    for _ in range(2):  # what is kept for the next one is kept once
        for name in ("g", "h"):
            attach(xenbus, name)
        for name in ("g/vif0", "h/xn0"):
            assert xenbus("detach", name) == (0, "", "")
        found.append(site(host, lambda made: made.baseline()))
    assert differences(*found) == []


def test_a_restored_guest_has_its_device_again(xenbus):
    made = attach(xenbus, "g", "--mac", MAC, "--mtu", "1400")
    assert xenbus("domain", "suspend", "g")[0] == 0
    code, out, err = xenbus("domain", "resume", "g", "--restore", "--json")
    assert code == 0, err
    after = json.loads(out)["domid"]
    assert str(after) != made["front"].split("/")[3]
    end = time.monotonic() + 10
    while f"backend/vif/{after}/0: Connected" not in (tree := xenbus("tree", "Domain-0")[1]):
        assert time.monotonic() < end, tree
    said = values(xenbus, "g/dev.xn.0")
    assert (said["dev.xn.0.mac"], said["dev.xn.0.mtu"]) == (MAC, 1400)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--mac", "nonsense"], 2, "no MAC"),
        (["--mac", "ff:ff:ff:ff:ff:ff"], 2, "group"),
        (["--bridge", "b", "--tap", "t"], 2, "one far side"),
        (["--tap", "x" * 20], 1, "no name of a network device"),
        (["--mtu", "10"], 2, "68 to"),
        (["--queues", "99"], 2, "1 to 16"),
        (["--front", "printer:"], 1, "no port scheme printer"),
        (["--switch", "a/b"], 1, "no switch's name"),
        (["--tap", "lo"], 1, "EINVAL"),
    ],
)
def test_what_is_refused_says_why_and_leaves_nothing(xenbus, words, code, text):
    if words == ["--tap", "lo"]:
        text = "EPERM|EINVAL|ENOENT"  # who may not make one is told that first
    got, out, err = xenbus("attach", "net", "--domain", "g", *words)
    assert (got, out) == (code, "") and any(part in err for part in text.split("|")), err
    gone(xenbus, "vif")


def test_domains_that_are_not_there(xenbus):
    assert xenbus("attach", "net", "--domain", "nobody")[0] == 3
    assert xenbus("attach", "net", "--domain", "g", "--backend", "nobody")[0] == 3


def test_written_and_not_waited_for(xenbus):
    attach(xenbus, "g", "--no-wait", "--switch", "other")
    assert xenbus("detach", "g/vif0") == (0, "", "")


def test_a_capture(xenbus, tmp_path):
    path = tmp_path / "with a blank.pcapng"
    attach(xenbus, "g", "--capture", str(path))
    assert path.read_bytes()[:4] == bytes.fromhex("0a0d0d0a")  # a section header of pcapng
    assert xenbus("detach", "g/vif0")[0] == 0
    code, _, err = xenbus("attach", "net", "--domain", "g", "--capture", "/nowhere/x")
    assert code == 1 and "capture to /nowhere/x: No such file" in err


async def through_a_host() -> dict[str, str]:
    """As root of a user namespace: two kernels' stacks, a guest's process and domain 0's between them."""
    with up() as host:
        os.environ["XENBUS_DIR"] = str(host.root)
        capture = host.root / "vif.pcapng"
        async with Station() as one, Station() as two:

            def command(*words: str) -> dict[str, Any]:
                done = subprocess.run(
                    [sys.executable, "-m", "xenbus", *words], capture_output=True, text=True, timeout=20
                )
                assert done.returncode == 0, done.stderr
                return json.loads(done.stdout or "{}")

            command("domain", "create", "g", "--json")
            front = f"tap:eth0?up=0&mac=guest&netns={one.netns}"
            back = f"far0?up=0&netns={two.netns}&capture={capture}"
            made = command("attach", "net", "--domain", "g", "--front", front, "--tap", back, "--json")
            link = await one.ask("up", device="eth0", address="10.0.0.1")
            assert link["mac"] == made["mac"]
            await two.ask("up", device="far0", address="10.0.0.2")
            assert await one.ask("ping", host="10.0.0.2") == 3
            for here, there, address in ((one, two, "10.0.0.2"), (two, one, "10.0.0.1")):
                port = await there.ask("listen")
                sent = await here.ask("push", host=address, port=port, size=4 << 20)
                assert (await there.ask("heard"))["sha256"] == sent
            said = command("sysctl", "Domain-0/dev.xnb.0", "--json")["Domain-0"]
            command("detach", "g/xn0")
            with pytest.raises(RuntimeError, match="No such device"):
                await two.ask("link", device="far0")
        size = capture.stat().st_size
        return {key: str(value) for key, value in said.items()} | {"captured": str(size)}


def test_two_kernels_through_a_host():
    said = netlab.run(through_a_host)
    assert "tap far0" in said["dev.xnb.0.port"]
    assert int(said["dev.xnb.0.rx_bytes"]) > 4 << 20 and int(said["dev.xnb.0.tx_bytes"]) > 4 << 20
    assert int(said["captured"]) > 8 << 20


def test_completion(xenbus):
    def complete(*words):
        words = ("xenbus", "attach", "net", *words)
        environment = {
            "_XENBUS_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-c", "from xenbus.cli.main import main; main()"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=20,
        )
        return {line.partition(",")[2] for line in done.stdout.splitlines() if line.strip()}

    assert {"g", "h"} <= complete("--domain", "")
    assert complete("--bridge", "") == {path.parent.name for path in Path("/sys/class/net").glob("*/bridge")}
