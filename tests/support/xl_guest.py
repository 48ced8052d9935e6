"""Linux guests on a real Xen, made by dom0's xl and driven by their consoles. No test here.

`xl_guest`: busybox; a line of shell in, its output out. `python_guest`: Python with our `src` in it; source
in, its value out. Both can be saved and restored: the handle stays usable, `domid` and the console change.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.support import evidence
from tests.support.guest_agent import MARK
from tests.support.hypervisor_actor import pack, unpack
from xenbus.xenstore.client import Client

KERNEL, INITRD = "/guest/vmlinuz", "/guest/initrd"
PYTHON_INITRD = Path("/guest/python.cpio")
BOOT_SECONDS = 120.0  # under emulation, on a busy machine
COMMAND_SECONDS = 60.0
CONSOLE_LINE = "console=hvc0 loglevel=3 panic=1"


async def xl(*words: str, seconds: float = 60.0) -> str:
    """Its output; AssertionError with what it said if it fails."""
    return await program("xl", *words, seconds=seconds)


async def program(*command: str, seconds: float = 60.0) -> str:
    """A program's output; AssertionError with it if its exit code is not 0."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), seconds)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{' '.join(command)}: {out.decode(errors='replace')}"
    return out.decode()


class GuestError(AssertionError):
    """What the guest's Python raised: `kind` is the exception's class name, `args_there` its arguments."""

    def __init__(self, answer: dict[str, object]) -> None:
        super().__init__(f"in the guest: {answer['trace']}")
        self.kind = str(answer["error"])
        self.said = str(answer["said"])
        self.args_there = answer["args"]


class Guest(ABC):
    """A domain made by xl, and its console. `said` is all of the console so far, over saves and restores."""

    def __init__(self, name: str, store: Client) -> None:
        self.name = name
        self.domid = -1
        self.said = ""
        self._store = store
        self._console = -1
        self._more = asyncio.Event()
        self._numbers = itertools.count(1)
        self._unsent = bytearray()

    async def attach(self) -> None:
        """Finds the domain by its name and opens its console; after `xl create` and `xl restore`."""
        self.domid = int(await xl("domid", self.name))
        path = f"/local/domain/{self.domid}/console/tty"
        tty = await self._store.wait_for(path, bool, BOOT_SECONDS)
        assert tty is not None
        flags = os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        self._console = os.open(tty.decode(), flags)
        asyncio.get_running_loop().add_reader(self._console, self._read)

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

    def send(self, line: str) -> None:
        """A line for the console. The terminal takes 4 KiB at once, the rest goes when there is room."""
        self._unsent += line.encode() + b"\n"
        self._write()

    def _write(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._unsent:
                del self._unsent[: os.write(self._console, self._unsent)]
        except BlockingIOError:
            loop.add_writer(self._console, self._write)
        except OSError:  # as in _read; who waits for an answer is told by its deadline
            self._unsent.clear()
        if not self._unsent:
            loop.remove_writer(self._console)

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

    @abstractmethod
    async def run(self, line: str, seconds: float = COMMAND_SECONDS) -> str:
        """The output of one line of shell; AssertionError if its exit code is not 0."""

    async def save(self, path: Path, seconds: float = 120.0) -> None:
        """`xl save`: the domain is gone afterwards, the handle waits for `restore`."""
        await xl("save", self.name, str(path), seconds=seconds)
        self.close()

    async def checkpoint(self, path: Path, seconds: float = 120.0) -> None:
        """`xl save -c`: the guest goes on as the same domain; for it the suspend was cancelled."""
        await xl("save", "-c", self.name, str(path), seconds=seconds)

    async def restore(self, path: Path, seconds: float = 120.0, *, paused: bool = False) -> None:
        """`xl restore`: the name stays, `domid` and the console are new ones. The file is removed."""
        await xl("restore", *(["-p"] if paused else []), str(path), seconds=seconds)
        path.unlink()
        await self.attach()

    async def destroy(self) -> None:
        """`xl destroy`; nothing if there is none of that name."""
        self.close()
        if any(line.split()[0] == self.name for line in (await xl("list")).splitlines()):
            await xl("destroy", self.name)

    def close(self) -> None:
        if self._console >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._console)
            loop.remove_writer(self._console)
            os.close(self._console)
            self._console = -1


