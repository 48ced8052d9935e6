"""`xenbus console` in a terminal and in pipes, on a real host; the guest is spoken for over its socket."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from tests.support.consoles import rig
from tests.support.hosts import visit
from tests.support.until import until
from tests.support.window import PATIENCE, Window

from xenbus.bus import Settings
from xenbus.cli.attachment import open_terminal, parse_escape
from xenbus.errors import UsageError, XenbusError

XENBUS = [sys.executable, "-m", "xenbus.cli.main"]


@pytest.fixture
def xenbus(on_host):
    on_host("domain", "create", "g")  # unless an earlier test did
    yield on_host
    for number in (1, 2):
        on_host("detach", f"g/console{number}")


class Guest:
    """What a program in the guest would do with the stream of its console."""

    def __init__(self, host):
        self._root = host.root

    def _ask(self, operation, **given):
        return visit(self._root, lambda site: site.operate("g", "xc1", operation, **given))

    def write(self, data):
        assert self._ask("write", data=base64.b64encode(data).decode()) == len(data)

    def read(self, count):
        data = b""
        while len(data) < count:
            data += base64.b64decode(self._ask("read", limit=count - len(data)))
        return data


@pytest.fixture
def guest(host, xenbus):
    code, _, err = xenbus("attach", "console", "--domain", "g")
    assert code == 0, err
    return Guest(host)


def gone(xenbus):
    """The guest's bus hears of a removal in its own time."""
    end = time.monotonic() + PATIENCE
    while "console" in (text := xenbus("tree", "g")[1]):
        assert time.monotonic() < end, text


def console(*words):
    return Window([*XENBUS, "console", *words])


def piped(*words, **given):
    return subprocess.run([*XENBUS, "console", *words], capture_output=True, timeout=PATIENCE, **given)


# -- attach, tree, detach


@pytest.mark.slow
def test_attach_tree_sysctl_detach(xenbus, tmp_path):
    log = tmp_path / "g.log"
    code, out, err = xenbus("attach", "console", "--domain", "g", "--log", str(log), "--json")
    assert code == 0, err
    assert json.loads(out) == {
        "front": f"/local/domain/{json.loads(out)['front'].split('/')[3]}/device/console/1",
        "back": json.loads(out)["back"],
        "devid": 1,
    }
    assert "console2: " in xenbus("attach", "console", "--domain", "g")[1]
    text = xenbus("tree", "g")[1]
    assert "xc1 at device/console/1: Connected" in text and "xc2 at device/console/2" in text
    said = dict(json.loads(xenbus("sysctl", "Domain-0/dev.xcb.0", "--json")[1])["Domain-0"])
    assert said["dev.xcb.0.log"] == str(log) and said["dev.xcb.0.tty"].startswith("/dev/pts/")
    assert xenbus("detach", "g/xc1") == (0, "", "")
    assert xenbus("detach", "g/console2") == (0, "", "")
    gone(xenbus)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["console", "nobody"], 3, "no domain"),
        (["console", "g"], 3, "no console 1"),
        (["console", "g", "-n", "0"], 3, "no console 0"),
        (["console", "g", "-n", "7"], 3, "no console 7"),
        (["console", "g", "-n", "99"], 2, "99"),
        (["console", "g", "--escape", "nonsense"], 2, "no escape key"),
        (["attach", "console", "--domain", "g", "-n", "0"], 2, "1 to 31"),
        (["attach", "console", "--domain", "g", "--no-pty"], 2, "nobody's"),
        (["attach", "console", "--domain", "g", "--log-size", "5000"], 2, "a file for it"),
        (["attach", "console", "--domain", "g", "--log", "/nowhere/log"], 1, "ENOENT"),
    ],
)
def test_what_is_refused(xenbus, words, code, text):
    got, out, err = xenbus(*words)
    assert (got, out) == (code, "") and text in err
    gone(xenbus)


@pytest.mark.slow
def test_served_by_a_driver_domain(xenbus, host, tmp_path):
    """Which may not write into the guest's node, and need not."""
    assert xenbus("domain", "create", "driver")[0] == 0
    log = tmp_path / "g.log"
    code, _, err = xenbus("attach", "console", "--domain", "g", "--backend", "driver", "--log", str(log))
    assert code == 0, err
    Guest(host).write(b"from g")
    assert piped("g", "--idle", "0.3", input=b"to g").stdout == b"from g"
    assert Guest(host).read(4) == b"to g" and log.read_bytes() == b"from g"
    assert xenbus("detach", "g/xc1")[0] == 0
    assert xenbus("domain", "destroy", "driver")[0] == 0


