"""Live update: this process becomes another program, which goes on with everything that is open. asyncio.

The store goes over as a record stream in a memfd; sockets, the hypervisor's handle and the state file's lock
are inherited. First the new program is run beside this one, only to read the stream: what does not do that
never takes over, and this daemon goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xenbus.errors import XenbusError
from xenbus.xenstore.daemon.keeper import Keeper
from xenbus.xenstore.engine import Engine, Profile
from xenbus.xenstore.engine.update import LiveUpdate
from xenbus.xenstore.state.dump import Held, dump
from xenbus.xenstore.state.image import Image
from xenbus.xenstore.state.load import load, read
from xenbus.xenstore.state.records import GlobalData, Socket, Writer
from xenbus.xenstore.wire import HEADER, Message

_log = logging.getLogger("xenbus.xenstored")

# The environment of a program that takes over: descriptors as JSON; and of one that only tries.
RESUME = "XENBUS_XENSTORED_RESUME"
TRIAL = "XENBUS_XENSTORED_TRIAL"
# How long the new program may take to read the stream.
TRIAL_SECONDS = 30.0
# How long domains may take that are being introduced.
INTRODUCE_SECONDS = 5.0
# Between two looks at what has to end first.
LOOK_SECONDS = 0.01
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PYTHON = re.compile(r"python(\d+(\.\d+)?)?").fullmatch


# ---- the new program ----


@dataclass(slots=True)
class Resumed:
    """What a program goes on with. listener: the socket's descriptor, -1 for none; lock: a state file's, and
    the file's path"""

    image: Image
    listener: int
    lock: tuple[int, str] | None

    @classmethod
    def take(cls) -> Resumed | None:
        """From the environment, once; None for a daemon that begins. StateError, UsageError."""
        text = os.environ.pop(RESUME, None)
        if text is None:
            return None
        given = json.loads(text)
        image = _take_image(given["state"])
        lock = (given["lock"], given["file"]) if "lock" in given else None
        return cls(image, image.globals.socket_fd if image.globals else -1, lock)

    def keeper(self, state: str | None) -> Keeper | None:
        """With the lock that goes with the file. What is in there is the store that goes on, or gives way
        to it."""
        lock, self.lock = self.lock, None
        if lock is not None and (state is None or os.path.realpath(state) != lock[1]):
            os.close(lock[0])
            lock = None
        return None if state is None else Keeper(state, lock_fd=lock[0] if lock else None)


def _take_image(fd: int) -> Image:
    with open(fd, "rb") as file:
        file.seek(0)
        return read(file.read())


def tried(profile: Profile) -> bool:
    """Whether this is a trial: the stream was read then, and nothing else is to be done."""
    text = os.environ.pop(TRIAL, None)
    if text is None:
        return False
    given = json.loads(text)
    load(_take_image(given["state"]), lambda: Engine(None, None, profile))
    sys.stdout.write(f"{given['word']}\n")
    sys.stdout.flush()
    return True


# ---- the old one ----


class Host(Protocol):
    """What an update needs of its daemon."""

    engine: Engine
    keeper: Keeper | None

    @property
    def busy(self) -> bool:
        """An INTRODUCE is under way."""
        ...

    @property
    def listener(self) -> int: ...
    async def park(self) -> None:
        """Guests' rings are given back; their sessions wait."""
        ...

    async def unpark(self) -> None: ...
    def all_held(self) -> list[Held]:
        """Every connection. UsageError for one that cannot go along."""
        ...


class _Refused(Exception):
    """It does not happen; the text is the answer."""


