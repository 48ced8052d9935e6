"""A child process by its pidfd: started, signalled without racing its end, awaited without a thread.

asyncio's own subprocesses lose an exit code when a signal is sent to a child that has just ended (Popen
polls before it signals, and the watcher then finds nobody to wait for); here an exit code tells a reboot
from a crash. Knows nothing of domains.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

STOP_DEADLINE = 10.0  # seconds until a process that was asked to end is killed


class Child:
    """Made in a running loop. `returncode` is None while it lives, negative for a signal."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: IO[bytes],
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=tuple(pass_fds),
            env=environment,
            # Ctrl-C at a terminal is for the supervisor, which then ends the others in order.
            start_new_session=True,
        )
        self.pid = self._popen.pid
        try:
            self._fd = os.pidfd_open(self.pid)
        except OSError:
            self._popen.kill()
            self._popen.wait()
            raise
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.add_reader(self._fd, self._reap)

    @property
    def returncode(self) -> int | None:
        return self._popen.returncode

    def _reap(self) -> None:
        self._loop.remove_reader(self._fd)
        self._popen.wait()
        os.close(self._fd)
        self._ended.set()

    def send_signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    async def wait(self) -> int:
        """Its exit code; set a deadline around it."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    async def end(self, *, kill: bool = False) -> int:
        """SIGTERM (or SIGKILL), SIGKILL after a deadline; returns when it is gone."""
        self.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_DEADLINE):
                return await self.wait()
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            return await self.wait()
