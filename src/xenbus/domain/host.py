"""The supervisor of an embedded host: what hypervisor and domain builder are on a real one.

Holds the broker, starts the store daemon, domain 0 and the guests as processes, and buries them. Serves
a control socket that is to the toolstack what domctl is to libxl. It never looks into the store: nodes
are the toolstack's business.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from xenbus.domain.child import STOP_DEADLINE, Child
from xenbus.domain.layout import CONTROL_DOMAIN, HostLayout, check_name
from xenbus.domain.logs import keep_bounded, last_words
from xenbus.domain.rpc import Call, RpcServer, check_socket_path
from xenbus.errors import DeadlineError, LinkDown, NotFound, UsageError, XenbusError
from xenbus.hypervisor.broker import Broker
from xenbus.hypervisor.interface import DOMID_FIRST_RESERVED

log = logging.getLogger(__name__)

START_DEADLINE = 20.0  # seconds until a process of ours has to be ready
LOCK_PATIENCE = 10.0  # seconds that processes of a host that was killed have to end
STORE = "xenstored"  # its name in logs; it has no domain of its own
DOMAINS_MAX = 1000


class DomainState(StrEnum):
    """A domain's life as `xl list` shows it, in words."""

    PAUSED = "paused"
    RUNNING = "running"
    SUSPENDED = "suspended"
    SHUTDOWN = "shutdown"


class ExitCode:
    """How a domain process tells why it ended (sched.h, SHUTDOWN_poweroff and the rest)."""

    POWEROFF = 0
    REBOOT = 90
    LOST_HOST = 91


_REASONS = {ExitCode.POWEROFF: "poweroff", ExitCode.REBOOT: "reboot", ExitCode.LOST_HOST: "lost"}


@dataclass(slots=True)
class Domain:
    domid: int
    name: str
    state: DomainState = DomainState.PAUSED
    reason: str = ""
    process: Child | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def describe(self) -> dict[str, object]:
        pid = self.process.pid if self.process and self.alive else None
        return {
            "domid": self.domid,
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "pid": pid,
        }


@dataclass(slots=True)
class _Starting:
    """A process that was started and has yet to say "ready" on a pipe."""

    name: str
    child: Child
    pipe: int
    log: Path

    async def ready(self) -> None:
        """XenbusError with its last words if it ends instead; it does not live on after an error."""
        try:
            line = await self._first_line()
        except BaseException:
            await self.child.end(kill=True)
            raise
        if line.strip() != b"ready":
            await self.child.end(kill=True)
            raise XenbusError(f"{self.name} did not start: {last_words(self.log)}")

    async def _first_line(self) -> bytes:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self.pipe, "rb", buffering=0)
        )
        try:
            async with asyncio.timeout(START_DEADLINE):
                return await reader.readline()
        except TimeoutError:
            raise DeadlineError(
                f"{self.name} to be ready", f"its process; see {self.log}", START_DEADLINE
            ) from None
        finally:
            transport.close()


