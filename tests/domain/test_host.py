"""The host: starts, ends, is alone in its directory, buries who falls, and leaves nothing running."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
from pathlib import Path

import pytest
from tests.support.hosts import Up, alive, place, wait_dead

from xenbus.domain import host as module
from xenbus.domain.host import Host
from xenbus.domain.rpc import RemoteError, RpcClient
from xenbus.errors import DeadlineError, NotFound, UsageError, XenbusError
from xenbus.toolstack.domains import Toolstack


@contextlib.asynccontextmanager
async def hosting(root, **options):
    """A host in this process (its domains are processes), and a toolstack of it. Nothing is left of it."""
    host = Host(root, **options)
    await host.start()
    pids = []
    try:
        async with await Toolstack.open(root) as toolstack:
            pids = [pid for pid in (await toolstack.host.call("processes")).values() if pid != os.getpid()]
            yield host, toolstack
    finally:
        await host.stop()
    assert not [pid for pid in pids if alive(pid)]


def run(test, seconds=40.0, **options):
    async def main():
        with place() as root:
            async with asyncio.timeout(seconds), hosting(root / "h", **options) as (host, toolstack):
                await test(host, toolstack)

    asyncio.run(main())


def test_a_host_its_processes_its_modes_and_that_it_is_alone():
    async def test(host, toolstack):
        root = host.layout.root
        listed = await toolstack.domains()
        assert [(d.domid, d.name, d.state) for d in listed] == [(0, "Domain-0", "running")]
        pids = await toolstack.host.call("processes")
        assert set(pids) == {"supervisor", "xenstored", "Domain-0"} and len(set(pids.values())) == 3
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        found = [path for path in root.rglob("*") if path.is_socket()]
        assert len(found) == 3
        for path in found:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        with pytest.raises(UsageError, match="a host runs there already"):
            await Host(root).start()
        assert (await toolstack.domains()) == listed  # the first one did not notice
        await host.stop()
        assert not [path for path in root.rglob("*") if path.is_socket()]
        await host.stop()  # once more is nothing

    run(test)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "words"), [("xenstored", "store daemon ended"), ("Domain-0", "domain 0 ended")]
)
def test_without_store_or_domain_0_the_host_fails_and_says_so(who, words):
    async def test(host, toolstack):
        guest = await toolstack.create("guest")
        pids = await toolstack.host.call("processes")
        os.kill(pids[who], signal.SIGKILL)
        async with asyncio.timeout(10):
            await host.failed.wait()
        assert words in host.failure and "SIGKILL" in host.failure
        async with asyncio.timeout(15):
            await host.stop()
        assert not wait_dead([pid for pid in (*pids.values(), guest.pid) if pid != os.getpid()], 0.0)

    async def main():
        with place() as root:
            host = Host(root / "h")
            await host.start()
            toolstack = await Toolstack.open(root / "h")
            try:
                await test(host, toolstack)
            finally:
                await host.stop()
                await toolstack.close()

    asyncio.run(main())


@pytest.mark.slow
def test_a_guest_that_cannot_start_says_why_and_is_buried():
    async def test(host, toolstack):
        with pytest.raises(RemoteError, match=r"guest did not start: .*No module named"):
            await toolstack.create("guest")
        assert [d.name for d in await toolstack.domains()] == ["Domain-0"]
        assert set(await toolstack.host.call("held")) == {"0"}
        assert await toolstack.store.directory("/local/domain") == ["0"]
        assert "guest" not in await toolstack.host.call("processes")

    run(test, guest_module="xenbus.no_such_program")


async def _booting(toolstack):
    """pids, once the guest's process is there."""
    while "guest" not in (pids := await toolstack.host.call("processes")):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return pids


