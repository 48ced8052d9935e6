"""Real kernels' network stacks for the demo's guests, without root: each is a network namespace in the user
namespace that the host's processes are in. Knows processes; what is done inside is stack.py's.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from typing import Any

from xenbus.errors import DeadlineError, XenbusError

DEADLINE = 30.0
STACK = (sys.executable, "-m", "xenbus.cli.demo.stack")
# What the host is started with: it may make TAP devices in namespaces of that user namespace then.
IN_NAMESPACE = ("unshare", "-Ur")


async def missing() -> str:
    """Why there can be no stacks here; "" if there can."""
    for program in ("unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    for what, words in (
        ("no user namespaces here", ("true",)),
        ("no TAP devices in user namespaces here", (*STACK, "try")),
    ):
        process = await asyncio.create_subprocess_exec(
            "unshare",
            "-Urn",
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(DEADLINE):
                _, said = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            return f"{what}: nothing came of it within {DEADLINE:g} s"
        if process.returncode:
            return f"{what}: {(said.decode(errors='replace').strip().splitlines() or ['?'])[-1]}"
    return ""


class KernelStack:
    """`async with KernelStack(pid_of_the_host) as stack`: see stack.Stack for what can be asked."""

    def __init__(self, host: int) -> None:
        self._host = host
        self.address = ""

    async def __aenter__(self) -> KernelStack:
        inside = ("nsenter", "--user", "--preserve-credentials", f"--target={self._host}")
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *inside, "unshare", "-n", *STACK, stdin=pipe, stdout=pipe
        )
        try:
            await self.ask("devices")  # it is in its namespace
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def netns(self) -> str:
        return f"/proc/{self.pid}/ns/net"

    async def ask(self, what: str, **parameters: object) -> Any:
        """XenbusError with its own words."""
        source, sink = self._process.stdin, self._process.stdout
        assert source is not None and sink is not None
        try:
            async with asyncio.timeout(DEADLINE):
                source.write(json.dumps({"do": what, **parameters}).encode() + b"\n")
                line = await sink.readline()
        except TimeoutError:
            raise DeadlineError(what, "a guest's network stack", DEADLINE) from None
        except OSError:
            line = b""
        answer = json.loads(line or '{"error": "its process ended"}')
        if "error" in answer:
            raise XenbusError(f"a guest's network stack: {what}: {answer['error']}")
        return answer["result"]

    async def up(self, device: str, address: str) -> None:
        self.address = address
        await self.ask("up", device=device, address=address)
