"""Both clients against the daemon as a process of its own: it serves, it hangs, it is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from xenbus.errors import DeadlineError, LinkDown
from xenbus.xenstore.client import Client
from xenbus.xenstore.sync import SyncClient


@pytest.fixture
def daemon(tmp_path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """(process, its socket)."""
    path = str(tmp_path / "socket")
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "xenbus.xenstore.daemon", "--socket", path, "--ready-fd", str(writing)]
    with subprocess.Popen(command, pass_fds=[writing]) as process, os.fdopen(reading, "rb") as ready:
        os.close(writing)
        try:
            assert ready.read() == b"ready\n"
            yield process, path
        finally:
            process.kill()
            process.wait(5)


def test_it_serves_then_hangs_then_dies(daemon) -> None:
    process, path = daemon

    async def main() -> None:
        async with await Client.connect(path, timeout=10) as client:
            heard: list[str] = []
            await client.watch("/a", heard.append)
            await asyncio.gather(*(client.write(f"/a/{n}", str(n)) for n in range(1000)))
            assert sorted(await client.directory("/a"), key=int) == [str(n) for n in range(1000)]
            assert len(heard) == 1001
            process.send_signal(signal.SIGSTOP)
            client.timeout = 0.05
            with pytest.raises(DeadlineError, match=f"xenstored at {path} owed"):
                await client.read("/a/1")
            client.timeout = 30
            reads = [asyncio.create_task(client.read(f"/a/{n}")) for n in range(900)]
            await asyncio.sleep(0)
            lost: list[Exception] = []
            client.on_lost(lost.append)
            process.kill()
            began = time.monotonic()
            results = await asyncio.gather(*reads, return_exceptions=True)
            assert time.monotonic() - began < 2
            assert {type(result) for result in results} == {LinkDown}
            assert len(lost) == 1
            process.wait(5)  # its listener may outlive its connections by a moment
            with pytest.raises(LinkDown):
                await Client.connect(path)

    asyncio.run(main())


def test_it_dies_under_a_blocking_caller(daemon) -> None:
    process, path = daemon
    with SyncClient.connect(path, timeout=30) as client:
        client.write("/a", "1")
        assert client.transaction(lambda tx: tx.read("/a")) == b"1"
        process.send_signal(signal.SIGSTOP)
        killer = threading.Timer(0.05, process.kill)
        killer.start()
        began = time.monotonic()
        with pytest.raises(LinkDown, match="READ /a"):
            client.read("/a")
        assert time.monotonic() - began < 5
        killer.join()
        assert client.closed
