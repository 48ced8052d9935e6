"""`xenbus attach net` on a real host: nodes, both halves Connected, what the trees say, taken away again."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.drivers.net.test_tap import transfer
from tests.support import netlab
from tests.support.hosts import Site, up, visit
from tests.support.station import Station

from xenbus.cli.demo.stage import differences
from xenbus.errors import XenbusError
from xenbus.toolstack.devices import detach_device, wait_connected, write_device
from xenbus.toolstack.net import NicSpec

pytestmark = pytest.mark.slow
MAC = "00:16:3e:11:22:33"
LARGE = 64 << 20
ERRORS = ("rx_errors", "tx_errors", "rx_length_errors", "rx_frame_errors", "rx_copy_errors", "last_error")


@pytest.fixture
def xenbus(on_host):
    for name in ("g", "h"):
        on_host("domain", "create", name)  # unless an earlier test did
    yield on_host
    for name in ("g/vif0", "g/vif1", "h/vif0"):
        on_host("detach", name)


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


def test_frames_through_the_control_sockets(host, xenbus):
    """What the demo does where guests can have no kernel's stack."""
    macs = [bytes.fromhex(attach(xenbus, name)["mac"].replace(":", "")) for name in ("g", "h")]
    frames = [macs[1] + macs[0] + b"\x88\xb5" + bytes([n]) * 46 for n in range(5)]

    async def both(found):
        async def ask(name, operation, **params):
            return await found.toolstack.ask(name, "device", device="xn0", operation=operation, **params)

        for each in frames:
            await ask("g", "send", data=base64.b64encode(each).decode())
        got = []
        while len(got) < len(frames):
            some = await ask("h", "receive", limit=2)
            assert 1 <= len(some) <= 2
            got += map(base64.b64decode, some)
        refused = []
        for operation, params in (("send", {"data": "no base64!"}), ("receive", {"seconds": 0})):
            with pytest.raises(XenbusError) as caught:
                await ask("g", operation, **params)
            refused.append(str(caught.value))
        return got, refused

    got, (no_data, nothing) = visit(host.root, both)
    assert got == frames
    assert "no base64" in no_data and "a packet" in nothing


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
        found.append(visit(host.root, lambda made: made.baseline()))
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
        (["--bridge", ""], 2, "--bridge: no name"),
        (["--tap", ""], 2, "--tap: no name"),
        (["--switch", ""], 2, "--switch: no name"),
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
            await went(two, "far0")
            # The file is closed after the port.
            async with asyncio.timeout(10):
                while (size := capture.stat().st_size) <= 8 << 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        return {key: str(value) for key, value in said.items()} | {"captured": str(size)}


def test_two_kernels_through_a_host():
    said = netlab.run(through_a_host)
    assert "tap far0" in said["dev.xnb.0.port"]
    assert int(said["dev.xnb.0.rx_bytes"]) > 4 << 20 and int(said["dev.xnb.0.tx_bytes"]) > 4 << 20
    assert int(said["captured"]) > 8 << 20


async def iperf3(here, there, port: int, *words: str) -> dict[str, Any]:
    """What iperf3 `here` says of a run against one `there`, at 10.0.0.2, which serves once."""
    await there.ask("start", words=["iperf3", "-s", "-1", "-p", str(port)])
    command = ["iperf3", "-c", "10.0.0.2", "-p", str(port), "-t", "1", "--json", *words]
    async with asyncio.timeout(20):
        while True:
            said = json.loads((await here.ask("run", words=command))["out"])
            if "error" not in said:  # its exit code does not tell
                return said["end"]
            assert "Connection refused" in said["error"], said["error"]  # it does not listen yet
            await asyncio.sleep(0.05)


async def follows(station, device: str, mtu: int) -> None:
    """A TAP device has the MTU of the other end once it is told of the link."""
    async with asyncio.timeout(10):
        while (await station.ask("link", device=device))["mtu"] != mtu:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def went(station, device: str) -> None:
    """A guest hears of a device's end in its own time, and closes its TAP then."""
    async with asyncio.timeout(10):
        with pytest.raises(RuntimeError, match="No such device"):
            while await station.ask("link", device=device):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def jumbo_frames_under_iperf3() -> dict[str, Any]:
    """MTU 9000 in both processes: ping, iperf3 over TCP and UDP, a large file, and then nothing is left."""
    found: dict[str, Any] = {}
    with up() as host:
        async with Station() as one, Station() as two, Site.open(host.root) as here:
            toolstack = here.toolstack
            guest = await toolstack.create("g")
            nic = NicSpec(
                guest.domid,
                tap=f"far0?netns={two.netns}",
                front=f"tap:eth0?mac=guest&netns={one.netns}",
                mtu=9000,
                queues=2,
            ).device()
            for again in (False, True):  # what is kept for the next one is kept once
                before = await here.baseline()
                await write_device(here.store, nic)
                await wait_connected(here.store, nic.paths)
                for each, device, address in ((one, "eth0", "10.0.0.1"), (two, "far0", "10.0.0.2")):
                    await each.ask("up", device=device, address=address)
                    await follows(each, device, 9000)
                assert await one.ask("ping", host="10.0.0.2", size=8900) == 3
                if again:
                    found["tcp"] = await iperf3(one, two, 5201)
                    found["back"] = await iperf3(one, two, 5202, "-R")
                    found["udp"] = await iperf3(one, two, 5203, "-u", "-b", "40M", "-l", "8900")
                    await transfer(one, two, "10.0.0.2", size=LARGE)
                    await transfer(two, one, "10.0.0.1", size=LARGE)
                    for name in ("g", "Domain-0"):
                        said = dict(await toolstack.ask(name, "sysctl"))
                        found[name] = {k: v for k, v in said.items() if k.endswith(ERRORS) and v}
                    found["wrong"] = [await one.ask("wrong"), await two.ask("wrong")]
                await detach_device(here.store, nic.paths)
                if again:
                    found["left"] = await here.left(before)
                await went(two, "far0")
                await went(one, "eth0")
    return found


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is not installed")
def test_iperf3_and_large_frames_through_a_host():
    found = netlab.run(jumbo_frames_under_iperf3)
    for way in ("tcp", "back"):
        assert found[way]["sum_received"]["bytes"] > 1 << 20
    udp = found["udp"]["sum"]
    assert udp["packets"] > 100 and udp["lost_packets"] < udp["packets"] / 2
    # Lost is one thing, wrong another: neither kernel, neither driver saw a packet that was.
    assert found["wrong"] == [{}, {}] and found["g"] == found["Domain-0"] == {}
    assert found["left"] == []


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
    for option, kind in (("--bridge", "bridge"), ("--tap", "tun_flags")):
        assert complete(option, "") == {path.parent.name for path in Path("/sys/class/net").glob(f"*/{kind}")}
    attach(xenbus, "g", "--switch", "blue?source=own")
    attach(xenbus, "h")
    assert complete("--switch", "") == {"blue", "lan"}
    assert complete("--switch", "b") == {"blue"}
