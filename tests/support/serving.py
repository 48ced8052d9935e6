"""`xenbus serve` as a process of its own, and the command line beside it. No test here."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

START = 60.0  # seconds, under emulation
COMMAND = 60.0


def environment(run: Path) -> dict[str, str]:
    return os.environ | {"XENBUS_RUN": str(run), "PYTHONUNBUFFERED": "1"}


class Daemon:
    """One `xenbus serve` at a time; `log` is what all of them said."""

    def __init__(self, run: Path, options: tuple[str, ...]) -> None:
        self.run = run
        self.options = options
        self.log = run.parent / f"{run.name}.log"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Until it has said that it is ready, on its output and to systemd."""
        address = self.run.parent / f"{self.run.name}.notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as out:
            notify.bind(str(address))
            notify.setblocking(False)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "xenbus", "serve", *self.options,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=out,
                env=environment(self.run) | {"NOTIFY_SOCKET": str(address)},
            )  # fmt: skip
            assert self._process.stdout is not None
            line = await asyncio.wait_for(self._process.stdout.readline(), START)
            assert line == b"ready\n", f"{line!r}: {self.log.read_text()[-3000:]}"
            said = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(notify, 4096), START)
            assert said.startswith(b"READY=1\nSTATUS="), said

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after this signal."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.returncode is None:
            process.send_signal(number)
        try:
            return await asyncio.wait_for(process.wait(), COMMAND)
        except TimeoutError:
            process.kill()
            raise AssertionError(f"serve did not end: {self.log.read_text()[-3000:]}") from None

    async def kill(self) -> None:
        assert await self.end(signal.SIGKILL) == -signal.SIGKILL

    async def command(self, *words: str, code: int = 0) -> str:
        """`xenbus WORDS`: what it printed on both streams."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "xenbus", *words,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT, env=environment(self.run),
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), COMMAND)
        assert process.returncode == code, f"xenbus {' '.join(words)}: {process.returncode}: {out.decode()}"
        return out.decode()


@asynccontextmanager
async def serving(run: Path, *options: str) -> AsyncIterator[Daemon]:
    """Running when the body begins; ended in order after it, if it still runs."""
    daemon = Daemon(run, options)
    await daemon.start()
    try:
        yield daemon
    except BaseException:
        print(daemon.log.read_text()[-20000:])  # pytest shows it with the failure
        raise
    finally:
        assert await daemon.end() == 0, daemon.log.read_text()[-3000:]
