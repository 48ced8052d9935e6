"""What the demo's steps stand on: a host in processes of its own, an operator's connections to it, and
the means to see that nothing is left behind. Knows no step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xenbus.cli.demo import kernels
from xenbus.cli.demo.show import Show
from xenbus.domain.layout import CONTROL_DOMAIN
from xenbus.domain.rpc import RpcClient
from xenbus.errors import DeadlineError, NoEntry, XenbusError
from xenbus.toolstack.block import DiskSpec
from xenbus.toolstack.devices import DeviceSpec, wait_connected, write_device
from xenbus.toolstack.domains import Toolstack
from xenbus.toolstack.paths import DevicePaths

GUEST = "guest"
START_DEADLINE = 60.0


class DemoFailed(XenbusError):
    """Something that the demo claims did not hold."""


def check(holds: object, otherwise: str) -> None:
    if not holds:
        raise DemoFailed(otherwise)


@dataclass(slots=True)
class Stage:
    """One demo's surroundings.

    verified:   what the last line lists
    no_kernels: why guests can have no kernel's network stack here; "" if they can
    """

    root: Path
    image: Path
    show: Show
    verified: list[str] = field(default_factory=list)
    no_kernels: str = "no host yet"
    _host: asyncio.subprocess.Process | None = None
    _toolstack: Toolstack | None = None

    @property
    def toolstack(self) -> Toolstack:
        assert self._toolstack is not None
        return self._toolstack

    def did(self, what: str) -> None:
        self.verified.append(what)

    async def start_host(self) -> None:
        """`xenbus up` in a process of its own, as an operator runs it, if possible in a user namespace."""
        self.no_kernels = await kernels.missing()
        around = () if self.no_kernels else kernels.IN_NAMESPACE
        command = (
            *around,
            sys.executable,
            "-m",
            "xenbus.cli.main",
            "up",
            "--until-eof",
            "--dir",
            str(self.root),
        )
        pipe = asyncio.subprocess.PIPE
        self._host = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, start_new_session=True
        )
        assert self._host.stdout is not None
        try:
            async with asyncio.timeout(START_DEADLINE):
                line = await self._host.stdout.readline()
        except TimeoutError:
            raise DeadlineError("the host to be ready", "xenbus up", START_DEADLINE) from None
        check(line.strip() == b"ready", f"xenbus up did not start; see the logs in {self.root}/log")
        self._toolstack = await Toolstack.open(self.root)

    @property
    def host_pid(self) -> int:
        assert self._host is not None
        return self._host.pid

    async def stop_host(self) -> None:
        if self._toolstack is not None:
            await self._toolstack.close()
            self._toolstack = None
        if self._host is not None and self._host.returncode is None:
            self._host.terminate()
            try:
                async with asyncio.timeout(START_DEADLINE):
                    await self._host.wait()
            except TimeoutError:
                self._host.kill()
                raise DeadlineError("the host to end", "xenbus up", START_DEADLINE) from None

    async def show_trees(self) -> None:
        domains = await self.toolstack.domains()
        trees = {f"{d.name} (domid {d.domid})": (await self.ask(d.name, "tree"))["lines"] for d in domains}
        self.show.tree(trees)

    async def ask(self, name: str, method: str, *, timeout: float = 60.0, **params: Any) -> Any:
        return await self.toolstack.ask(name, method, timeout=timeout, **params)

    async def disk(self, name: str, device: str, operation: str, **params: Any) -> Any:
        return await self.ask(name, "device", device=device, operation=operation, **params)

    async def connect(self, name: str) -> RpcClient:
        return await RpcClient.connect(self.toolstack.layout.control_socket(name))

    async def until(self, holds: Callable[[], Awaitable[bool]], what: str, seconds: float = 30.0) -> None:
        """Ask again until it holds: for what no watch tells, such as the process behind a name."""
        end = asyncio.get_running_loop().time() + seconds
        while not await holds():
            if asyncio.get_running_loop().time() > end:
                raise DeadlineError(what, "the host", seconds)
            await asyncio.sleep(0.02)

    # -- what is held --------------------------------------------------------------------------------

    async def snapshot(self) -> dict[str, Any]:
        """Everything that a device or a domain could leave behind, as numbers and names that compare."""
        pids = await self.toolstack.host.call("processes")
        control = await self.ask(CONTROL_DOMAIN, "counts")
        return {
            "store": await dump(self.toolstack, "/"),
            "held": await self.toolstack.host.call("held"),
            "processes": sorted(pids),
            "descriptors": {name: _descriptors(pid) for name, pid in pids.items() if pid},
            "Domain-0": control,
        }

    async def settle(self, before: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Snapshots until one equals `before` or time is up: what is let go of takes a moment to be seen."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while True:
            now = await self.snapshot()
            if now == before or loop.time() > end:
                return now
            await asyncio.sleep(0.05)


async def give(stage: Stage, spec: DeviceSpec) -> DevicePaths:
    """A device, once both ends are Connected."""
    await write_device(stage.toolstack.store, spec)
    await wait_connected(stage.toolstack.store, spec.paths)
    return spec.paths


async def give_disk(stage: Stage, name: str, image: Path, vdev: str, back: int = 0) -> DevicePaths:
    guest = await stage.toolstack.find(name)
    return await give(stage, DiskSpec(guest.domid, str(image), vdev, back_domid=back).device())


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # it has just ended
        return 0


async def dump(toolstack: Toolstack, path: str) -> dict[str, str]:
    """Every node at or below `path` with its value."""
    found: dict[str, str] = {}
    todo = [path]
    while todo:
        at = todo.pop()
        with contextlib.suppress(NoEntry):
            found[at] = (await toolstack.store.read(at)).decode("utf-8", "replace")
            todo += [f"{at.rstrip('/')}/{leaf}" for leaf in await toolstack.store.directory(at)]
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """In words, what one snapshot has and the other has not."""
    found = []
    for key in before.keys() | after.keys():
        was, now = before.get(key), after.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += [f"{key}: {line}" for line in differences(was, now)]
        elif was != now:
            found.append(f"{key}: {was!r} before, {now!r} now")
    return sorted(found)
