"""The broker: makes domains and their handles, suspends, resumes and buries them.

Lives in the supervisor's event loop. May know the tables and handles; knows nothing of the store or devices.
A handle that breaks the protocol, or does not read while events pile up, is dropped with a log line; the
others do not notice. What is enforced is enforced by who holds which socket: this separates processes that
make mistakes, it is no sandbox against hostile code under the same user.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable

from xenbus.errors import LinkDown, UsageError
from xenbus.hypervisor.broker_handle import Handle
from xenbus.hypervisor.broker_tables import Domain, Tables
from xenbus.hypervisor.broker_wire import Reserve
from xenbus.hypervisor.interface import Held
from xenbus.hypervisor.limits import Limits, check_domid

log = logging.getLogger(__name__)


class Broker:
    """Make it, and call it, in one running event loop.

    on_dead:    called with the domid after everything the domain held was taken back.
    limits:     what one domain may hold
    max_queued: messages that may wait for a handle that does not read, before it is dropped
    """

    def __init__(
        self,
        on_dead: Callable[[int], None] | None = None,
        *,
        limits: Limits | None = None,
        max_queued: int = 65536,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.max_queued = max_queued
        # An arena costs us a descriptor: half of what the process may open is for everything else.
        self.tables = Tables(limits or Limits(), resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self.touched: dict[Handle, None] = {}
        self.reserve = Reserve(1)  # an arena's
        self._handles: dict[Domain, list[Handle]] = {}
        self._unclaimed: set[Domain] = set()
        self._parked: dict[int, asyncio.Event] = {}
        self._dropping: dict[Handle, str] = {}
        self._settling = False
        self._dead_callbacks = [on_dead] if on_dead is not None else []

    def create(self, domid: int, *, store_domid: int = 0) -> None:
        """Makes the domain, its primary handle, its store ring page (grant 1) and an unbound store port.

        The domain of `store_domid` itself has neither page nor port. UsageError if `domid` is there already.
        """
        if self.tables.exists(check_domid(domid)):
            raise UsageError(f"there is a domain {domid} already")
        domain = Domain(domid, check_domid(store_domid) if store_domid != domid else None)
        self.tables.domains[domid] = domain
        self._handles[domain] = []
        try:
            self._add_handle(domain, False)
            self.tables.build(domain)
        except OSError:  # no descriptor left: as if it had never been asked for
            if self._handles[domain]:
                self.destroy(domid)
            else:
                del self._handles[domain], self.tables.domains[domid]
            raise
        self._unclaimed.add(domain)

    def _add_handle(self, domain: Domain, privileged: bool) -> Handle:
        handle = Handle(self, domain, privileged)
        self._handles[domain].append(handle)
        domain.holders.append(handle.holder)
        return handle

    def _domain(self, domid: int) -> Domain:
        domain = self.tables.domains.get(domid)
        if domain is None:
            raise UsageError(f"there is no domain {domid}")
        return domain

    def handle(self, domid: int, *, privileged: bool = False) -> socket.socket:
        """The process's end of a new handle: give it away and close it here. The first one is the primary:
        the domain is dead at its end of file. A privileged handle is told of deaths."""
        domain = self._domain(domid)
        if domain in self._unclaimed:
            self._unclaimed.discard(domain)
            handle = self._handles[domain][0]
            handle.privileged = privileged
        else:
            handle = self._add_handle(domain, privileged)
        theirs, handle.theirs = handle.theirs, None
        if theirs is None:
            raise UsageError(f"the handle of domain {domid} was given away already")
        return theirs

    def on_domain_dead(self, callback: Callable[[int], None]) -> None:
        self._dead_callbacks.append(callback)

    def destroy(self, domid: int) -> None:
        """Takes the domain down; its process sees end of file. Nothing happens if it is not there."""
        domain = self.tables.domains.get(domid)
        if domain is not None:
            self.drop(self._handles[domain][0], "destroyed")
            self.settle()

    def held(self, domid: int) -> Held:
        return self._domain(domid).held() if self.tables.exists(domid) else Held(0, 0, 0)

    def domids(self) -> tuple[int, ...]:
        return tuple(self.tables.domains)

    def store_port(self, domid: int) -> int:
        """For INTRODUCE. UsageError if the domain has none."""
        port = self._domain(domid).store_port
        if port is None:
            raise UsageError(f"domain {domid} has no store port")
        return port.number

    # -- suspend and resume

    def note_parked(self, domid: int) -> None:
        self._parked.setdefault(domid, asyncio.Event()).set()

    async def suspended(self, domid: int) -> None:
        """Returns when the domain has parked itself; LinkDown if it dies instead. Set a deadline."""
        domain = self._domain(domid)
        await self._parked.setdefault(domid, asyncio.Event()).wait()
        if self.tables.domains.get(domid) is not domain:
            raise LinkDown(f"domain {domid} died before it suspended")

    def parked(self, domid: int) -> bool:
        """Whether the domain is there and has parked itself."""
        domain = self.tables.domains.get(domid)
        return domain is not None and self._handles[domain][0].suspend_serial is not None

    def rename(self, domid: int, new_domid: int) -> None:
        """Gives a parked domain a new id and a fresh ring page and store port; what it held is gone.

        It stays parked, so that a toolstack can introduce it and write its nodes before it goes on. Told to
        privileged handles as the death of the old one, as after `xl restore`; `on_dead` is not called, for
        the process lives.
        """
        primary = self._parked_handle(domid)
        if self.tables.exists(check_domid(new_domid)):
            raise UsageError(f"there is a domain {new_domid} already")
        self._parked[new_domid] = self._parked.pop(domid)
        primary.renamed = True
        self._rename(primary.domain, primary, new_domid)
        self.settle()

    def resume(self, domid: int, *, cancelled: bool | None = None, new_domid: int | None = None) -> None:
        """Lets a parked domain go on: as it was, or, if it was renamed (or is, by `new_domid`), anew."""
        primary = self._parked_handle(domid)
        if cancelled is not None and cancelled == (new_domid is not None or primary.renamed):
            raise UsageError("a resume is either cancelled or has a new domid")
        if new_domid is not None:
            self.rename(domid, new_domid)
            domid = new_domid
        self._parked.pop(domid, None)
        primary.resumed(not primary.renamed)
        self.settle()

    def _parked_handle(self, domid: int) -> Handle:
        primary = self._handles[self._domain(domid)][0]
        if primary.suspend_serial is None:
            raise UsageError(f"domain {domid} is not suspended")
        return primary

    def _rename(self, domain: Domain, primary: Handle, new_domid: int) -> None:
        for handle in self._handles[domain][1:]:
            self.drop(handle, "its domain was restored")
        primary.holder.give_back()
        old = domain.domid
        del self.tables.domains[old]
        domain.domid = new_domid
        self.tables.domains[new_domid] = domain
        self.tables.build(domain)
        self.tables.shed_for(old)
        self._tell_dead(old)

    def _wake_waiters(self, domid: int) -> None:
        if (event := self._parked.pop(domid, None)) is not None:
            event.set()

    # -- the end of handles

    def drop(self, handle: Handle, why: str) -> None:
        """At the next settle(): never in the middle of somebody's request."""
        self._dropping.setdefault(handle, why)

    def settle(self) -> None:
        """Sends what a request or a call has caused, and buries what fell meanwhile."""
        if self._settling:
            return
        self._settling = True
        try:
            while self._dropping or self.touched:
                while self._dropping:
                    handle, why = next(iter(self._dropping.items()))
                    self._bury(handle, why)
                    del self._dropping[handle]
                while self.touched:
                    handle = next(iter(self.touched))
                    del self.touched[handle]
                    if handle.open:
                        handle.flush()
        finally:
            self._settling = False

    def _bury(self, handle: Handle, why: str) -> None:
        if not handle.open:
            return
        domain = handle.domain
        handles = self._handles[domain]
        primary = handle is handles[0]
        log.info("domain %d: %s handle: %s", domain.domid, "primary" if primary else "second", why)
        for fallen in handles[:] if primary else [handle]:
            fallen.close()
            handles.remove(fallen)
            fallen.holder.give_back()
            domain.holders.remove(fallen.holder)
        if primary:
            self._end(domain)

    def _end(self, domain: Domain) -> None:
        del self._handles[domain]
        del self.tables.domains[domain.domid]
        self._unclaimed.discard(domain)
        self._wake_waiters(domain.domid)
        self.tables.shed_for(domain.domid)
        self._tell_dead(domain.domid)
        for callback in self._dead_callbacks:
            try:
                callback(domain.domid)
            except Exception as error:  # noqa: BLE001 - others' callback
                context = {"message": f"on_dead({domain.domid})", "exception": error}
                self.loop.call_exception_handler(context)

    def _tell_dead(self, domid: int) -> None:
        for handles in self._handles.values():
            for handle in handles:
                if handle.privileged and handle.domain.domid != domid:
                    handle.domain_dead(domid)

    async def close(self) -> None:
        """Takes every domain down. Idempotent."""
        for domid in self.domids():
            self.destroy(domid)
        self.reserve.close()
