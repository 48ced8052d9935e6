"""`xenbus serve`: this domain of a real Xen, served by this process until it is told to end.

Puts together the runtime, its control socket, the burial of dead guests' devices and what systemd wants to
hear. Knows signals and one directory; what a device does is the runtime's.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from xenbus.bus.state import Side, XenbusState
from xenbus.domain.native import Served, native_runtime
from xenbus.domain.readiness import Readiness
from xenbus.domain.rpc import check_socket_path
from xenbus.domain.runtime import DomainRuntime
from xenbus.domain.service import DomainService
from xenbus.errors import UsageError, XenbusError
from xenbus.newbus.runtime import end_task
from xenbus.toolstack.burial import CLOSE_DEADLINE, bury_devices, burying
from xenbus.toolstack.xenhost import run_directory

log = logging.getLogger(__name__)

LAST_BURIAL = CLOSE_DEADLINE + 2.0  # seconds
STATUS_EVERY = 5.0  # seconds between two looks at what `systemctl status` shows
# Why a runtime ends, by signal. After a hand-over the devices stay as they are, for the next process.
SIGNALS = {signal.SIGTERM: "poweroff", signal.SIGINT: "poweroff", signal.SIGUSR1: "handover"}
JOURNALS = ".journals"  # below the run directory; no domain's name begins with a dot
UNIT, SCRIPT = "xenbus.service", "block-xenbus"  # in `files` beside this module


@dataclass(frozen=True, slots=True)
class Serving:
    """served: buses and claims; address: the store's (None: where libxenstore looks); run: our directory."""

    served: Served
    address: str | None = None
    run: Path | None = None


@contextmanager
def only_one(run: Path, name: str) -> Iterator[None]:
    """A lock for the domain: two processes would be two back ends on one ring. UsageError if it is taken."""
    path = run / f".{name}.lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{name} is served already (lock {path})") from None
        yield
    finally:
        os.close(fd)


def make_run_directory(run: Path) -> Path:
    """Mode 0700. UsageError if it can't be had, or is open to others."""
    try:
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = run.stat()
    except OSError as error:
        raise UsageError(f"{run}: {error.strerror}") from None
    if mode.st_uid != os.geteuid() or mode.st_mode & 0o022:
        raise UsageError(f"{run}: others may write there; it has to be ours alone (chmod 700)")
    return run


async def serve(serving: Serving, on_ready: Callable[[DomainRuntime], None]) -> str:
    """Until a signal, or until the store is lost: the reason, a key of `DomainRuntime.ended`.

    on_ready: called once every device that was there has been looked at
    """
    serving.served.check()
    readiness = Readiness()
    run = make_run_directory(serving.run or run_directory())
    served = replace(serving.served, journals=make_run_directory(run / JOURNALS))
    runtime = await native_runtime(served, serving.address)
    loop = asyncio.get_running_loop()
    with only_one(run, runtime.name):
        for number, reason in SIGNALS.items():
            loop.add_signal_handler(number, runtime.end, reason)
        service = DomainService(runtime, {"serves": served.types()})
        async with AsyncExitStack() as stack:
            stack.push_async_callback(_stop, runtime)
            stack.push_async_callback(service.close)
            await stack.enter_async_context(readiness.watchdog())
            await service.serve(check_socket_path(run / runtime.name))
            await runtime.start()
            await stack.enter_async_context(_around(runtime, served, readiness))
            on_ready(runtime)
            readiness.ready(status_line(runtime))
            reason = await runtime.ended
            log.info("ending: %s", reason)
            readiness.stopping("handing over" if reason == "handover" else "closing devices")
    return reason


async def _stop(runtime: DomainRuntime) -> None:
    await runtime.stop(handover=runtime.ended.done() and runtime.ended.result() == "handover")
    await runtime.hv.close()  # another one than at the start, if this domain was restored meanwhile


@asynccontextmanager
async def _around(runtime: DomainRuntime, served: Served, readiness: Readiness) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(_tell(runtime, readiness), name="status")]
    kinds = served.types().get(Side.BACK.value, [])
    tasks.append(asyncio.create_task(burying(runtime.store, kinds), name="burial"))
    try:
        yield
    finally:
        for task in tasks:
            await end_task(task)
        await _last_burial(runtime, kinds)


async def _last_burial(runtime: DomainRuntime, kinds: Sequence[str]) -> None:
    """Whose guest went a moment ago; what is left of it would stay until the next process comes."""
    if runtime.ended.done() and runtime.ended.result() == "lost":
        return
    try:
        async with asyncio.timeout(LAST_BURIAL):
            await bury_devices(runtime.store, kinds)
    except (XenbusError, TimeoutError) as error:
        log.warning("clearing up after dead guests: %s", error)


async def _tell(runtime: DomainRuntime, readiness: Readiness) -> None:
    last = ""
    while True:
        await asyncio.sleep(STATUS_EVERY)
        if (text := status_line(runtime)) != last:
            readiness.status(text)
            last = text


def status_line(runtime: DomainRuntime) -> str:
    devices = [dev for bus in runtime.buses for dev in bus.devices.values()]
    connected = sum(dev.state is XenbusState.CONNECTED for dev in devices)
    return f"{runtime.name}: {len(devices)} devices, {connected} connected"


def unit_text(command: str) -> str:
    """The systemd unit, for this command line. XenbusError if it was not installed with us."""
    return _text(UNIT).replace("@COMMAND@", command)


def script_text() -> str:
    """The hotplug script for disks of an xl configuration."""
    return _text(SCRIPT)


def _text(name: str) -> str:
    # Not by Path: from a zip (xenbus.pyz) there are no files.
    from importlib.resources import files

    try:
        return (files("xenbus.toolstack") / "files" / name).read_text()
    except OSError as error:
        raise XenbusError(f"{name}: {error}") from error