# -- in a terminal


@pytest.mark.slow
def test_in_a_terminal(guest, xenbus):
    with console("g") as window:
        window.see(b"^] leaves")
        guest.write(b"login: ")
        window.see(b"login: ")
        assert window.is_raw()
        # Ctrl-C and Ctrl-Z are the guest's.
        window.type(b"root\r\x03\x1a")
        assert guest.read(7) == b"root\r\x03\x1a"
        # One at a time.
        refused = piped("g", stdin=subprocess.DEVNULL)
        assert refused.returncode == 2 and b"attached to this console already" in refused.stderr
        window.type(b"bye\x1dnot this")
        assert window.ended() == 0
        assert guest.read(3) == b"bye"
    # And again.
    with console("g", "-n", "1", "--escape", "^A") as window:
        window.see(b"^A leaves")
        window.type(b"\x1d")
        assert guest.read(1) == b"\x1d"
        window.type(b"\x01")
        assert window.ended() == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_it_and_the_terminal_is_as_it_was(guest, number):
    with console("g") as window:
        window.see(b"leaves")
        guest.write(b"prompt")
        window.see(b"prompt")
        window.process.send_signal(number)
        assert window.ended() == 130


@pytest.mark.slow
def test_after_a_stop_it_is_raw_again(guest):
    with console("g") as window:
        window.see(b"leaves")
        guest.write(b"prompt")
        window.see(b"prompt")
        window.process.send_signal(signal.SIGSTOP)
        termios.tcsetattr(window.slave, termios.TCSANOW, window.before)
        window.process.send_signal(signal.SIGCONT)
        window.wait_raw()
        window.type(b"\x1d")
        assert window.ended() == 0


@pytest.mark.slow
def test_the_window_is_closed(guest, xenbus):
    with console("g") as window:
        window.see(b"leaves")
        guest.write(b"prompt")
        window.see(b"prompt")
        for name in ("master", "slave"):
            os.close(getattr(window, name))
            setattr(window, name, -1)
        assert window.process.wait(PATIENCE) == 130
    assert piped("g", "--idle", "0", input=b"x").returncode == 0  # nobody is attached


@pytest.mark.slow
def test_the_guest_ends(guest, xenbus):
    with console("g") as window:
        guest.write(b"going down")
        window.see(b"going down")
        assert xenbus("domain", "destroy", "g")[0] == 0
        assert window.ended() == 0
        os.set_blocking(window.master, False)
        assert b"the console has ended" in os.read(window.master, 65536)


@pytest.mark.slow
def test_detached_and_attached_again_it_goes_on(guest, xenbus):
    """As after a back end's restart: the node has the path of another terminal."""
    with console("g") as window:
        guest.write(b"first")
        window.see(b"first")
        assert xenbus("detach", "g/xc1")[0] == 0
        assert xenbus("attach", "console", "--domain", "g")[0] == 0
        guest.write(b"second")
        try:
            window.see(b"second")
        except AssertionError:
            # Between the two its node was gone: then it has ended in order.
            assert window.process.wait(PATIENCE) == 0 and b"has ended" in window.seen


# -- a back end that is started again


async def restarted(made, window, shown):
    """Its process ends and another one goes on; `shown` is when the operator's command has seen that."""
    path = made.back.sysctl()["tty"]()
    await made.dom0.back.release()
    await made.dom0.store.close()
    await asyncio.to_thread(window.see, shown)
    await made.dom0.start(Settings(callback=5.0, detach=2.0, boot=2.0), inherits=True)
    await made.dom0.back.attach()
    await until(lambda: made.back.sysctl()["tty"]())
    return path, made.back.sysctl()["tty"]()


