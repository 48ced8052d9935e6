"""Hosts for tests: `xenbus up` as an operator runs it, a toolstack of it, and what it holds. No test here.

Directories are short and below the system's temporary one: a socket's path has at most 107 bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from xenbus.cli.demo.stage import Stage, differences
from xenbus.domain.rpc import RpcClient
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import wait_connected, write_device
from xenbus.toolstack.domains import Toolstack

READY = 20.0  # seconds
END = 30.0

Result = TypeVar("Result")


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A directory with a short path that goes with the test."""
    path = Path(tempfile.mkdtemp(prefix="xb-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Up:
    """One `xenbus up`. `said` is what it printed on stderr after its end."""

    def __init__(self, root: Path, *options: str) -> None:
        self.root = root
        self.said = ""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read at its end
        self.process = subprocess.Popen(
            [sys.executable, "-m", "xenbus.cli.main", "up", "--dir", str(root), *options],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_ready(self) -> Up:
        readable, _, _ = select.select([self.process.stdout], [], [], READY)
        line = self.process.stdout.readline() if readable else b"(nothing in time)"
        if line != b"ready\n":
            self.end()
            raise AssertionError(f"xenbus up said {line!r}: {self.said}")
        return self

    def wait(self, seconds: float = END) -> int:
        """Its exit code once it has ended by itself."""
        code = self.process.wait(seconds)
        self._close()
        return code

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END)
            self._close()
            raise

    def _close(self) -> None:
        if not self._errors.closed:
            self._errors.seek(0)
            self.said = self._errors.read().decode(errors="replace")
            self._errors.close()
            self.process.stdout.close()


@contextlib.contextmanager
def up(*options: str) -> Iterator[Up]:
    """A host that is ready; it ends with the block."""
    with place() as root:
        host = Up(root / "host", *options).wait_ready()
        try:
            yield host
        finally:
            host.end()


class Site:
    """A toolstack on a running host, with what tests do all the time."""

    def __init__(self, toolstack: Toolstack) -> None:
        self.toolstack = toolstack
        self.store = toolstack.store
        self.host = toolstack.host
        self.root = toolstack.layout.root
        self._stage = Stage(self.root, self.root, None, _toolstack=toolstack)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, root: Path):
        async with await Toolstack.open(root) as toolstack:
            yield cls(toolstack)

    def image(self, name: str, size: int = 1 << 20) -> Path:
        path = self.root / name
        path.write_bytes(os.urandom(size))
        return path

    async def disk(self, guest: str, image: str | Path, vdev: str = "xvda", back: int = 0, **more):
        """A Connected disk; its DevicePaths."""
        info = await self.toolstack.find(guest)
        spec = DiskSpec(info.domid, str(image), vdev, back_domid=back, **more).device()
        await write_device(self.store, spec)
        await wait_connected(self.store, spec.paths, 20.0)
        return spec.paths

    async def ask(self, name: str, method: str, **params):
        return await self.toolstack.ask(name, method, timeout=30.0, **params)

    async def operate(self, name: str, device: str, operation: str, **params):
        return await self.ask(name, "device", device=device, operation=operation, **params)

    async def connect(self, name: str) -> RpcClient:
        return await RpcClient.connect(self.toolstack.layout.control_socket(name))

    async def lines(self, name: str) -> str:
        return "\n".join((await self.ask(name, "tree"))["lines"])

    async def until(self, holds, seconds: float = 20.0):
        """The first true value of `await holds()`, asked again and again: for what has no watch."""
        end = time.monotonic() + seconds
        while not (value := await holds()):
            assert time.monotonic() < end, f"{holds.__doc__ or holds.__name__}: not within {seconds} s"
            await asyncio.sleep(0.02)
        return value

    async def gone(self, name: str, domid: int | None = None, seconds: float = 20.0) -> None:
        """Until no domain of that name (and number) is listed."""

        async def buried() -> bool:
            found = [d for d in await self.toolstack.domains() if d.name == name]
            return not [d for d in found if domid in (None, d.domid)]

        await self.until(buried, seconds)

    async def baseline(self):
        """What is held once nothing is under way any more."""
        return await self._stage.settle({}, 0.3)

    async def left(self, before, seconds: float = 20.0) -> list[str]:
        """What is held now and was not before, after it had time to go."""
        return differences(before, await self._stage.settle(before, seconds))

    async def processes(self) -> dict[str, int]:
        return await self.host.call("processes")


def visit(root: Path, test: Callable[[Site], Awaitable[Result]]) -> Result:
    """`await test(site)` on the host in that directory, from a test that is no coroutine."""

    async def main() -> Result:
        async with Site.open(root) as found:
            return await test(found)

    return asyncio.run(main())


def processes(root: Path) -> list[int]:
    """The numbers of a host's processes."""
    return list(visit(root, Site.processes).values())


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_dead(pids, seconds: float = 15.0) -> list[int]:
    """Those that still run when the time is up."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left
