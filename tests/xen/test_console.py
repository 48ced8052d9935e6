"""A guest's further console on a real Xen: Linux's hvc_xen (`/dev/hvc1`) on our xcb, and our xc on it."""

from __future__ import annotations

import asyncio
import hashlib
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.consoles import Operator, log_of
from tests.support.dom0 import STORE
from tests.support.real_xen import dom0_ports
from tests.support.serving import Daemon, environment, serving
from tests.support.until import until
from tests.support.window import Window
from tests.support.xl_guest import Guest, PythonGuest, XlGuest, python_guest, xl, xl_guest
from xenbus.xenstore.client import Client

pytestmark = pytest.mark.timeout(300)
WAIT = 60.0  # seconds, under emulation
COUNT = 48 << 10  # bytes of a transfer
LOG_SIZE = str(8 << 20)
CONSOLE = [sys.executable, "-m", "xenbus", "console", "guest", "-n", "1"]
# hvc's tty forgets what stty set once nobody has it open (TTY_DRIVER_RESET_TERMIOS): then it echoes, and puts
# a CR before each LF.
HOLD = "exec 7<>/dev/hvc1; stty raw -echo <&7"
LET_GO = "exec 7>&-"
# Numbered lines as fast as it goes, until there is a file /tmp/stop; then the last number is in /tmp/last.
TALK = (
    "rm -f /tmp/stop /tmp/last; "
    "(n=0; while [ ! -e /tmp/stop ]; do n=$((n + 1)); printf '%07d\\n' $n; done >&7;"
    " echo $n >/tmp/last.new; mv /tmp/last.new /tmp/last) 2>/dev/null & true"
)
HUSH = "touch /tmp/stop; for i in $(seq 300); do [ -s /tmp/last ] && break; sleep 0.1; done; cat /tmp/last"
# A login's shell: it leads its session, and the console is its terminal. (What `&` starts ignores SIGINT.)
SHELL = "start-stop-daemon -S -b -n shell -a /bin/setsid -- sh -c 'exec sh -i <>/dev/hvc1 >&0 2>&1'"


@asynccontextmanager
async def served(tmp_path: Path, kind) -> AsyncIterator[tuple[Client, Daemon, Guest]]:
    """A guest of that kind, and `xenbus serve`; nothing is left afterwards, by the store and by Xen."""
    async with await Client.connect(STORE) as store:
        ports = dom0_ports()
        async with serving(tmp_path / "run") as daemon, kind(store, "guest") as guest:
            yield store, daemon, guest
        assert dom0_ports() == ports
        assert not await store.exists("backend/xcb")


async def attach(daemon: Daemon, log: Path, *options: str) -> None:
    words = ("--domain", "guest", "--log", str(log), "--log-size", LOG_SIZE, *options)
    await daemon.command("attach", "console", *words)


async def restored(daemon: Daemon, guest: Guest, log: Path, path: Path) -> None:
    await guest.save(path)
    await guest.restore(path, paused=True)
    await attach(daemon, log, "--no-wait")
    await xl("unpause", "guest")


async def terminal(store: Client, guest: Guest) -> Operator:
    path = await store.wait_for(f"backend/xcb/{guest.domid}/1/tty", bool, WAIT)
    assert path is not None
    return Operator(path.decode())