class XlGuest(Guest):
    """Busybox: its /init evaluates each line that comes."""

    async def run(self, line: str, seconds: float = COMMAND_SECONDS) -> str:
        number, start = next(self._numbers), len(self.said)
        self.send(f"{{ {line}; }} 2>&1; echo @@{number} $?")
        end = await self.wait_for(rf"^@@{number} (\d+)\n", seconds, start)
        out = self.said[start : end.start()]
        assert end[1] == "0", f"{line}: {end[1]}: {out}"
        return out


class PythonGuest(Guest):
    """Python with our `src`: tests/support/guest_agent.py answers on its console."""

    async def call(self, source: str, seconds: float = COMMAND_SECONDS, /, **args: object) -> object:
        """Runs source, `await` included, in the guest's one namespace; the value of its last expression.

        args: set there first. Arguments and value: what JSON has, bytes, tuples (they arrive as lists).
        GuestError if it raises. What it starts, tasks too, stays; calls may run side by side.
        """
        packed = {name: pack(value) for name, value in args.items()}
        return await self._ask({"do": "exec", "source": source, "args": packed}, seconds)

    async def run(self, line: str, seconds: float = COMMAND_SECONDS) -> str:
        code, out = await self._ask({"do": "shell", "line": line}, seconds)
        assert code == 0, f"{line}: {code}: {out}"
        return out

    async def restart(self) -> None:
        """Its Python ends, as a process does, and begins anew: nothing of what it held is left."""
        start = len(self.said)
        self.send(json.dumps({"id": 0, "do": "exec", "source": "import os\nos._exit(0)"}))
        await self.wait_for("the agent is up", COMMAND_SECONDS, start)

    async def _ask(self, command: dict[str, object], seconds: float):
        number, start = next(self._numbers), len(self.said)
        self.send(json.dumps({"id": number} | command))
        found = await self.wait_for(rf'^{MARK}({{"id": {number}[,}}].*)\n', seconds, start)
        answer = json.loads(found[1])
        if "error" in answer:
            raise GuestError(answer)
        return unpack(answer["value"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """memory: MiB; disks: lines of xl-disk-configuration(5); extra: for the kernel's command line; config:
    more lines of xl.cfg(5)"""

    memory: int = 256
    vcpus: int = 1
    disks: Sequence[str] = ()
    extra: str = ""
    config: str = ""

    def text(self, name: str, initrd: str | Path) -> str:
        lines = [
            'type="pv"',
            f'name="{name}"',
            f'kernel="{KERNEL}"',
            f'ramdisk="{initrd}"',
            f"memory={self.memory}",
            f"vcpus={self.vcpus}",
            f"disk={[*self.disks]!r}",
            'on_crash="destroy"',
            f'extra="{CONSOLE_LINE} {self.extra}"',
            self.config,
        ]
        return "\n".join(lines) + "\n"


G = TypeVar("G", bound=Guest)


@asynccontextmanager
async def _made(guest: G, config: str) -> AsyncIterator[G]:
    """Up when the body runs, destroyed after it."""
    try:
        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "guest.cfg"
            path.write_text(config)
            await xl("create", "-q", str(path))
        await guest.attach()
        await guest.run("true", BOOT_SECONDS)
        yield guest
    except BaseException:
        evidence.note(**{f"console-{guest.name}": guest.said})
        raise
    finally:
        await guest.destroy()


def xl_guest(store: Client, name: str, **keys: Any) -> AbstractAsyncContextManager[XlGuest]:
    """A busybox guest with Linux's xen-blkfront; keys: Config's."""
    return _made(XlGuest(name, store), Config(**keys).text(name, INITRD))


@asynccontextmanager
async def python_guest(store: Client, name: str, **keys: Any) -> AsyncIterator[PythonGuest]:
    """The same with Python in it and without xen-blkfront, until a test runs `modprobe xen-blkfront`."""
    if not PYTHON_INITRD.exists():
        await program(sys.executable, "/xenbus/tools/xen/python_guest.py", str(PYTHON_INITRD), seconds=120)
    async with _made(PythonGuest(name, store), Config(**keys).text(name, PYTHON_INITRD)) as guest:
        yield guest
