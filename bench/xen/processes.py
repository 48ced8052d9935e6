"""What is there while one measures: programs in dom0, devices of a guest. Knows no kind of device."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from xenbus.toolstack.devices import DeviceSpec, detach_device, wait_connected, write_device
from xenbus.xenstore.client import Client

DEADLINE = 60.0  # seconds, under emulation


@asynccontextmanager
async def process(*command: str, log: Path, ready: str = "") -> AsyncIterator[int]:
    """A program that runs meanwhile, its pid; `ready`: how the line begins that says that it is up.
    AssertionError if it does not come to that, or ends before the body does."""
    with log.open("ab") as err:
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=err)
    try:
        if ready:
            async with asyncio.timeout(DEADLINE):
                await _wait_for(child, ready, log)
        yield child.pid
        assert child.returncode is None, f"{command} ended: {_end_of(log)}"
    finally:
        if child.returncode is None:
            child.terminate()
            try:
                await asyncio.wait_for(child.communicate(), DEADLINE)
            except TimeoutError:
                child.kill()


async def _wait_for(child: asyncio.subprocess.Process, ready: str, log: Path) -> None:
    assert child.stdout is not None
    said = b""
    while line := await child.stdout.readline():
        if line.decode(errors="replace").startswith(ready):
            return
        said += line
    raise AssertionError(f"no {ready!r} but {said!r}: {_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def python_module(name: str, *arguments: str, profile: Path | None = None) -> list[str]:
    """The command that runs it. profile: a file for where its CPU time went"""
    sampled = ["bench.xen.sampler", str(profile)] if profile is not None else []
    return [sys.executable, "-m", *sampled, name, *arguments]


async def run(*command: str) -> str:
    """Its output; AssertionError if it fails."""
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(child.communicate(), DEADLINE)
    assert child.returncode == 0, f"{command}: {out.decode(errors='replace')}"
    return out.decode()


@asynccontextmanager
async def plugged(store: Client, spec: DeviceSpec) -> AsyncIterator[None]:
    """Both ends Connected when the body runs; unplugged in order after it."""
    await write_device(store, spec)
    await wait_connected(store, spec.paths, DEADLINE)
    yield
    await detach_device(store, spec.paths, timeout=DEADLINE)