def differ_at(one: bytes, other: bytes) -> int:
    """How far they are equal."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def same(sent: bytes, got: bytes) -> None:
    """By checksum; what is otherwise is said by lengths and place."""
    if hashlib.sha256(sent).digest() != hashlib.sha256(got).digest():
        at = differ_at(sent, got)
        part = slice(max(at - 8, 0), at + 16)
        raise AssertionError(f"{len(sent)} bytes, {len(got)} came; at {at}: {sent[part]!r}, {got[part]!r}")


async def hvc_both_ways(store: Client, guest: XlGuest, log: Path) -> None:
    """Typed at the PTY and kept in the guest; said by the guest, seen at the PTY and in the log."""
    data, before = random.randbytes(COUNT), log_of(log)
    with await terminal(store, guest) as operator:
        await guest.run(f"rm -f /tmp/typed /tmp/done; (head -c {COUNT} <&7 >/tmp/typed; >/tmp/done) & true")
        await operator.enter(data, WAIT)
        await guest.run("for i in $(seq 300); do [ -e /tmp/done ] && break; sleep 0.1; done")
        assert (await guest.run("sha256sum /tmp/typed")).split()[0] == hashlib.sha256(data).hexdigest()
        assert operator.look() == b""  # no echo
        saying = asyncio.create_task(guest.run("cat /tmp/typed >&7"))
        same(data, await operator.take(COUNT, WAIT))
        await saying
    same(before + data, log_of(log))


def talked(lines: int) -> bytes:
    """What TALK says, so many lines of it."""
    return b"".join(b"%07d\n" % number for number in range(1, lines + 1))


def gaps(text: bytes, last: int) -> int:
    """Where `text` leaves out some of what was said, which goes to line `last`; nothing is there twice."""
    whole, at, count = talked(last), 0, 0
    while True:
        equal = differ_at(text, whole[at:])
        text, at = text[equal:], at + equal
        if not text:
            assert at == len(whole), at
            return count
        count += 1
        # The rest of a line, and then one that says where we are.
        rest, _, text = text.partition(b"\n")
        line = int(text[:7]) if text else last + 1
        assert 8 * (line - 1) > at and whole[: 8 * (line - 1)].endswith(rest + b"\n"), (at, rest, line)
        at = 8 * (line - 1)


async def left_and_killed(daemon: Daemon, guest: XlGuest, log: Path, shown: Path) -> None:
    """The back end's process goes in order, then is killed, while the guest talks; `xenbus console` stays."""
    before = len(log_of(log))

    async def goes_on() -> None:
        size = shown.stat().st_size
        await until(lambda: shown.stat().st_size > size + 4096, WAIT, every=0.05)

    with shown.open("wb") as sink:
        nobody = asyncio.subprocess.DEVNULL
        env = environment(daemon.run)
        console = await asyncio.create_subprocess_exec(*CONSOLE, stdin=nobody, stdout=sink, env=env)
    await guest.run(TALK)
    await goes_on()
    assert await daemon.end(signal.SIGUSR1) == 0
    await daemon.start()
    await goes_on()
    said = log_of(log)[before:]
    assert talked(len(said) // 8 + 1).startswith(said)
    await daemon.kill()
    await daemon.start()
    await goes_on()
    last = int(await guest.run(HUSH))
    for path in (log, shown):
        await until(lambda path=path: path.read_bytes().endswith(b"%07d\n" % last), WAIT, every=0.1)
    console.terminate()
    assert await asyncio.wait_for(console.wait(), WAIT) == 130
    # A log may lack what a killed process had taken off the page, a terminal what went with it.
    assert gaps(log_of(log)[before:], last) <= 1
    assert gaps(shown.read_bytes(), last) <= 2


def in_a_window(daemon: Daemon) -> None:
    """As an operator works: prompt, keys, Ctrl-C for the guest, Ctrl-] for us; what runs there stays."""
    with Window(CONSOLE, environment(daemon.run), WAIT) as window:
        window.see(b"^] leaves")
        window.type(b"\r")
        window.see(b"# ")
        window.type(b"answer=$((6 * 7)); echo [$answer]\r")
        window.see(b"[42]\r\n")
        # The program itself says it: until it is in front, Ctrl-C is a character for the shell.
        window.type(b"export answer; sh -c 'echo [$answer runs]; exec sleep 1000'\r")
        window.see(b"[42 runs]\r\n")
        window.type(b"\x03")
        window.type(b"echo [$?]\r")
        window.see(b"[130]\r\n")
        assert window.is_raw()
        window.type(b"\x1d")
        assert window.ended() == 0
    with Window(CONSOLE, environment(daemon.run), WAIT) as window:
        window.see(b"^] leaves")
        window.type(b"echo [again $answer]\r")
        window.see(b"[again 42]\r\n")
        window.type(b"\x1d")
        assert window.ended() == 0
    with Window(["xl", "console", "-t", "pv", "-n", "1", "guest"], patience=WAIT) as window:
        window.wait_raw()
        window.type(b"echo [for xl $answer]; exit\r")
        window.see(b"[for xl 42]\r\n")
        window.type(b"\x1d")
        assert window.ended() == 0


def test_hvc_xen_on_xcb(tmp_path):
    """Used, left by a process in order and by one that is killed, a shell on it; detached and attached again;
    saved and restored while it talks, which hangs up who has it open."""

    async def main():
        log = tmp_path / "console.log"
        async with served(tmp_path, xl_guest) as (store, daemon, guest):
            await attach(daemon, log)
            await guest.run(HOLD)
            await hvc_both_ways(store, guest, log)
            await left_and_killed(daemon, guest, log, tmp_path / "shown")
            await guest.run(LET_GO)
            await guest.run(SHELL)
            await asyncio.to_thread(in_a_window, daemon)
            await daemon.command("detach", "guest/console1")
            assert not await store.exists(f"backend/xcb/{guest.domid}/1")

            log = tmp_path / "again.log"
            await attach(daemon, log)
            await guest.run(HOLD)
            await hvc_both_ways(store, guest, log)
            before = len(log_of(log))
            await guest.run(TALK)
            await until(lambda: log.stat().st_size > before + 4096, WAIT, every=0.05)
            await restored(daemon, guest, log, tmp_path / "saved")
            await guest.run(HUSH)
            said = log_of(log)[before:]
            assert talked(len(said) // 8 + 1).startswith(said)
            await guest.run(LET_GO)
            await guest.run(HOLD)
            await hvc_both_ways(store, guest, log)
            await daemon.command("detach", "guest/console1")

    asyncio.run(main())


XC = """
import hashlib, logging, os
from pathlib import Path
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s")
from xenbus.bus import Side
from xenbus.domain.native import Served, native_runtime
from xenbus.errors import UsageError
served = Served(frozenset({Side.FRONT}), frozenset({"console"}))
try:
    served.check()
except UsageError as error:
    refusal = str(error)
Path("/sys/bus/xen/drivers_autoprobe").write_text("0")
served.check()
runtime = await native_runtime(served)
await runtime.start()

def stream():
    return runtime.buses[0].devices["device/console/1"].driver.stream

async def read(count):
    data = b""
    while len(data) < count:
        data += await stream().read(count - len(data))
    return data

refusal
"""


async def xc_both_ways(store: Client, guest: PythonGuest, log: Path) -> None:
    data, before = random.randbytes(COUNT), log_of(log)
    with await terminal(store, guest) as operator:
        reading = asyncio.create_task(guest.call("typed = await read(count)\ntyped", WAIT, count=COUNT))
        await operator.enter(data, WAIT)
        same(data, await reading)
        await guest.call("await stream().write(typed)")
        same(data, await operator.take(COUNT, WAIT))
    same(before + data, log_of(log))


@pytest.mark.features
def test_xc_on_xcb(tmp_path):
    """Ours in a guest's Python, from which hvc_xen keeps its hands; the stream goes on over all of it."""

    async def main():
        log = tmp_path / "console.log"
        async with served(tmp_path, python_guest) as (store, daemon, guest):
            assert "Linux's own driver has every frontend of that type (hvc_xen)" in await guest.call(XC)
            await attach(daemon, log)
            await xc_both_ways(store, guest, log)
            for number in (signal.SIGUSR1, signal.SIGKILL):
                assert await daemon.end(number) in (0, -signal.SIGKILL)
                said = b"%d: said to nobody" % number
                await guest.call("await stream().write(said)", said=said)
                await daemon.start()
                await until(lambda said=said: log_of(log).endswith(said), WAIT, every=0.05)
            await guest.call("kept = stream()")
            await restored(daemon, guest, log, tmp_path / "saved")
            await guest.call("await kept.write(b'and after')")
            await until(lambda: log_of(log).endswith(b"and after"), WAIT, every=0.05)
            assert await guest.call("kept is stream()")
            with await terminal(store, guest) as operator:
                assert (await operator.take(9, WAIT)).endswith(b"and after")
            await xc_both_ways(store, guest, log)
            await daemon.command("detach", "guest/console1")
            await guest.call("await runtime.stop()")
            await guest.restart()
            kernel = await guest.run("dmesg")
            assert "BUG" not in kernel and "WARNING" not in kernel, kernel[-3000:]

    asyncio.run(main())
