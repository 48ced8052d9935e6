"""Every subcommand through the real entry, against one `xenbus up`; Debian's programs beside it."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.hosts import Up, alive, place, processes, visit

from xenbus.cli.main import run

pytestmark = pytest.mark.slow
SIZE = 1 << 20
XENBUS = [sys.executable, "-m", "xenbus.cli.main"]


@pytest.fixture
def xenbus(on_host):
    yield on_host
    for name in ("g", "h"):
        on_host("domain", "destroy", name)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def guest(xenbus, image=None, name="g"):
    assert xenbus("domain", "create", name)[0] == 0
    if image is not None:
        code, _, err = xenbus("attach", "block", "--domain", name, "--image", str(image))
        assert code == 0, err


# -- domains


def test_domain_create_list_destroy(xenbus):
    code, out, _ = xenbus("domain", "create", "g")
    assert code == 0 and out.startswith("g: domain ") and out.endswith(", running\n")
    code, out, _ = xenbus("domain", "list")
    assert code == 0 and out.splitlines()[0].split() == ["ID", "NAME", "STATE", "PID"]
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["Domain-0", "g"]
    found = json.loads(xenbus("domain", "list", "g", "--json")[1])
    assert [(d["name"], d["state"]) for d in found] == [("g", "running")] and alive(found[0]["pid"])
    assert xenbus("domain", "list", str(found[0]["domid"]))[0] == 0
    assert xenbus("domain", "destroy", "g") == (0, "", "")
    assert not alive(found[0]["pid"])


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["domain", "list", "nobody"], 3, "no domain 'nobody'"),
        (["domain", "destroy", "nobody"], 3, "no domain 'nobody'"),
        (["domain", "suspend", "nobody"], 3, "no domain"),
        (["domain", "shutdown", "Domain-0"], 2, "domain 0"),
        (["domain", "destroy", "0"], 2, "domain 0"),
        (["domain", "create", "a/b"], 2, "a domain's name"),
        (["domain", "create", "Domain-0"], 2, "exists"),
        (["domain", "create"], 2, "NAME"),
        (["domain", "resume", "Domain-0"], 2, "domain 0"),
        (["domain", "resume", "x", "--backend", "y"], 2, "--restore"),
        (["domain", "suspend", "x", "--timeout", "0"], 2, "timeout"),
        (["attach", "block", "--domain", "nobody", "--image", "memory:1M"], 3, "no domain 'nobody'"),
        (["attach", "block", "--domain", "0"], 2, "--image"),
        (["attach", "nothing"], 2, "nothing"),
        (["detach", "xbd7"], 3, "no device 'xbd7' in any domain"),
        (["detach", "nobody/xbd0"], 3, "no device 'nobody/xbd0'"),
        (["detach", "Domain-0/xenbusb_back0"], 2, "no device that can be detached"),
        (["detach", "Domain-0/"], 3, "no device"),
        (["tree", "nobody"], 3, "no domain"),
        (["sysctl"], 2, "which variable"),
        (["sysctl", "dev.nothing"], 3, "unknown oid 'dev.nothing'"),
        (["sysctl", "nobody/dev"], 3, "no domain"),
        (["nbd", "xbd7", "--socket", "/tmp/x"], 3, "no device"),
        (["store", "read", "/nothing"], 3, "/nothing"),
        (["store", "write", "/a"], 2, "a value is missing"),
    ],
)
def test_what_is_refused_says_what_and_has_its_code(xenbus, words, code, text):
    got, out, err = xenbus(*words)
    assert (got, out) == (code, "") and text in err
    assert len(err.strip().splitlines()) <= 4


def test_suspend_and_resume_cancelled_and_restored(xenbus, host, image):
    guest(xenbus, image)
    guest(xenbus, name="h")
    before = json.loads(xenbus("domain", "list", "g", "--json")[1])[0]
    assert xenbus("domain", "resume", "g")[0] == 2
    assert "suspended" in xenbus("domain", "suspend", "g")[1]
    assert xenbus("domain", "suspend", "g")[0] == 2
    assert xenbus("tree", "g")[0] == 0  # a suspended one can be looked at
    assert json.loads(xenbus("domain", "resume", "g", "--json")[1])["domid"] == before["domid"]
    assert xenbus("domain", "suspend", "g")[0] == 0
    code, out, _ = xenbus("domain", "resume", "g", "--restore", "--backend", "nobody")
    assert (code, out) == (3, "")
    code, out, _ = xenbus("domain", "resume", "g", "--restore", "--backend", "h", "--json")
    after = json.loads(out)
    assert code == 0 and after["domid"] > before["domid"] and after["pid"] == before["pid"]

    async def test(found):
        async def moved():
            return "xbbd0" in await found.lines("h")

        await found.until(moved)

    visit(host.root, test)


def test_shutdown_and_reboot(xenbus, host):
    guest(xenbus)
    old = json.loads(xenbus("domain", "list", "g", "--json")[1])[0]
    assert xenbus("domain", "shutdown", "g", "--reboot")[0] == 0

    async def test(found):
        async def back():
            listed = await found.toolstack.domains()
            return [d for d in listed if d.name == "g" and d.domid != old["domid"] and d.state == "running"]

        await found.until(back)

        async def up():
            try:
                return await found.ask("g", "info")
            except ConnectionError:
                return None

        await found.until(up)

    visit(host.root, test)
    assert xenbus("domain", "shutdown", "g") == (0, "", "")
    assert xenbus("domain", "list", "g")[0] == 3


def test_a_guest_that_does_not_answer_is_five(xenbus):
    guest(xenbus)
    pid = json.loads(xenbus("domain", "list", "g", "--json")[1])[0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    code, _, err = xenbus("domain", "suspend", "g", "--timeout", "0.3")
    assert code == 5 and "owed the next move" in err and "control/shutdown" in err
    os.kill(pid, signal.SIGCONT)


# -- devices


def test_attach_and_what_the_guest_then_has(xenbus, image):
    guest(xenbus)
    code, out, _ = xenbus("attach", "block", "--domain", "g", "--image", str(image), "--json")
    made = json.loads(out)
    assert code == 0 and made["devid"] == 51712 and made["front"].endswith("/device/vbd/51712")
    code, out, _ = xenbus(
        "attach", "block", "--domain", "g", "--image", "memory:16M", "--device", "xvdb", "--readonly",
        "--sector-size", "4096",
    )  # fmt: skip
    assert code == 0 and out.startswith("xvdb: /local/domain/")
    code, out, _ = xenbus("tree", "g")
    assert "xbd0 at device/vbd/51712: Connected" in out and "xbd1 at device/vbd/51728: Connected" in out
    code, out, _ = xenbus("sysctl", "-a", "--domain", "g", "--json")
    values = json.loads(out)["g"]
    assert values["dev.xbd.0.xenbus_connection_state"] == "Connected"
    assert values["dev.xbd.1.xenstore_path"] == "device/vbd/51728"
    code, _, err = xenbus("attach", "block", "--domain", "g", "--image", str(image))
    assert code == 2 and "already" in err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--image", "/nowhere/disk.img"], 1, "/nowhere/disk.img"),
        (["--image", "/"], 1, "/"),
        (["--image", "memory:nonsense"], 1, "nonsense"),
        (["--image", "gopher://x"], 1, "gopher"),
        (["--image", "nbd+unix:///?socket=/nowhere/s"], 1, "/nowhere/s"),
        (["--image", "memory:1M", "--device", "sofa"], 2, "sofa"),
        (["--image", "memory:1M", "--backend", "nobody"], 3, "nobody"),
        (["--image", "memory:1M", "--sector-size", "100"], 2, "100"),
    ],
)
def test_an_attach_that_fails_says_why_and_leaves_nothing(xenbus, words, code, text):
    guest(xenbus)
    before = xenbus("store", "ls", "-f")[1]
    began = time.monotonic()
    got, out, err = xenbus("attach", "block", "--domain", "g", *words)
    assert (got, out) == (code, "") and text in err
    assert time.monotonic() - began < 25.0  # not by attach's own deadline
    assert xenbus("store", "ls", "-f")[1] == before


def test_detach_in_order_by_either_end_and_by_the_toolstacks_name(xenbus, image):
    guest(xenbus)
    before = xenbus("store", "ls", "-f")[1]
    for name in ("g/xbd0", "xbd0", "g/xvda", "xvda", "Domain-0/xbbd0"):
        assert xenbus("attach", "block", "--domain", "g", "--image", str(image))[0] == 0
        assert xenbus("detach", name) == (0, "", "")
        assert xenbus("store", "ls", "-f")[1] == before
    assert xenbus("attach", "block", "--domain", "g", "--image", str(image))[0] == 0
    guest(xenbus, image, name="h")
    code, _, err = xenbus("detach", "xbd0")
    assert code == 2 and "g/xbd0" in err and "h/xbd0" in err


def test_a_guest_that_hangs_can_be_detached_by_force_and_the_tree_says_who_owes(xenbus, image, monkeypatch):
    from xenbus.cli import hosts

    monkeypatch.setattr(hosts, "PATIENCE", 0.3)
    guest(xenbus, image)
    pid = json.loads(xenbus("domain", "list", "g", "--json")[1])[0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    code, _, err = xenbus("detach", "g/xvda", "--timeout", "0.5")
    assert code == 5 and "front end in domain" in err
    code, out, _ = xenbus("tree")
    assert code == 0 and "does not answer" in out
    assert "Closing; waits for front end /local/domain/" in out.replace("frontend", "front end"), out
    assert "error" in json.loads(xenbus("tree", "--json")[1])[1]
    assert "xbbd" in xenbus("sysctl", "-a")[1]
    assert xenbus("sysctl", "-a", "--domain", "g")[0] == 5
    code, _, err = xenbus("detach", "g/xvda", "--timeout", "0.3", "--force")
    assert code == 0 and "by force" in err
    os.kill(pid, signal.SIGCONT)
    # The nodes are gone at once; the back bus, which hears of it, needs a moment to bury what it held.
    end = time.monotonic() + 10
    while "xbbd" in xenbus("tree", "Domain-0")[1]:
        assert time.monotonic() < end


def test_tree_as_text_as_data_and_watched(xenbus, image, host):
    guest(xenbus, image)
    code, out, _ = xenbus("tree")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "Domain-0 (domain 0)" and lines[1] == "  xenstore0"
    assert {"    xenbusb_front0", "    xenbusb_back0"} <= set(lines)
    data = json.loads(xenbus("tree", "g", "--json")[1])
    assert [tree["name"] for tree in data] == ["g"]
    root = data[0]["devices"][0]
    assert root["nameunit"] == "xenstore0"
    disk = root["children"][0]["children"][0]
    assert (disk["nameunit"], disk["state"], disk["waits"]) == ("xbd0", "Connected", "")
    watching = subprocess.Popen(
        [*XENBUS, "tree", "g", "--watch"],
        stdout=subprocess.PIPE,
        env=os.environ | {"XENBUS_DIR": str(host.root)},
    )
    try:
        assert watching.stdout.readline().startswith(b"g (domain ")
        xenbus("detach", "xbd0")
        for line in watching.stdout:
            if line.startswith(b"g (domain"):
                break
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 130
    finally:
        watching.kill()
        watching.stdout.close()
        watching.wait()


def test_sysctl_has_freebsds_form(xenbus, image):
    guest(xenbus, image)
    state = "dev.xbd.0.xenbus_connection_state: Connected\n"
    assert xenbus("sysctl", "dev.xbd.0.xenbus_connection_state")[:2] == (0, state)
    assert xenbus("sysctl", "g/dev.xbd.0.xenbus_connection_state")[:2] == (0, state)
    code, out, _ = xenbus("sysctl", "dev.xbbd")
    assert code == 0 and "dev.xbbd.0.xenstore_path: backend/vbd/" in out
    guest(xenbus, image, name="h")
    code, out, _ = xenbus("sysctl", "dev.xbd.0.xenbus_connection_state")
    assert sorted(out.splitlines()) == [f"{name}/{state.strip()}" for name in ("g", "h")]
    code, out, _ = xenbus("sysctl", "-a")
    assert code == 0 and all(": " in line for line in out.splitlines())


# -- NBD


def test_nbd_is_an_export_until_it_is_interrupted(xenbus, image, tmp_path, host):
    guest(xenbus, image)
    with place() as folder:
        socket = folder / "disk.sock"
        export = subprocess.Popen(
            [*XENBUS, "nbd", "g/xbd0", "--socket", str(socket), "--dir", str(host.root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            assert export.stdout.readline().decode() == f"nbd+unix:///?socket={socket}\n"
            assert stat.S_IMODE(socket.stat().st_mode) == 0o600
            code, _, err = xenbus("nbd", "g/xbd0", "--socket", str(socket))
            assert code == 2 and "exported already" in err
            _copies(socket, image, folder)
            export.send_signal(signal.SIGINT)
            assert export.wait(10) == 0
            _gone(socket)
        finally:
            export.kill()
            export.communicate()
        # Whatever becomes of who asked for it, the guest takes it away.
        export = subprocess.Popen(
            [*XENBUS, "nbd", "xbd0", "--json", "--socket", str(socket), "--dir", str(host.root)],
            stdout=subprocess.PIPE,
        )
        assert json.loads(export.stdout.readline()) == {"socket": str(socket), "size": SIZE}
        export.kill()
        export.communicate()
        _gone(socket)
        # It ends when the disk is taken away.
        export = subprocess.Popen(
            [*XENBUS, "nbd", "xbd0", "--socket", str(socket), "--dir", str(host.root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        export.stdout.readline()
        assert xenbus("attach", "block", "--domain", "g", "--image", str(image), "--device", "xvdb")[0] == 0
        assert xenbus("detach", "g/xbd0")[0] == 0
        assert b"the disk was detached" in export.communicate(timeout=10)[1] and export.returncode == 1
        assert not socket.exists()
    code, _, err = xenbus("nbd", "g/xbd1", "--socket", "/nowhere/at/all")
    assert code in (1, 2, 3) and "/nowhere/at/all" in err
    code, _, err = xenbus("nbd", "Domain-0/xbbd1", "--socket", "/tmp/x")
    assert code == 3 and "no operation" in err


def _gone(path: Path) -> None:
    end = time.monotonic() + 10
    while path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def _copies(socket, image, folder):
    uri = f"nbd+unix:///?socket={socket}"
    copies = {
        "nbdcopy": ["nbdcopy", uri, str(folder / "nbdcopy.img")],
        "qemu-img": ["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(folder / "qemu-img.img")],
    }
    missing = [name for name in (*copies, "nbdinfo") if shutil.which(name) is None]
    if "nbdinfo" not in missing:
        info = subprocess.run(["nbdinfo", "--json", uri], capture_output=True, check=True, timeout=30)
        assert json.loads(info.stdout)["exports"][0]["export-size"] == SIZE
    for name, command in copies.items():
        if name not in missing:
            subprocess.run(command, check=True, timeout=30)
            assert (folder / f"{name}.img").read_bytes() == image.read_bytes()
    if missing:
        print(f"not installed, not tried: {', '.join(missing)}")


# -- the store


def test_store_subcommands_on_the_host(xenbus):
    assert xenbus("store", "write", "/mine/a", "1", "/mine/b", "2") == (0, "", "")
    assert xenbus("store", "read", "/mine/a", "/mine/b")[:2] == (0, "1\n2\n")
    assert xenbus("store", "mkdir", "/mine/c")[0] == 0
    assert json.loads(xenbus("store", "ls", "--json", "/mine")[1]) == {
        "/mine/a": "1",
        "/mine/b": "2",
        "/mine/c": "",
    }
    assert xenbus("store", "perms", "/mine/a", "n0", "r0")[0] == 0
    assert xenbus("store", "perms", "/mine/a")[1] == "n0 r0\n"
    assert xenbus("store", "watch", "-n", "1", "--timeout", "5", "/mine")[:2] == (0, "/mine\n")
    assert xenbus("store", "watch", "-n", "2", "--timeout", "0.1", "/mine")[0] == 5
    assert xenbus("store", "rm", "/mine")[0] == 0
    assert xenbus("store", "rm", "/mine")[0] == 3


@pytest.mark.skipif(shutil.which("xenstore-ls") is None, reason="Debian's xenstore-utils are not installed")
def test_debians_own_programs(host, xenbus):
    guest(xenbus)
    env = os.environ | {"XENSTORED_RUNDIR": str(host.root / "xenstored")}

    def theirs(*words):
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=20, check=True).stdout

    listed = theirs("xenstore-ls", "-f")
    assert '/local/domain/0/name = "Domain-0"' in listed and '"g"' in listed
    assert listed == xenbus("store", "ls", "-f")[1]
    watch = subprocess.Popen(
        ["xenstore-watch", "-n", "2", "/mine/theirs"], env=env, stdout=subprocess.PIPE, text=True
    )
    assert watch.stdout.readline() == "/mine/theirs\n"
    theirs("xenstore-write", "/mine/theirs", "seen")
    assert watch.communicate(timeout=10)[0] == "/mine/theirs\n" and watch.returncode == 0
    assert theirs("xenstore-read", "/mine/theirs") == "seen\n"
    assert xenbus("store", "read", "/mine/theirs")[1] == "seen\n"
    theirs("xenstore-rm", "/mine")


# -- completion


def test_domains_and_devices_complete(xenbus, host, image):
    guest(xenbus, image)

    def complete(*words):
        env = os.environ | {
            "_XENBUS_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(["xenbus", *words]),
            "COMP_CWORD": str(len(words)),
            "XENBUS_DIR": str(host.root),
        }
        command = [sys.executable, "-c", "from xenbus.cli.main import main; main()"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
        return {line.partition(",")[2] for line in done.stdout.splitlines()}

    assert complete("domain", "destroy", "") == {"Domain-0", "g"}
    assert complete("detach", "g/") == {"g/xbd0"}
    assert complete("nbd", "") == {"Domain-0/xbbd0", "g/xbd0"}
    assert complete("attach", "block", "--domain", "g") == {"g"}
    host_gone = os.environ | {"XENBUS_DIR": "/nowhere"}
    env = host_gone | {"_XENBUS_COMPLETE": "bash_complete", "COMP_WORDS": "xenbus detach ", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", "from xenbus.cli.main import main; main()"],
        env=env, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("", "")


# -- hosts that are not there, and the host's own life


@pytest.mark.parametrize(
    "words",
    [
        ["domain", "list"], ["domain", "create", "g"], ["tree"], ["sysctl", "-a"], ["detach", "xbd0"],
        ["attach", "block", "--domain", "g", "--image", "memory:1M"], ["nbd", "xbd0", "--socket", "/tmp/s"],
        ["store", "ls"],
    ],
)  # fmt: skip
def test_no_host_is_six(words, tmp_path, capsys):
    assert run([*words, "--dir", str(tmp_path)]) == 6
    out, err = capsys.readouterr()
    assert out == "" and str(tmp_path) in err and "Traceback" not in err


def test_up_ends_cleanly_by_either_signal_and_a_guest_ends_with_it():
    for number in (signal.SIGTERM, signal.SIGINT):
        with place() as root:
            host = Up(root / "h").wait_ready()
            assert run(["domain", "create", "g", "--dir", str(root / "h")]) == 0
            disk = ["attach", "block", "--domain", "g", "--image", "memory:1M", "--dir", str(root / "h")]
            assert run(disk) == 0

            async def pids(found):
                return (await found.processes()).values()

            running = visit(host.root, pids)
            began = time.monotonic()
            assert host.end(number) == 0
            assert time.monotonic() - began < 9.0  # nobody had to be killed
            assert not [pid for pid in running if alive(pid)]
            assert host.said == ""
            assert not [path for path in root.rglob("*") if path.is_socket()]


def test_up_can_be_ended_before_it_is_ready():
    with place() as root:
        host = Up(root / "h")
        end = time.monotonic() + 10
        while not (root / "h" / "lock").exists() and time.monotonic() < end:
            time.sleep(0.001)
        began = time.monotonic()
        assert host.end() in (0, -signal.SIGTERM)
        assert time.monotonic() - began < 9.0
        assert "Traceback" not in host.said
        Up(root / "h").wait_ready().end()


def test_up_that_fails_says_why_in_one_line():
    with place() as folder:
        _fails(folder)


def _fails(tmp_path):
    cases = [
        (["--quota", "nonsense"], 2, "nonsense"),
        (["--quota", "sofas=3"], 2, "sofas"),
        (["--quota", "nodes=-1"], 2, "nodes=-1"),
    ]
    for options, code, words in cases:
        host = Up(tmp_path, *options)
        assert host.wait() == code and words in host.said and len(host.said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for root, words in {tmp_path / "file": "exists", tmp_path / ("x" * 90): "107 bytes"}.items():
        host = Up(root)
        assert host.wait() == 2 and words in host.said and "Traceback" not in host.said


def test_up_says_what_ended_it_and_a_quota_is_in_force():
    with place() as root:
        host = Up(root, "--quota", "nodes=200").wait_ready()
        quotas = subprocess.run(
            [*XENBUS, "domain", "create", "g", "--dir", str(root)], capture_output=True, text=True, timeout=30
        )
        assert quotas.returncode == 0, quotas.stderr

        async def fill(found):
            domid = (await found.toolstack.find("g")).domid
            assert await found.store.get_quota("nodes", domid) == 200
            os.kill((await found.processes())["xenstored"], signal.SIGKILL)

        visit(host.root, fill)
        assert host.wait(15) == 1
        assert "the store daemon ended (signal SIGKILL)" in host.said and len(host.said.splitlines()) <= 2


def test_a_second_up_is_refused_at_once(host):
    second = Up(host.root)
    assert second.wait(10) == 2 and "a host runs there already" in second.said
    assert run(["domain", "list", "--dir", str(host.root)]) == 0


def test_up_ends_with_who_started_it_if_asked():
    with place() as root:
        command = [*XENBUS, "up", "--until-eof", "--dir", str(root)]
        host = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert host.stdout.readline() == b"ready\n"
        pids = processes(root)
        host.stdin.close()
        assert host.wait(10) == 0
        host.stdout.close()
        assert not [pid for pid in pids if alive(pid)]
