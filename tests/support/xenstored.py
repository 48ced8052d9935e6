"""The store daemons, each in a folder of its own: Debian's `xenstored` ("c") and `oxenstored` ("o"), and ours
in either profile ("ours", "ours-o").

The real ones are processes with `preload/machine.c` in front of the hypervisor's libraries, built with `cc`
when it is first needed; ours is a thread. All serve a socket, and guests over ring pages (`machine.py`):

    with start("c", folder) as daemon:
        pipe = daemon.connect()                 # a socket
        guest = daemon.introduce(1)             # the guest's end of its ring

`missing(kind)` says why a daemon cannot be had here; `needs(kind)` is that as a mark for tests.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.support.machine import FileHypervisor, GuestRing, Machine
from xenbus.errors import LinkDown
from xenbus.xenstore.daemon import Daemon
from xenbus.xenstore.engine import OXENSTORED, profile_of
from xenbus.xenstore.sync import SyncClient
from xenbus.xenstore.transport.unix import UnixPipe, dial
from xenbus.xenstore.wire import CODECS, HEADER_SIZE, Op, encode

KINDS = ("c", "o", "ours", "ours-o")
OURS = {"ours": "xenstored", "ours-o": "oxenstored"}  # with their profiles
DEADLINE = 10.0
SOURCE = Path(__file__).with_name("preload") / "machine.c"
PLACES = ("/usr/lib/xen-4.17/bin", "/usr/lib/xen-4.18/bin", "/usr/lib/xen-4.20/bin", "/usr/sbin")
PROGRAMS = {"c": "xenstored", "o": "oxenstored"}

# Our names of quotas as options of xenstored, and as keys of oxenstored.conf.
_C_OPTIONS = {
    "nodes": "--entry-nb={}",
    "node-size": "--entry-size={}",
    "watches": "--watch-nb={}",
    "transactions": "--transaction={}",
    "node-permissions": "--perm-nb={}",
    "path-max": "--path-max={}",
    "transaction-nodes": "--quota=transaction-nodes={}",
    "memory": "--quota=memory={}",
    "outstanding": "--quota=outstanding={}",
    "soft-memory": "--quota-soft=memory={}",
}
_O_KEYS = {
    "nodes": "quota-maxentity",
    "node-size": "quota-maxsize",
    "watches": "quota-maxwatch",
    "transactions": "quota-transaction",
    "path-max": "quota-path-max",
    "outstanding": "quota-maxoutstanding",
    "transaction-nodes": "quota-maxrequests",
}


def program(kind: str) -> str | None:
    """Where the real daemon is."""
    found = (Path(place) / PROGRAMS[kind] for place in PLACES)
    return next((str(path) for path in found if path.is_file()), None)


@cache
def missing(kind: str) -> str:
    """Why there is no such daemon here; "" if there is one."""
    if kind in OURS:
        return ""
    if program(kind) is None:
        return f"{PROGRAMS[kind]} is not installed (Debian: xen-utils-4.17)"
    if shutil.which("cc") is None:
        return "cc is not installed: the real daemons need a small library in front of them"
    return ""


def needs(*kinds: str) -> pytest.MarkDecorator:
    reason = "; ".join(filter(None, map(missing, kinds)))
    return pytest.mark.skipif(bool(reason), reason=reason)


@cache
def _library() -> str:
    """The built library; its folder goes when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="xenbus-preload-")
    _KEPT.append(folder)
    target = str(Path(folder.name) / "machine.so")
    command = [
        "cc",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O1",
        "-shared",
        "-fPIC",
        str(SOURCE),
        "-o",
        target,
        "-ldl",
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert not built.returncode, built.stderr
    return target


def preloaded(folder: Path) -> dict[str, str]:
    """The environment in which a real daemon serves the machine in `folder`."""
    return {
        **os.environ,
        "LD_PRELOAD": _library(),
        "XENBUS_MACHINE": str(folder),
        "XENSTORED_RUNDIR": str(folder / "run"),
        "XENSTORED_ROOTDIR": str(folder / "run"),
    }


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


class Xenstored(ABC):
    """A daemon that serves. `stop()`, or leaving the `with` block, ends it and what came of it."""

    def __init__(self, folder: Path) -> None:
        self.machine = Machine(folder)
        self.folder = folder
        self.socket = folder / "run" / "socket"
        self._pipes: list[UnixPipe | GuestRing] = []
        self._toolstack: SyncClient | None = None

    def connect(self) -> UnixPipe:
        """Another client on the socket."""
        pipe = UnixPipe(dial(str(self.socket)))
        self._pipes.append(pipe)
        return pipe

    @property
    def toolstack(self) -> SyncClient:
        """A client of our own, for what a toolstack does."""
        if self._toolstack is None:
            self._toolstack = SyncClient.connect(str(self.socket), timeout=DEADLINE)
        return self._toolstack

    def guest(self, domid: int) -> GuestRing:
        """The guest's end of its ring; the domain must have been created."""
        ring = self.machine.guest(domid)
        self._pipes.append(ring)
        return ring

    def introduce(self, domid: int) -> GuestRing:
        """A domain begins, gets its home and is introduced, as a toolstack does it."""
        self.machine.create(domid)
        home = f"/local/domain/{domid}"
        self.toolstack.write(home, "")
        self.toolstack.set_perms(home, [f"n{domid}"])
        self.toolstack.introduce(domid, 1, 1)
        return self.guest(domid)

    def shutdown(self, domid: int, letters: str = "s") -> None:
        """The domain has stopped (s) or crashed (c) and is still there. The daemon knows on return."""
        self.machine.state(domid, letters)
        self.machine.settle(DEADLINE)

    def kill(self, domid: int) -> None:
        """The hypervisor does not know the domain any more. The daemon knows on return."""
        self.machine.remove(domid)
        self.machine.settle(DEADLINE)

    def stop(self) -> None:
        """Idempotent."""
        if self._toolstack is not None:
            self._toolstack.close()
            self._toolstack = None
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        if self._end():
            self.machine.close()

    def __enter__(self) -> Xenstored:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @abstractmethod
    def _end(self) -> bool:
        """False if it had ended before."""


class _Process(Xenstored):
    """One of the real ones."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        quotas: Mapping[str, int],
        hurry: int,
        options: Sequence[str],
        patience: float,
    ):
        super().__init__(folder)
        self._log = (folder / "log").open("w+")
        environment = preloaded(folder)
        if hurry:
            environment["XENBUS_MACHINE_HURRY"] = str(hurry)
        arguments = _c_arguments(folder, quotas) if kind == "c" else _o_arguments(folder, quotas, patience)
        path = program(kind)
        assert path is not None, missing(kind)
        self.process = subprocess.Popen(
            [path, *arguments, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            self._await_service()
        except BaseException:
            self.stop()
            raise

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def _await_service(self) -> None:
        end = time.monotonic() + DEADLINE
        question = encode(Op.DIRECTORY, 1, 0, CODECS[Op.DIRECTORY].request("/"))
        while self.process.poll() is None and time.monotonic() < end:
            try:
                pipe = self.connect()
                pipe.send([question], DEADLINE)
                answer = pipe.receive(DEADLINE)
            except (LinkDown, ConnectionError):
                time.sleep(0.001)
                continue
            if len(answer) >= HEADER_SIZE:
                self._pipes.remove(pipe)
                pipe.close()
                return
        raise AssertionError(f"it does not serve (exit {self.process.poll()}): {self.log}")

    def _end(self) -> bool:
        if self._log.closed:
            return False
        self.process.kill()
        self.process.wait(DEADLINE)
        self._log.close()
        return True


def _c_arguments(folder: Path, quotas: Mapping[str, int]) -> list[str]:
    limits = [_C_OPTIONS[name].format(value) for name, value in quotas.items()]
    # No event is dropped for being old: a slow test is none of the daemon's business.
    return ["--no-fork", "--timeout=watch-event=0", f"--pid-file={folder / 'pid'}", *limits]


def _o_arguments(folder: Path, quotas: Mapping[str, int], patience: float) -> list[str]:
    settings: dict[str, object] = {
        "pid-file": folder / "pid",
        "xenstored-kva": folder / "0" / "page",
        "xenstored-port": folder / "0" / "port",
        "xenstored-log-file": folder / "xenstored.log",
        "persistent": "false",
        "quota-activate": "true",
        "quota-path-max": 1024,  # as in the file that comes with it
        "conflict-max-history-seconds": float(patience),
        **{_O_KEYS[name]: value for name, value in quotas.items()},
    }
    config = folder / "oxenstored.conf"
    config.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    return ["--no-fork", "--no-access-log", f"--config-file={config}"]


class _Thread(Xenstored):
    """Ours, in a thread with a loop of its own. `daemon` is for looking at from tests, not for calling."""

    daemon: Daemon
    hypervisor: FileHypervisor

    def __init__(self, folder: Path, quotas: Mapping[str, int], profile: str, patience: float) -> None:
        super().__init__(folder)
        self._patience = patience
        self._profile = profile_of(profile)
        self._quotas = self._profile.quotas(quotas)
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="xenstored", daemon=True)
        self._thread.start()
        if not self._ready.wait(DEADLINE) or self._failure is not None:
            self.machine.close()
            raise AssertionError("it does not serve") from self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:  # noqa: BLE001
            self._failure = exc
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.hypervisor = FileHypervisor(self.machine.folder)
        self.daemon = Daemon(self.hypervisor, self._quotas, profile=self._profile)
        if self._profile is OXENSTORED:
            self.daemon.engine.beside.conflicts.seconds = self._patience
        self.hypervisor.on_shutdown = self.daemon.domain_shutdown
        try:
            await self.daemon.listen_unix(self.socket)
            self._ready.set()
            await self._stop.wait()
        finally:
            await self.daemon.close()
            held = self.hypervisor.held()
            await self.hypervisor.close()
        assert held.mapped_pages == held.ports == 0, f"the daemon kept {held}"

    def _end(self) -> bool:
        if not self._thread.is_alive():
            return False
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the daemon does not end"
        if self._failure is not None:
            raise self._failure
        return True


def start(
    kind: str,
    folder: Path,
    *,
    quotas: Mapping[str, int] | None = None,
    hurry: int = 0,
    options: Sequence[str] = (),
    patience: float = 0,
) -> Xenstored:
    """A daemon that serves already.

    kind:    one of KINDS
    folder:  an empty or missing one, with a short path: sockets' names have at most 107 bytes
    quotas:  by our names (docs/xenstore.md)
    hurry:   a real one's monotonic clock goes so many times faster: xenstored lets a guest write 200 times
             a second, which makes no sense here
    options: further arguments of a real one
    patience: how long oxenstored holds it against a guest that it made another's transaction fail, seconds
    AssertionError, with its log, if it does not come to serve.
    """
    if kind in OURS:
        return _Thread(folder, quotas or {}, OURS[kind], patience)
    return _Process(kind, folder, quotas or {}, hurry, options, patience)