class Updater:
    """Made by whoever owns the process.

    inherited: descriptors that the new program gets besides, and finds by its arguments
    """

    def __init__(self, host: Host, *, evtchn_fd: int = -1, inherited: Sequence[int] = ()) -> None:
        self._host = host
        self._evtchn_fd = evtchn_fd
        self._inherited = inherited
        self._task: asyncio.Task[None] | None = None

    def start(self, update: LiveUpdate, message: Message, failed: Callable[[str], None]) -> None:
        """`failed` is called with the reason, or this process is another program some time later."""
        self._task = asyncio.get_running_loop().create_task(self._run(update, message, failed), name="update")

    def cancel(self) -> None:
        """Too late once the last step has begun, which does not wait for anything."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, update: LiveUpdate, message: Message, failed: Callable[[str], None]) -> None:
        _log.info("live update: %s", update.file)
        parked = False
        try:
            command = _command(update)
            end = asyncio.get_running_loop().time() + update.timeout
            await self._await_quiet(update, end)
            await self._try(command, update)
            await self._await_quiet(update, end)
            parked = True
            await self._host.park()
            if self._host.keeper is not None:
                await self._host.keeper.settle()
            # What arrived in this turn of the loop has its callbacks in the next one.
            await asyncio.sleep(0)
            await self._await_quiet(update, end)
            self._become(command, update, message)
        except asyncio.CancelledError:
            failed("it was called off")
        except (_Refused, XenbusError) as exc:
            failed(str(exc))
        except OSError as exc:
            failed(f"{update.file}: {exc.strerror}")
        finally:
            self._task = None
            if parked:
                await self._host.unpark()

    # -- what has to end first

    async def _await_quiet(self, update: LiveUpdate, end: float) -> None:
        """Transactions go along where the stream can hold them. Others get until `end` to end by themselves;
        then they are dropped (-F), or the update is refused, as xenstored does it."""
        loop = asyncio.get_running_loop()
        introduced = max(end, loop.time() + INTRODUCE_SECONDS)
        while True:
            waiting = self._transactions()
            if (
                not update.conn.closed
                and not self._host.busy
                and (not waiting or (update.force and loop.time() >= end))
            ):
                return
            if update.conn.closed:
                raise _Refused("who asked for it is gone")
            if self._host.busy and loop.time() >= introduced:
                raise _Refused("a domain is being introduced")
            if waiting and loop.time() >= end and not self._host.busy:
                raise _Refused("transactions are open: " + ", ".join(f"domain {domid}" for domid in waiting))
            await asyncio.sleep(LOOK_SECONDS)

    def _transactions(self) -> list[int]:
        engine = self._host.engine
        if engine.profile.portable:
            return []
        return [domid for domid, domain in engine.domains.items() if domain.transactions]

    # -- the trial

    async def _try(self, command: list[str], update: LiveUpdate) -> None:
        """The new program reads the store as it is now. _Refused, with its last words, if it does not."""
        word = uuid.uuid4().hex
        with _memfd(self._stream(update, None)) as state, tempfile.TemporaryDirectory() as nowhere:
            given = {"state": state, "word": word}
            environment = os.environ | {
                TRIAL: json.dumps(given),
                # A program that is not ours must not find a place to serve.
                "XENSTORED_RUNDIR": f"{nowhere}/none",
                "XENSTORED_ROOTDIR": f"{nowhere}/none",
            }
            process = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                pass_fds=[state],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(TRIAL_SECONDS):
                    output, _ = await process.communicate()
            except TimeoutError:
                raise _Refused(f"{update.file}: did not read the store in {TRIAL_SECONDS:g} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        lines = output.decode(errors="replace").split("\n")
        if process.returncode or word not in lines:
            said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            raise _Refused(
                f"{update.file}: does not take the store (exit {process.returncode}): {said[:500]}"
            )

    # -- the step itself

    def _stream(self, update: LiveUpdate, answer: Message | None) -> Iterator[bytes]:
        """Everything. answer: the request that is answered by what comes after it."""
        held = self._host.all_held()
        for one in held:
            if answer is not None and one.conn is update.conn:
                ok = HEADER.pack(answer.op, answer.req_id, answer.tx_id, 3) + b"OK\0"
                one.after = ok
        listener = GlobalData(self._host.listener, self._evtchn_fd)
        portable = self._host.engine.profile.portable
        records = dump(self._host.engine, held, transactions=portable)
        writer = Writer(update.version)
        yield writer.header()
        yield writer.record(listener)
        yield from map(writer.record, records)
        yield writer.end()

    def _become(self, command: list[str], update: LiveUpdate, message: Message) -> None:
        """Nothing else runs from here on. OSError: nothing has changed."""
        host = self._host
        sockets = [one.spec.fd for one in host.all_held() if isinstance(one.spec, Socket)]
        fds = [fd for fd in (*sockets, host.listener, self._evtchn_fd, *self._inherited) if fd >= 0]
        with _memfd(self._stream(update, message)) as state:
            given: dict[str, int | str] = {"state": state}
            fds.append(state)
            if host.keeper is not None:
                host.keeper.commit()
                given |= {"lock": host.keeper.lock_fd, "file": str(host.keeper.path)}
                fds.append(host.keeper.lock_fd)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            kept = {fd: os.get_inheritable(fd) for fd in fds}
            try:
                for fd in fds:
                    os.set_inheritable(fd, True)
                os.execvpe(command[0], command, os.environ | {RESUME: json.dumps(given)})
            finally:
                for fd, inheritable in kept.items():
                    os.set_inheritable(fd, inheritable)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _memfd(pieces: Iterator[bytes]) -> Iterator[int]:
    fd = os.memfd_create("xenstored-state", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.writelines(pieces)
        yield fd
    finally:
        os.close(fd)


def _command(update: LiveUpdate) -> list[str]:
    """As xenstored: the file, and its command line or ours. A Python gets what ours got."""
    file = update.file
    if update.cmdline is not None:
        return [file, *update.cmdline.split()]
    python = os.path.realpath(file) == os.path.realpath(sys.executable) or _PYTHON(Path(file).name)
    return [file, *(sys.orig_argv[1:] if python else sys.argv[1:])]


def problem(file: str) -> str:
    """Why this cannot be the next program; "" if it may be."""
    if not Path(file).is_file():
        return f"{file}: there is no such file"
    return "" if os.access(file, os.X_OK) else f"{file}: it cannot be executed"
