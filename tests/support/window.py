"""A terminal window with a program in it, as a person has one: what it shows, and keys. No test here."""

from __future__ import annotations

import os
import select
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

PATIENCE = 15.0  # seconds


class Window:
    """Use it with `with`: the program is killed at its end. It blocks: beside a loop, in a thread.

    env: the program's environment, None for ours
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, patience: float = PATIENCE
    ) -> None:
        self.master, self.slave = os.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.patience = patience
        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            env=env,
        )
        self.seen = b""

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(self.patience)
        for fd in (self.master, self.slave):
            if fd >= 0:
                os.close(fd)

    def see(self, wanted: bytes) -> bytes:
        """All that it has shown, once `wanted` is in it."""
        end = time.monotonic() + self.patience
        while wanted not in self.seen:
            assert time.monotonic() < end and self.process.poll() is None, (wanted, self.seen)
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536)
        return self.seen

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def wait_raw(self) -> None:
        """Until the program passes on every key."""
        end = time.monotonic() + self.patience
        while not self.is_raw():
            assert time.monotonic() < end and self.process.poll() is None, self.seen
            time.sleep(0.01)

    def ended(self) -> int:
        """Its exit code, once the terminal is as it was."""
        code = self.process.wait(self.patience)
        assert termios.tcgetattr(self.slave) == self.before
        return code