@pytest.mark.slow
def test_a_guest_that_never_gets_ready_has_a_deadline_and_can_be_destroyed_before(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    async def test(host, toolstack):
        starting = asyncio.create_task(toolstack.create("guest"))
        pids = await _booting(toolstack)
        await toolstack.destroy(1)
        with pytest.raises(XenbusError, match="guest did not start"):
            await starting
        assert not await asyncio.to_thread(wait_dead, [pids["guest"]], 5.0)

        monkeypatch.setattr(module, "START_DEADLINE", 0.3)
        with pytest.raises(RemoteError, match=r"waited 0.3 s for guest to be ready; .*guest.log") as caught:
            await toolstack.create("guest")
        assert caught.value.kind == "DeadlineError"
        assert [d.name for d in await toolstack.domains()] == ["Domain-0"]

    run(test, guest_module="tests.support.hangs")


@pytest.mark.slow
def test_a_caller_that_goes_while_its_guest_boots_leaves_nothing(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    async def test(host, toolstack):
        caller = await RpcClient.connect(host.layout.host_socket)
        made = await caller.call("create", name="guest")
        await toolstack.store.introduce(made["domid"], 0, made["store_port"])
        call = asyncio.create_task(caller.call("unpause", domid=made["domid"]))
        pids = await _booting(toolstack)
        await caller.close()
        await asyncio.gather(call, return_exceptions=True)
        assert not await asyncio.to_thread(wait_dead, [pids["guest"]], 5.0)
        while len(await toolstack.domains()) > 1:  # noqa: ASYNC110 - domain 0's monitor buries it
            await asyncio.sleep(0.01)

    run(test, guest_module="tests.support.hangs")


@pytest.mark.slow
def test_what_the_control_socket_refuses():
    async def test(host, toolstack):
        call = toolstack.host.call
        for method in ("destroy", "unpause", "wait_suspended", "rebirth", "resume", "wait_ended"):
            with pytest.raises(NotFound, match="no domain 99"):
                await call(method, domid=99)
            with pytest.raises(UsageError, match="domain 0"):
                await call(method, domid=0)
            with pytest.raises(UsageError, match="int wanted"):
                await call(method, domid="1")
        for name in ("Domain-0", "xenstored", "../x", "12", "", "x" * 63):
            if name == "x" * 63 and len(str(host.layout.root)) < 30:
                continue
            with pytest.raises(UsageError):
                await call("create", name=name)
        paused = (await call("create", name="p"))["domid"]
        with pytest.raises(UsageError, match="exists"):
            await call("create", name="p")
        with pytest.raises(UsageError, match="not suspended"):
            await call("resume", domid=paused)
        with pytest.raises(UsageError, match="can't suspend"):
            await call("wait_suspended", domid=paused, seconds=0.1)
        with pytest.raises(RemoteError, match="the domain's end") as caught:
            await call("wait_ended", domid=paused, seconds=0.1)
        assert caught.value.kind == "DeadlineError"
        await call("destroy", domid=paused)
        guest = await toolstack.create("guest")
        with pytest.raises(UsageError, match="not paused"):
            await call("unpause", domid=guest.domid)
        for method in ("resume", "rebirth"):
            with pytest.raises(UsageError, match="running, not suspended"):
                await call(method, domid=guest.domid)
        with pytest.raises(RemoteError, match=r"guest\) owed the next move"):
            await call("wait_suspended", domid=guest.domid, seconds=0.1)
        with pytest.raises(UsageError, match="seconds wanted"):
            await call("wait_ended", domid=guest.domid, seconds=-1)

    run(test)


def test_domids_go_up_and_round_and_are_never_taken_twice():
    async def main():
        with place() as root:
            host = Host(root)
            host.domains = {0: None, 1: None, 3: None}
            assert [host._take_domid() for _ in range(3)] == [2, 4, 5]
            host._next_domid = module.DOMID_FIRST_RESERVED - 1
            assert [host._take_domid() for _ in range(2)] == [module.DOMID_FIRST_RESERVED - 1, 2]
            await host.broker.close()

    asyncio.run(main())


@pytest.mark.slow
def test_sigkill_of_the_supervisor_ends_everybody_and_the_directory_can_be_used_again():
    async def pids_of(root, guest):
        async with await Toolstack.open(root) as toolstack:
            await toolstack.create(guest)
            return (await toolstack.host.call("processes")).values()

    with place() as root:
        host = Up(root).wait_ready()
        pids = asyncio.run(pids_of(root, "guest"))
        host.end(signal.SIGKILL)
        # At once: the new host waits for what is left of the old one.
        again = Up(root).wait_ready()
        try:
            assert not wait_dead(pids, 0.0)
            assert asyncio.run(pids_of(root, "guest"))
            # Nobody of the old host took a socket of the new one with it.
            assert (root / "control" / "guest").is_socket() and (root / "xenstored" / "socket").is_socket()
        finally:
            assert again.end() == 0


@pytest.mark.slow
def test_a_process_that_outlives_its_host_is_named_at_the_deadline(monkeypatch):
    monkeypatch.setattr(module, "LOCK_PATIENCE", 0.3)

    async def main():
        with place() as root:
            host = Host(root)
            host.layout.make()
            lock = host.layout.lock()
            try:
                with pytest.raises(DeadlineError, match=r"lock; a process of a host that was there before"):
                    await host.start()
            finally:
                os.close(lock)
            # A socket that nobody serves is no host.
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(host.layout.host_socket))
            await host.start()
            await host.stop()

    asyncio.run(main())
