"""The XenStore daemon: a socket for domain 0, rings for guests, in-process connections. asyncio.

Moves bytes between sessions and the engine, and does what the engine asks of its hooks. Knows neither
devices nor how domains are made.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from xenbus.errors import HypervisorError, UsageError, XenbusError
from xenbus.hypervisor.interface import Hypervisor
from xenbus.xenstore.daemon.guests import Guests
from xenbus.xenstore.daemon.keeper import Keeper
from xenbus.xenstore.daemon.session import Session
from xenbus.xenstore.daemon.update import Updater, problem
from xenbus.xenstore.engine import XENSTORED, Connection, Engine, Profile, Quotas, profile_of
from xenbus.xenstore.engine.update import LiveUpdate
from xenbus.xenstore.listener import ACCEPT_PAUSE, Listener, listening
from xenbus.xenstore.state.dump import Held
from xenbus.xenstore.state.image import Image
from xenbus.xenstore.state.journal import JournaledEngine
from xenbus.xenstore.state.load import Restored, load
from xenbus.xenstore.state.records import INBOUND_MAX, Ring, RingPosition, Socket
from xenbus.xenstore.transport import Transport
from xenbus.xenstore.transport.memory import memory_pair
from xenbus.xenstore.transport.unix import UnixTransport
from xenbus.xenstore.wire import Message

_log = logging.getLogger("xenbus.xenstored")

# Clients on the socket at a time; one more is turned away.
MAX_CLIENTS = 1024


class Daemon:
    """A XenStore that can be talked to. Make it inside a running loop.

    hypervisor: the store's own handle, to map guests' rings (INTRODUCE); None: there are no guests, and
                INTRODUCE answers ENOSYS
    quotas:     of guests, unless SET_QUOTA says otherwise
    profile:    which daemon it is like, e.g. "oxenstored"; UsageError for a name that is not there
    keeper:     keeps the store in a file, and has read what is in there
    image:      begin with this store, whatever is in the file. StateError if it makes no sense
    A store that comes from somewhere is there at once; `go_on` serves its domains.
    """

    def __init__(
        self,
        hypervisor: Hypervisor | None = None,
        quotas: Quotas | None = None,
        *,
        profile: Profile | str = XENSTORED,
        keeper: Keeper | None = None,
        image: Image | None = None,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        profile = profile_of(profile) if isinstance(profile, str) else profile
        self.keeper = keeper
        # Set by whoever owns the process.
        self.updater: Updater | None = None
        kind = Engine if keeper is None else JournaledEngine
        self._restored: list[Restored] = []
        self._positions: dict[int, RingPosition] = {}
        # Guests of whom the file has a part of a request or an answer.
        self._under_way: set[int] = set()
        if image is None and keeper is not None:
            image = keeper.image
        if image is None:
            self.engine = kind(quotas, self, profile)
        else:
            store = load(image, lambda: kind(quotas, self, profile))
            self.engine, self._restored, self._positions = store.engine, store.connections, image.positions
        self._loop = asyncio.get_running_loop()
        self._hypervisor = hypervisor
        self._guests = Guests(hypervisor, self)
        self._max_clients = max_clients
        self._sessions: dict[Connection, Session] = {}
        self._stalled: dict[Session, None] = {}
        self._clients = 0
        self._listeners: list[Listener] = []
        self._ticks: set[asyncio.TimerHandle] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: Session | None = None
        self._closed = False
        on_domain_dead = getattr(hypervisor, "on_domain_dead", None)
        if on_domain_dead is not None:
            on_domain_dead(self.domain_died)

    @property
    def drops_events(self) -> bool:
        return self.engine.profile.drops_events

    # ---- who connects ----

    async def listen_unix(self, path: str | os.PathLike[str]) -> None:
        """Domain 0's socket, mode 0600 from the start. UsageError if another daemon answers there, or the
        path is taken by something else."""
        self._listen(listening(path, replace=True))

    def adopt_listener(self, fd: int) -> None:
        """A socket that another process listened at. UsageError if it is none."""
        try:
            sock = socket.socket(fileno=fd)
            os.set_inheritable(fd, False)
            sock.setblocking(False)
            self._listen(sock)
        except OSError as exc:
            raise UsageError(f"descriptor {fd} is no socket to listen at: {exc.strerror}") from exc

    def _listen(self, sock: socket.socket) -> None:
        self._listeners.append(Listener(sock, self._taken, self._not_taken))

    def _taken(self, sock: socket.socket) -> None:
        if self._clients >= self._max_clients:
            _log.warning("a client is turned away: %d are connected", self._clients)
            sock.close()
            return
        self._clients += 1
        self.open_session(0, UnixTransport(sock, "a client on the socket")).start()

    def _not_taken(self, exc: OSError) -> None:
        _log.warning("no client is taken for %g s: %s", ACCEPT_PAUSE, exc.strerror)

    def connect_local(self, domid: int = 0) -> Transport:
        """The client's end of a connection within this process, with the rights of `domid`."""
        near, far = memory_pair(f"a client for domain {domid}")
        self.open_session(domid, far).start()
        return near

    def open_session(self, domid: int, transport: Transport, conn: Connection | None = None) -> Session:
        """A session, not started yet; of a connection that the engine has already, or of a new one."""
        if conn is None:
            conn = self.engine.connect(domid)
        session = self._sessions[conn] = Session(self, conn, transport)
        return session

    def reset(self, session: Session) -> None:
        self.engine.reset(session.conn)
        self.commit()
        self.relieved()

    def ended(self, session: Session, exc: Exception | None) -> None:
        """A session is over: nothing of it stays."""
        if self._sessions.pop(session.conn, None) is None:
            return
        self._stalled.pop(session, None)
        if isinstance(session.transport, UnixTransport):
            self._clients -= 1
        self.engine.disconnect(session.conn)
        if session.conn.guest:
            self.commit()
        self.relieved()

    # ---- requests ----

    def serve(self, session: Session, messages: deque[Message], budget: int) -> None:
        engine, conn = self.engine, session.conn
        handle, guest = engine.handle, conn.guest
        before, self._serving = self._serving, session
        try:
            while messages and budget:
                budget -= 1
                message = messages.popleft()
                try:
                    handle(conn, message)
                except Exception:  # noqa: BLE001
                    # A defect of ours: whoever asked is told, and is not left waiting.
                    _log.exception("%s: %s", session.transport.peer, message)
                    engine.fail(conn, message, "EIO")
                if session.busy or session.closed or (guest and not conn.may_send):
                    break
        finally:
            self._serving = before
        if self.keeper is not None:
            self._kept(session)
            return
        session.pump()
        if engine.dirty or self._stalled:
            self.flush()

    def commit(self) -> None:
        """What changed goes into the file, before anybody is told."""
        if self.keeper is not None:
            self.keeper.commit()

    def _kept(self, session: Session) -> None:
        """As the end of `serve`, with a file: written before anything is sent."""
        domid = session.conn.domid
        noted = domid in self._under_way or (domid and domid in self._journaled().guests)
        self.commit()
        session.pump()
        self.flush()
        if domid and noted:
            self._note(session)
        else:
            self.waits(session)

    def waits(self, session: Session) -> None:
        """A part of a guest's request, and what its ring has no room for, are in the file too."""
        if self.keeper is not None and session.conn.guest and session.under_way:
            self._note(session)

    def _note(self, session: Session) -> None:
        domid = session.conn.domid
        self._under_way.discard(domid)
        if session.under_way:
            self._under_way.add(domid)
        self._journaled().guests[domid] = None
        self.commit()

    def _journaled(self) -> JournaledEngine:
        assert isinstance(self.engine, JournaledEngine)
        return self.engine

    def flush(self) -> None:
        """Send what the engine queued for others."""
        self.commit()
        sessions = self._sessions
        for conn in self.engine.take_dirty():
            session = sessions.get(conn)
            if session is not None:
                session.pump()
        self.relieved()

    def stalled(self, session: Session) -> None:
        self._stalled[session] = None

    def relieved(self) -> None:
        if not self._stalled:
            return
        for session in list(self._stalled):
            if session.conn.may_send:
                del self._stalled[session]
                session.schedule()

    # ---- hooks of the engine ----

    def introduce(self, domid: int, gfn: int, port: int, done: Callable[[str | None], None]) -> None:
        self._introduce(domid, port, done, again=False)

    def rebind(self, domid: int, port: int, done: Callable[[str | None], None]) -> None:
        self._introduce(domid, port, done, again=True)

    def _introduce(self, domid: int, port: int, done: Callable[[str | None], None], *, again: bool) -> None:
        session = self._serving
        if session is not None:
            session.busy = True

        def finished(error: str | None) -> None:
            done(error)
            self.flush()
            if session is not None:
                session.busy = False
                session.schedule()

        self.spawn(self._guests.introduce(domid, port, finished, again=again), f"introduce domain {domid}")

    def release(self, domid: int) -> None:
        self._guests.release(domid)

    def domain_exists(self, domid: int) -> bool:
        """As the hypervisor says; without one that can tell, a toolstack is believed."""
        if self._hypervisor is None:
            return False
        known = getattr(self._hypervisor, "domain_exists", None)
        return True if known is None else bool(known(domid))

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        def called() -> None:
            self._ticks.discard(handle)
            callback()
            self.flush()

        handle = self._loop.call_later(seconds, called)
        self._ticks.add(handle)

    def trouble(self) -> list[str]:
        return [self.keeper.trouble] if self.keeper is not None and self.keeper.trouble else []

    def log(self, text: str) -> None:
        _log.info("%s", text)

    def write_report(self, name: str, text: str) -> bool:
        try:
            # Not blocking: a FIFO that nobody reads must not stop the daemon.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(name, flags, 0o600), "w") as file:
                file.write(text)
        except (OSError, ValueError) as exc:
            _log.warning("no report in %s: %s", name, exc)
            return False
        return True

    # ---- domains ----

    def features(self, domid: int) -> int:
        return self.engine.domain(domid).features

    def target(self, domid: int) -> int | None:
        return self.engine.domain(domid).target

    async def go_on(self, *, sockets: bool = False) -> None:
        """Serve the domains of a store that was loaded, where their rings can be had, and begin to write the
        file. sockets: those of its connections are this process's own now; else they are gone."""
        for restored in self._restored:
            spec = restored.data.spec
            if isinstance(spec, Ring):
                served = await self._serve_again(restored, spec)
            else:
                served = sockets and self._adopt(restored, spec.fd)
            if not served:
                self.engine.disconnect(restored.conn)
        self._restored.clear()
        if self.keeper is not None:
            self.keeper.start(self._journaled(), self._guests)
        # Not before the file can have what they ask for.
        self._guests.carry_on()
        for session in [one for one in self._sessions.values() if one.held]:
            session.carry_on(session.transport)
        self.flush()

    def _adopt(self, restored: Restored, fd: int) -> bool:
        try:
            sock = socket.socket(fileno=fd)
            os.set_inheritable(fd, False)
        except OSError as exc:
            _log.warning("a client is lost: %s", exc)
            return False
        self._clients += 1
        session = self.open_session(0, UnixTransport(sock, "a client on the socket"), restored.conn)
        data = restored.data
        session.prepare(data.inbound, data.outbound[: data.partial])
        return True

    async def _serve_again(self, restored: Restored, spec: Ring) -> bool:
        """False: it stays introduced, but is not served, or is dead by now."""
        domid = spec.domid
        if not domid:
            _log.warning("the ring of domain 0's kernel is not served here")
            return False
        if self._hypervisor is not None and not self.domain_exists(domid):
            self.domain_died(domid)
            return False
        if self._hypervisor is None or not spec.evtchn:
            return False
        position = self._positions.get(domid)
        try:
            await self._guests.go_on(restored, position)
        except (XenbusError, OSError) as exc:
            gone = isinstance(exc, HypervisorError) and exc.name == "ENOENT"
            _log.warning("domain %d is %s: %s", domid, "gone" if gone else "not served any more", exc)
            if gone:
                self.domain_died(domid)
            return False
        if position is not None:
            # Events that were not in the ring yet are lost with the daemon: whoever watches looks again.
            for watch in list(restored.conn.watches.values()):
                self.engine.first_event(restored.conn, watch.path[watch.prefix :], watch.token)
        return True

    def domain_died(self, domid: int) -> None:
        """The domain is gone: @releaseDomain, its nodes, its ring. The hypervisor's event calls this; a
        toolstack without one may."""
        self._guests.release(domid)
        for session in [one for one in self._sessions.values() if one.conn.domid == domid and domid]:
            session.close()
        self.engine.domain_died(domid)
        self.flush()

    def domain_shutdown(self, domid: int) -> None:
        """The domain stopped (suspend, shutdown) but is not gone: @releaseDomain, once until RESUME."""
        self.engine.domain_shutdown(domid)
        self.flush()

    # ---- live update ----

    def update_problem(self, file: str) -> str:
        if self.updater is None:
            return "this daemon is a part of another program, and cannot become one"
        return problem(file)

    def live_update(self, update: LiveUpdate, message: Message, failed: Callable[[str], None]) -> None:
        def answered(text: str) -> None:
            failed(text)
            self.flush()

        assert self.updater is not None
        self.updater.start(update, message, answered)

    def cancel_update(self) -> None:
        if self.updater is not None:
            self.updater.cancel()

    @property
    def busy(self) -> bool:
        """A domain is being introduced or released."""
        return bool(self._tasks)

    @property
    def listener(self) -> int:
        return next((one.fileno() for one in self._listeners), -1)

    async def park(self) -> None:
        await self._guests.park()

    async def unpark(self) -> None:
        await self._guests.unpark()

    def all_held(self) -> list[Held]:
        held = self._guests.all_held()
        for session in list(self._sessions.values()):
            if session.conn.guest:
                continue
            if not isinstance(session.transport, UnixTransport):
                raise UsageError(f"{session.transport.peer} cannot go along")
            while len(session.inbound) > INBOUND_MAX:
                session.shorten()
            unsent, partial = session.unsent
            spec = Socket(session.transport.fileno())
            held.append(Held(session.conn, spec, session.inbound, unsent, partial))
        return held

    def serve_held(self, session: Session, message: Message) -> None:
        before, self._serving = self._serving, session
        try:
            self.engine.handle(session.conn, message)
        finally:
            self._serving = before

    # ---- tasks and the end ----

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = self._loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("%s failed", task.get_name(), exc_info=task.exception())

    async def close(self) -> None:
        """No client is served any more; sockets are unlinked, rings given back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for timer in self._ticks:
            timer.cancel()
        for session in self._sessions.values():
            session.busy = True  # nothing is answered that the file does not have
        if self.keeper is not None:
            await self.keeper.close()
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        await self._guests.close()
        for session in list(self._sessions.values()):
            session.close()