class Host:
    """One embedded host. `await start()`, then `await stop()`; between them the control socket is served."""

    def __init__(
        self,
        root: Path,
        *,
        quotas: Mapping[str, int] | None = None,
        control_module: str = "xenbus.toolstack.dom0",
        guest_module: str = "xenbus.domain.process",
        verbose: bool = False,
    ) -> None:
        self.layout = HostLayout(root)
        self.quotas = dict(quotas or {})
        self.broker = Broker(on_dead=self._on_dead)
        self.domains: dict[int, Domain] = {}
        self._control_module = control_module
        self._guest_module = guest_module
        self._verbose = verbose
        self._next_domid = 1
        self._store: _Starting | None = None
        self._watchers: set[asyncio.Task[None]] = set()
        self.failed = asyncio.Event()  # the store daemon or domain 0 ended by itself
        self.failure = ""
        self._stopping = False
        self._lock: int | None = None
        self._rpc = RpcServer(
            {
                "list": self._rpc_list,
                "create": self._rpc_create,
                "unpause": self._rpc_unpause,
                "destroy": self._rpc_destroy,
                "wait_suspended": self._rpc_wait_suspended,
                "rebirth": self._rpc_rebirth,
                "resume": self._rpc_resume,
                "wait_ended": self._rpc_wait_ended,
                "held": self._rpc_held,
                "processes": self._rpc_processes,
            }
        )

    # -- start and stop ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Store daemon and domain 0 up and ready. XenbusError with the log's last lines if not."""
        self.layout.make()
        self._lock = await self._take_lock()
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _take_lock(self) -> int:
        """UsageError if a host runs here. The processes of one that was killed are waited for: they see its
        end and go, but a socket of theirs must not be in our way meanwhile, nor ours in theirs."""
        loop = asyncio.get_running_loop()
        end = loop.time() + LOCK_PATIENCE
        while True:
            try:
                return self.layout.lock()
            except BlockingIOError:
                if await self._somebody_answers():
                    raise UsageError(f"{self.layout.root}: a host runs there already") from None
                if loop.time() > end:
                    raise DeadlineError(
                        f"{self.layout.root}/lock", "a process of a host that was there before", LOCK_PATIENCE
                    ) from None
            await asyncio.sleep(0.02)

    async def _somebody_answers(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(self.layout.host_socket)
        except OSError:
            return False
        writer.close()
        return True

    async def _start(self) -> None:
        self._watch(keep_bounded(self.layout.root / "log"))
        control = Domain(0, CONTROL_DOMAIN)
        self.domains[0] = control
        self.broker.create(0)
        # Domain 0's runtime takes the first handle: the domain lives as long as that one (architecture, 12).
        control_handle = self.broker.handle(0, privileged=True)
        with self.broker.handle(0, privileged=True) as handle:
            arguments = ["--socket", str(self.layout.store_socket), "--broker-fd", str(handle.fileno())]
            for name, value in self.quotas.items():
                arguments += ["--quota", f"{name}={value}"]
            self._store = self._spawn(STORE, "xenbus.xenstore.daemon", arguments, [handle.fileno()])
        await self._store.ready()
        self._watch(self._store_ended(self._store.child))
        await self._rpc.serve(self.layout.host_socket)
        with control_handle:
            await self._launch(control, self._control_module, control_handle.fileno())

    async def stop(self) -> None:
        """Guests first, then domain 0, then the store: nobody outlives what it stands on. Idempotent."""
        self._stopping = True  # from here on nothing is created
        guests = [d.process for d in self.domains.values() if d.domid != 0 and d.process]
        # Without store or domain 0 no guest can close its devices in order: it would wait for nobody.
        await asyncio.gather(*(process.end(kill=bool(self.failure)) for process in guests))
        if (control := self.domains.get(0)) and control.process:
            await control.process.end()
        if self._store is not None:
            await self._store.child.end()
        await self._rpc.close()
        for task in list(self._watchers):
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self.broker.close()
        self.domains.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- processes -----------------------------------------------------------------------------------

    def _spawn(self, name: str, module: str, arguments: list[str], fds: list[int]) -> _Starting:
        """Start `python -m module`, which says when it is ready."""
        ready_read, ready_write = os.pipe()
        try:
            with self.layout.log(name).open("ab") as log_file:
                child = Child(
                    [sys.executable, "-m", module, *arguments, "--ready-fd", str(ready_write)],
                    output=log_file,
                    pass_fds=[*fds, ready_write, *([self._lock] if self._lock is not None else [])],
                    environment=os.environ | ({"XENBUS_LOG": "DEBUG"} if self._verbose else {}),
                )
        except OSError as error:
            os.close(ready_read)
            raise XenbusError(f"{name} did not start: {error}") from error
        finally:
            os.close(ready_write)
        return _Starting(name, child, ready_read, self.layout.log(name))

    async def _launch(self, domain: Domain, module: str, handle_fd: int) -> None:
        arguments = ["--broker-fd", str(handle_fd), "--name", domain.name, "--host", str(self.layout.root)]
        domain.state = DomainState.RUNNING
        starting = self._spawn(domain.name, module, arguments, [handle_fd])
        # Known and watched from now on: it can be destroyed while it boots.
        domain.process = starting.child
        self._watch(self._domain_ended(domain, starting.child))
        await starting.ready()

    def _watch(self, coroutine: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(coroutine)  # type: ignore[call-overload]
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    async def _domain_ended(self, domain: Domain, process: Child) -> None:
        code = await process.wait()
        domain.state = DomainState.SHUTDOWN
        domain.reason = _REASONS.get(code, f"crash, {_cause(code)}")
        domain.ended.set()
        log.info("domain %d (%s) ended: %s", domain.domid, domain.name, domain.reason)
        if domain.domid == 0:
            self._fail(f"domain 0 ended: {domain.reason}: {last_words(self.layout.log(domain.name))}")

    async def _store_ended(self, process: Child) -> None:
        code = await process.wait()
        self._fail(f"the store daemon ended ({_cause(code)}): {last_words(self.layout.log(STORE))}")

    def _fail(self, why: str) -> None:
        if not self._stopping:
            self.failure = why
            log.error("%s", why)
            self.failed.set()

    def _on_dead(self, domid: int) -> None:
        """The broker saw the end of a domain's handle: the domain is dead, whatever its process does."""
        domain = self.domains.get(domid)
        if domain is None:
            return
        domain.state = DomainState.SHUTDOWN
        if domain.process is None:
            domain.ended.set()
        else:
            self._watch(self._reap(domain.process))

    async def _reap(self, process: Child) -> None:
        """A process that let go of its domain is about to end; its exit code tells why, so it may."""
        try:
            async with asyncio.timeout(STOP_DEADLINE):
                await process.wait()
        except TimeoutError:
            await process.end(kill=True)

    # -- the control socket --------------------------------------------------------------------------

    def _find(self, call: Call) -> Domain:
        domid = call.number("domid")
        domain = self.domains.get(domid)
        if domain is None:
            raise NotFound(f"no domain {domid}")
        return domain

    def _guest(self, call: Call) -> Domain:
        domain = self._find(call)
        if domain.domid == 0:
            raise UsageError("domain 0 is the host's own; end it with the host")
        return domain

    async def _rpc_list(self, call: Call) -> object:
        return [self._describe(domain) for domain in self.domains.values()]

    def _describe(self, domain: Domain) -> dict[str, object]:
        """A domain parks itself when it likes, whether or not somebody waits for it."""
        if domain.state is DomainState.RUNNING and self.broker.parked(domain.domid):
            domain.state = DomainState.SUSPENDED
        return domain.describe()

    async def _rpc_processes(self, call: Call) -> object:
        """pids by name, the supervisor's and the store's too: an operator's `ps`."""
        pids = {d.name: d.process.pid for d in self.domains.values() if d.process and d.alive}
        return {"supervisor": os.getpid(), STORE: self._store.child.pid if self._store else None, **pids}

    async def _rpc_create(self, call: Call) -> object:
        """A domain without a process: its ring page and store port exist, so that it can be introduced."""
        name = check_name(call.text("name"))
        check_socket_path(self.layout.control_socket(name))
        if self._stopping:
            raise UsageError("the host is about to end")
        if name == STORE or any(domain.name == name for domain in self.domains.values()):
            raise UsageError(f"{name}: a domain of that name exists")
        if len(self.domains) >= DOMAINS_MAX:
            raise UsageError(f"{DOMAINS_MAX} domains are the most that one host holds")
        domid = self._take_domid()
        self.broker.create(domid)
        self.domains[domid] = Domain(domid, name)
        return {"domid": domid, "store_port": self.broker.store_port(domid)}

    def _take_domid(self) -> int:
        """As Xen: upwards, and round again before the reserved ids; never 0 and never one in use."""
        while True:
            domid, self._next_domid = self._next_domid, (self._next_domid + 1) % DOMID_FIRST_RESERVED or 1
            if domid not in self.domains:
                return domid

    async def _rpc_unpause(self, call: Call) -> object:
        domain = self._guest(call)
        if domain.state is not DomainState.PAUSED or self._stopping:
            why = "the host is about to end" if self._stopping else f"it is {domain.state}, not paused"
            raise UsageError(f"domain {domain.domid} can't be started: {why}")
        with self.broker.handle(domain.domid) as handle:
            await self._launch(domain, self._guest_module, handle.fileno())
        return domain.describe()

    async def _rpc_destroy(self, call: Call) -> object:
        domain = self._guest(call)
        if domain.process is not None:
            await domain.process.end(kill=True)
        self.broker.destroy(domain.domid)
        self.domains.pop(domain.domid, None)
        return None

    async def _rpc_wait_suspended(self, call: Call) -> object:
        domain = self._guest(call)
        seconds = call.seconds("seconds", 30.0)
        if not domain.alive:
            raise UsageError(f"domain {domain.domid} ({domain.name}) is {domain.state}: it can't suspend")
        try:
            async with asyncio.timeout(seconds):
                await self.broker.suspended(domain.domid)
        except TimeoutError:
            raise DeadlineError("the suspend", f"domain {domain.domid} ({domain.name})", seconds) from None
        except LinkDown as error:
            raise XenbusError(str(error)) from None  # the domain's end, not the host's
        return self._describe(domain)

    async def _rpc_rebirth(self, call: Call) -> object:
        """A suspended domain gets another domid, as `xl restore` gives it; it stays suspended."""
        domain = self._suspended(call)
        old, new = domain.domid, self._take_domid()
        self.broker.rename(old, new)
        # The process goes on, so its record does: only the number is another.
        del self.domains[old]
        domain.domid = new
        self.domains[new] = domain
        return {"domid": new, "store_port": self.broker.store_port(new)}

    async def _rpc_resume(self, call: Call) -> object:
        """Go on: as it was (the suspend was cancelled), or anew after a rebirth."""
        domain = self._suspended(call)
        self.broker.resume(domain.domid)
        domain.state = DomainState.RUNNING
        return domain.describe()

    def _suspended(self, call: Call) -> Domain:
        domain = self._guest(call)
        self._describe(domain)
        if domain.state is not DomainState.SUSPENDED:
            raise UsageError(f"domain {domain.domid} is {domain.state}, not suspended")
        return domain

    async def _rpc_wait_ended(self, call: Call) -> object:
        domain = self._guest(call)
        seconds = call.seconds("seconds", 30.0)
        try:
            async with asyncio.timeout(seconds):
                await domain.ended.wait()
        except TimeoutError:
            raise DeadlineError(
                "the domain's end", f"domain {domain.domid} ({domain.name})", seconds
            ) from None
        return domain.describe()

    async def _rpc_held(self, call: Call) -> object:
        """What each domain holds of the hypervisor: pages, mappings, ports."""
        held = {domid: self.broker.held(domid) for domid in self.domains}
        return {
            str(domid): {"granted_pages": h.granted_pages, "mapped_pages": h.mapped_pages, "ports": h.ports}
            for domid, h in held.items()
        }


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