@pytest.mark.slow
def test_a_back_end_that_is_started_again_with_a_terminal_of_the_same_path(tmp_path):
    """As it mostly has: the kernel gives away the lowest number. What was typed meanwhile is not lost."""

    async def main():
        socket = tmp_path / "store"
        env = os.environ | {"XENBUS_STORE": str(socket), "XENBUS_RUN": str(tmp_path)}
        env.pop("XENBUS_DIR", None)
        async with rig() as made:
            await made.world.daemon.listen_unix(socket)
            await made.connected()
            with Window([*XENBUS, "console", "domain-1"], env) as window:
                await asyncio.to_thread(window.see, b"leaves")
                for number in range(2):
                    old, new = await restarted(made, window, b"waiting 60 s for the next one")
                    assert old == new
                    window.seen = b""
                    await made.stream.write(b"number %d" % number)
                    await asyncio.to_thread(window.see, b"number %d" % number)
                    window.type(b"key")
                    assert await made.stream.read() == b"key"
                # Ctrl-] is heard while there is none.
                await made.dom0.back.release()
                await asyncio.to_thread(window.see, b"waiting 60 s for the next one")
                window.type(b"\x1d")
                assert await asyncio.to_thread(window.ended) == 0
                await made.dom0.store.close()
                await made.dom0.start(Settings(callback=5.0, detach=2.0, boot=2.0), inherits=True)
                await made.dom0.back.attach()
            await made.gone()

    asyncio.run(main())


# -- in pipes


@pytest.mark.slow
def test_in_pipes(guest, tmp_path):
    guest.write(b"waiting for whoever comes\n")
    done = piped("g", "--idle", "0.3", input=b"typed \x1d and all\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"waiting for whoever comes\n", b"")
    assert guest.read(15) == b"typed \x1d and all\n"[:15]
    assert guest.read(1) == b"\n"


@pytest.mark.slow
def test_files_for_input_and_output(guest, tmp_path):
    data = os.urandom(50_000)
    (tmp_path / "in").write_bytes(data)
    guest.write(data[:9000])
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        process = subprocess.Popen([*XENBUS, "console", "g", "--idle", "0.3"], stdin=source, stdout=sink)
        assert guest.read(len(data)) == data
        assert process.wait(PATIENCE) == 0
    assert (tmp_path / "out").read_bytes() == data[:9000]


@pytest.mark.slow
def test_the_end_of_the_input_does_not_end_it(guest):
    process = subprocess.Popen([*XENBUS, "console", "g"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        for word in (b"one", b"two"):
            guest.write(word)
            assert process.stdout.read(3) == word
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 130
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.mark.slow
def test_an_input_that_cannot_be_read_is_at_its_end(guest, tmp_path):
    guest.write(b"prompt")
    with (tmp_path / "empty").open("w") as unreadable:
        done = piped("g", "--idle", "0.2", stdin=unreadable)
    assert (done.returncode, done.stdout) == (0, b"prompt")


@pytest.mark.slow
def test_an_output_that_is_full_says_so(guest):
    guest.write(b"prompt")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*XENBUS, "console", "g"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
        )
    assert done.returncode == 1 and b"standard output" in done.stderr


@pytest.mark.slow
def test_whoever_read_it_has_gone(guest):
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*XENBUS, "console", "g"], stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    guest.write(b"x")
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    guest.write(b"y")
    said = process.communicate(timeout=PATIENCE)[1]
    assert (process.returncode, said) == (141, b"")


# -- what needs no host


@pytest.mark.parametrize(
    ("text", "key"), [("^]", 0x1D), ("^a", 1), ("^_", 0x1F), ("^@", 0), ("q", 0x71), ("^", 0x5E)]
)
def test_escape_keys(text, key):
    assert parse_escape(text) == key


@pytest.mark.parametrize("text", ["", "^]]", "^1", "é", "ab"])
def test_what_is_no_escape_key(text):
    with pytest.raises(UsageError):
        parse_escape(text)


def test_somebody_elses_terminal_is_not_written_to():
    """The path that a killed back end left, given away again."""
    fds = os.openpty()
    try:
        path = os.ttyname(fds[1])
        os.close(open_terminal(path))
        with pytest.raises(XenbusError, match="somebody else's by now"):
            open_terminal(path, ours=True)
    finally:
        for fd in fds:
            os.close(fd)


def test_what_is_no_terminal_is_not_written_to(tmp_path):
    """A guest that could name a file of ours would have us type into it."""
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(XenbusError, match="no terminal"):
        open_terminal(str(path))
    with pytest.raises(XenbusError, match="No such file"):
        open_terminal(str(tmp_path / "nothing"))
    assert path.read_text() == "mine"
