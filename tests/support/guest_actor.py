"""The conformance suite's rig over real domains: dom0 here, the suite's domains 1 and 2 in Python guests.

The suite numbers its domains 0, 1 and 2; each rig puts the guests' real numbers in place. No test here.
"""

from __future__ import annotations

from tests.support.real_xen import QuietHandle, SelfActor
from tests.support.xl_guest import GuestError, PythonGuest
from xenbus import errors
from xenbus.hypervisor.interface import Held

# In the guest's namespace.
BEGIN = """
from tests.support.guest_actor import FarActor
actor = FarActor(domid, dict(numbers))
"""
CALL = """
[await getattr(actor, verb)(*args), await actor.held()]
"""


class FarActor(SelfActor):
    """A SelfActor in a guest: `numbers` are the suite's domains and what they are here."""

    def __init__(self, domid: int, numbers: dict[int, int]) -> None:
        super().__init__(QuietHandle(domid), None)
        self._numbers = numbers

    def _real(self, domid):
        return self._numbers.get(domid, domid)


class GuestActor:
    """The verbs of an Actor, done in a guest. `known` is what its handle held after the last of them."""

    def __init__(self, guest: PythonGuest) -> None:
        self._guest = guest
        self.known = Held(0, 0, 0)

    def __getattr__(self, verb):
        async def call(*args):
            try:
                value, held = await self._guest.call(CALL, verb=verb, args=[*args])
            except GuestError as error:
                raise _as_here(error) from error
            self.known = Held(*held)
            return value

        return call

    async def close(self) -> None:
        await self._guest.call("await actor.close()\ndel actor")


def _as_here(error: GuestError) -> Exception:
    if error.kind == "HypervisorError":
        what, _, name = error.said.rpartition(": ")
        return errors.HypervisorError(name, what)
    kind = {"TypeError": TypeError, "ValueError": ValueError}.get(error.kind) or getattr(
        errors, error.kind, None
    )
    return kind(error.said) if kind else error


class TwoDomainRig:
    """`host` is what the suite asks for counts."""

    not_ours = "ENOENT"

    def __init__(self, guests: list[PythonGuest]) -> None:
        self.host = self
        self.numbers = {0: 0} | {n: guest.domid for n, guest in enumerate(guests, 1)}
        self._guests = guests
        self.actors: dict[int, GuestActor | FarActor] = {}

    async def domain(self, domid, privileged=False):
        if domid == 0:
            self.actors[0] = FarActor(0, self.numbers)
        else:
            guest = self._guests[domid - 1]
            await guest.call(BEGIN, domid=guest.domid, numbers=[*self.numbers.items()])
            self.actors[domid] = GuestActor(guest)
        return self.actors[domid]

    def held(self, domid) -> Held:
        """A guest's with the page and the port for the store that its builder made, as the suite counts."""
        actor = self.actors[domid]
        if isinstance(actor, FarActor):
            return actor.hv.held()
        return Held(actor.known.granted_pages + 1, actor.known.mapped_pages, actor.known.ports + 1)

    def store_port(self, domid) -> int:
        """Of a guest: the first port that the builder allocates."""
        return 1

    async def close(self) -> None:
        for actor in self.actors.values():
            await actor.close()
