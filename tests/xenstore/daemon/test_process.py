"""`python -m xenbus.xenstore.daemon` as a process: readiness, quotas, signals, broker; Debian's programs."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.raw_store import until
from tests.support.store_process import DEADLINE, daemon_process

from xenbus.errors import StoreError
from xenbus.hypervisor import broker
from xenbus.xenstore.client import Client
from xenbus.xenstore.daemon.__main__ import main
from xenbus.xenstore.transport.ringpage import RingTransport, Side


@pytest.fixture(scope="module")
def rundir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One daemon for all of Debian's programs."""
    path = tmp_path_factory.mktemp("run")
    with daemon_process(path):
        yield path
    assert not (path / "socket").exists(), "SIGTERM unlinks the socket"


def test_readiness_quota_and_sigterm(tmp_path: Path) -> None:
    with daemon_process(tmp_path, "--quota", "nodes=77", "--quota", "node-size=99"):

        async def run() -> None:
            async with await Client.connect(str(tmp_path / "socket")) as client:
                assert await client.get_quota("nodes") == 77
                assert await client.get_quota("node-size") == 99
                with pytest.raises(StoreError, match="ENOSYS"):
                    await client.introduce(5, 1, 1)

        asyncio.run(run())
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--socket", "{dir}/s", "--quota", "nodes"], "expected name=number"),
        (["--socket", "{dir}/s", "--quota", "what=1"], "no quota 'what'"),
        (["--socket", "{dir}/none/s"], "cannot listen at"),
        ([], "--socket"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path,
    arguments: list[str],
    text: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code = main([word.format(dir=tmp_path) for word in arguments])
    except SystemExit as exc:
        code = exc.code
    assert code
    assert text in caplog.text + capsys.readouterr().err


def test_guests_through_a_broker_and_its_end(tmp_path: Path) -> None:
    """The daemon as its own process serves a guest's ring over pages that the broker shares; when the broker
    goes, so does the daemon."""

    async def run() -> None:
        server = broker.Broker()
        server.create(0)
        primary = await broker.connect(server.handle(0))
        sock = server.handle(0, privileged=True)
        loop = asyncio.get_running_loop()
        manager = daemon_process(tmp_path, "--broker-fd", str(sock.fileno()), pass_fds=(sock.fileno(),))
        process = await loop.run_in_executor(None, manager.__enter__)
        sock.close()
        dom0 = await Client.connect(str(tmp_path / "socket"))
        heard: list[str] = []
        await dom0.watch("@releaseDomain", heard.append, depth=1)
        server.create(5)
        guest_hv = await broker.connect(server.handle(5))
        ends: list[RingTransport] = []
        info = await guest_hv.start_info(lambda: [end.on_event() for end in ends] and None)
        ends.append(RingTransport(info.store_page, info.store_channel.notify, Side.GUEST, "xenstored"))
        await dom0.mkdir("/local/domain/5")
        await dom0.introduce(5, 1, server.store_port(5))
        await dom0.set_perms("/local/domain/5", ["n5"])
        guest = await Client.connect(ends[0])
        await guest.write("data", "over the ring")
        assert await dom0.read("/local/domain/5/data") == b"over the ring"
        await guest.close()
        await guest_hv.close()
        await dom0.wait_for("/local/domain/5", lambda value: value is None, DEADLINE)
        await until(lambda: len(heard) == 2, DEADLINE)
        assert heard == ["@releaseDomain", "@releaseDomain/5"]
        await dom0.close()
        await primary.close()
        await server.close()
        assert await loop.run_in_executor(None, process.wait, DEADLINE) == 0
        await loop.run_in_executor(None, manager.__exit__, None, None, None)

    asyncio.run(run())
    assert not (tmp_path / "socket").exists()


# ---- Debian's programs ----


def tool(name: str) -> str:
    # The real one first: Debian's wrapper of xenstore-control refuses to run without a hypervisor.
    path = shutil.which(name, path="/usr/lib/xen-4.17/bin") or shutil.which(name)
    if path is None:
        pytest.skip(f"Debian's {name} is not installed")
    return path


def xen(rundir: Path, name: str, *words: str, code: int = 0) -> str:
    result = subprocess.run(
        [tool(name), *words],
        env={**os.environ, "XENSTORED_RUNDIR": str(rundir)},
        capture_output=True,
        timeout=DEADLINE,
        text=True,
        check=False,
    )
    assert result.returncode == code, result
    return result.stdout


def test_debian_write_read_list_exists_rm(rundir: Path) -> None:
    xen(rundir, "xenstore-write", "/deb/a/b", "value", "/deb/c", "other")
    assert xen(rundir, "xenstore-read", "/deb/a/b") == "value\n"
    assert xen(rundir, "xenstore-read", "-p", "/deb/a/b", "/deb/c") == "/deb/a/b: value\n/deb/c: other\n"
    assert xen(rundir, "xenstore-list", "/deb") == "a\nc\n"
    xen(rundir, "xenstore-exists", "/deb/a")
    xen(rundir, "xenstore-exists", "/deb/none", code=1)
    xen(rundir, "xenstore-rm", "/deb/a")
    xen(rundir, "xenstore-read", "/deb/a/b", code=1)
    xen(rundir, "xenstore-rm", "/deb")


def test_debian_ls(rundir: Path) -> None:
    xen(rundir, "xenstore-write", "/ls/x/y", "1", "/ls/z", "two words")
    assert xen(rundir, "xenstore-ls", "/ls") == 'x = ""\n y = "1"\nz = "two words"\n'
    full = xen(rundir, "xenstore-ls", "-f", "-p")
    assert '/ls/z = "two words"' in full
    assert "(n0)" in full
    xen(rundir, "xenstore-rm", "/ls")


def test_debian_ls_of_a_directory_that_comes_in_parts(rundir: Path) -> None:
    words = [word for number in range(600) for word in (f"/many/child-{number:04d}", str(number))]
    xen(rundir, "xenstore-write", *words)
    lines = xen(rundir, "xenstore-ls", "-f", "/many").splitlines()
    assert lines == [f'/many/child-{number:04d} = "{number}"' for number in range(600)]
    xen(rundir, "xenstore-rm", "/many")


def test_debian_chmod(rundir: Path) -> None:
    xen(rundir, "xenstore-write", "/mode/a", "1")
    xen(rundir, "xenstore-chmod", "-r", "/mode", "n0", "r5", "w6")
    assert "(n0,r5,w6)" in xen(rundir, "xenstore-ls", "-p", "/mode")
    xen(rundir, "xenstore-rm", "/mode")


def test_debian_watch(rundir: Path) -> None:
    env = {**os.environ, "XENSTORED_RUNDIR": str(rundir)}
    watch = subprocess.Popen(
        [tool("xenstore-watch"), "-n", "3", "/w"], env=env, stdout=subprocess.PIPE, text=True, bufsize=0
    )
    assert watch.stdout is not None
    with watch, watch.stdout:
        # Its first line says that the watch is set.
        end = time.monotonic() + DEADLINE
        assert select.select([watch.stdout], [], [], end - time.monotonic())[0]
        first = os.read(watch.stdout.fileno(), 100)
        xen(rundir, "xenstore-write", "/w/a", "1")
        xen(rundir, "xenstore-rm", "/w")
        assert watch.wait(DEADLINE) == 0
        assert (first + os.read(watch.stdout.fileno(), 1000)).decode().split() == ["/w", "/w/a", "/w"]


def test_debian_control(rundir: Path) -> None:
    assert "nodes" in xen(rundir, "xenstore-control", "quota")
    assert "quota" in xen(rundir, "xenstore-control", "help")
    xen(rundir, "xenstore-control", "check")
