"""A Linux guest on a real Xen, made by xl and driven by its console: commands in, output and exit code out.

Its /init is the lab's: it evaluates each line that comes. Needs dom0's xl and xenconsoled. No test here.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from xenbus.xenstore.client import Client

KERNEL, INITRD = "/guest/vmlinuz", "/guest/initrd"
BOOT_SECONDS = 120.0  # under emulation, on a busy machine
COMMAND_SECONDS = 60.0


async def xl(*words: str, seconds: float = 60.0) -> str:
    """Its output; AssertionError with what it said if it fails."""
    process = await asyncio.create_subprocess_exec(
        "xl", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), seconds)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"xl {' '.join(words)}: {out.decode(errors='replace')}"
    return out.decode()


class XlGuest:
    """`run` a line of shell in it. `said` is all of its console so far."""

    def __init__(self, name: str, domid: int, console: int) -> None:
        self.name = name
        self.domid = domid
        self.said = ""
        self._console = console
        self._more = asyncio.Event()
        self._numbers = itertools.count(1)
        asyncio.get_running_loop().add_reader(console, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._console, 65536)
        except BlockingIOError:
            return
        except OSError:  # EIO: the guest, and with it the terminal's other end, is gone
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._console)
        self.said += data.decode(errors="replace").replace("\r", "")
        self._more.set()

    async def wait_for(self, pattern: str, seconds: float, start: int = 0) -> re.Match[str]:
        """Until the console has said so, from `start` on. AssertionError with its end otherwise."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    found = re.compile(pattern, re.MULTILINE).search(self.said, start)
                    if found:
                        return found
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"no {pattern!r} from {self.name}: {self.said[-2000:]}") from None

    async def run(self, line: str, seconds: float = COMMAND_SECONDS) -> str:
        """The output of one line of shell; AssertionError if its exit code is not 0."""
        number, start = next(self._numbers), len(self.said)
        os.write(self._console, f"{{ {line}; }} 2>&1; echo @@{number} $?\n".encode())
        end = await self.wait_for(rf"^@@{number} (\d+)$", seconds, start)
        out = self.said[start : end.start()]
        assert end[1] == "0", f"{line}: {end[1]}: {out}"
        return out

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._console)
        os.close(self._console)


@asynccontextmanager
async def xl_guest(
    store: Client, name: str, *, memory: int = 256, vcpus: int = 1, extra: str = ""
) -> AsyncIterator[XlGuest]:
    """A PV guest without devices, up when the body runs, destroyed after it."""
    with tempfile.TemporaryDirectory() as work:
        config = Path(work) / "guest.cfg"
        config.write_text(
            f'type="pv"\nname="{name}"\nkernel="{KERNEL}"\nramdisk="{INITRD}"\nmemory={memory}\nvcpus={vcpus}\n'
            f'on_crash="destroy"\nextra="console=hvc0 loglevel=3 panic=1 {extra}"\n'
        )
        await xl("create", "-q", str(config))
    domid = int(await xl("domid", name))
    try:
        tty = await store.wait_for(f"/local/domain/{domid}/console/tty", bool, BOOT_SECONDS)
        assert tty is not None
        flags = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        guest = XlGuest(name, domid, os.open(tty.decode(), flags))
        try:
            await guest.run("true", BOOT_SECONDS)
            yield guest
        finally:
            guest.close()
    finally:
        if name in await xl("list"):
            await xl("destroy", name)
