"""Which daemon the engine is like: `xenstored` (the default) or `oxenstored`, as tables. Pure.

An engine takes its profile when it is made and looks at nothing else: no operation asks which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from xenbus.errors import UsageError
from xenbus.xenstore.engine import control, domains, nodes, oxenstored, sessions
from xenbus.xenstore.engine.connection import FEATURE_RECONNECTION, FEATURES, Connection
from xenbus.xenstore.engine.dispatch import Fail, Handler, unknown
from xenbus.xenstore.engine.quotas import Quotas
from xenbus.xenstore.engine.watches import WatchIndex
from xenbus.xenstore.wire import DOMID_ANY, Message, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine


def _refused(engine: Engine, conn: Connection, message: Message, tx: Any) -> bytes:
    raise Fail("EACCES")


def _table(
    handlers: Iterable[Mapping[int, Handler]], refused: Iterable[int] = (), unknown: Handler = unknown
) -> list[Handler]:
    """Handlers by operation number."""
    table: list[Handler] = [unknown] * (max(Op) + 1)
    for room in handlers:
        for op, handler in room.items():
            table[op] = handler
    for op in refused:
        table[op] = _refused
    return table


@dataclass(frozen=True, slots=True)
class Profile:
    """One daemon's ways.

    dom0, guest:  handlers by operation number
    unknown:      the handler of every other number
    always_fail:  handlers that fail as they do whatever transaction is named
    no_transaction: the error for a transaction that is not there
    everybody:    domids that stand for each domain in permissions
    features:     the word that a ring page offers, and GET_FEATURE answers
    long_replies: a socket gets replies over 4096 bytes; a ring gets E2BIG, whatever this is
    accounting:   every node is counted for its owner, and its bytes are memory of its owner
    drops_events: those that a guest has not taken for a while
    portable:     open transactions fit into the record stream (state/dump.py)
    watches:      makes the index of watches
    plant:        makes the tree that it starts with
    introduced, died, shutdown: what happens to the engine when a domain is introduced, is gone, has stopped
    limits:       quotas that differ from xenstored's
    names:        other names of quotas -> ours
    """

    name: str
    dom0: list[Handler]
    guest: list[Handler]
    unknown: Handler
    always_fail: tuple[Handler, ...]
    no_transaction: str
    everybody: tuple[int, ...]
    features: int
    long_replies: bool
    accounting: bool
    drops_events: bool
    portable: bool
    watches: Callable[[], WatchIndex]
    plant: Callable[[Engine], Any]
    introduced: Callable[[Engine, int], None]
    died: Callable[[Engine, int], None]
    shutdown: Callable[[Engine, int], None]
    limits: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def quotas(self, values: Mapping[str, int] | None = None) -> Quotas:
        """The limits of a guest. `values` go by our names or this daemon's own. UsageError as by Quotas."""
        given = {self.names.get(name, name): value for name, value in (values or {}).items()}
        return Quotas({**self.limits, **given})

    def parse_quotas(self, words: Iterable[str]) -> Quotas:
        """From `name=value` words of a command line. UsageError names the word that is wrong."""
        return self.quotas(Quotas.parse_words(words))


_ROOMS = (nodes.HANDLERS, sessions.HANDLERS, domains.HANDLERS, control.HANDLERS)

XENSTORED = Profile(
    name="xenstored",
    dom0=_table(_ROOMS),
    guest=_table(_ROOMS, domains.DOM0_ONLY),
    unknown=unknown,
    always_fail=(unknown, _refused),
    no_transaction="ENOENT",
    everybody=(DOMID_ANY,),
    features=FEATURES,
    long_replies=False,
    accounting=True,
    drops_events=True,
    portable=True,
    watches=WatchIndex,
    plant=domains.plant,
    introduced=domains.introduced,
    died=domains.died,
    shutdown=domains.shutdown,
)

OXENSTORED = Profile(
    name="oxenstored",
    dom0=_table([oxenstored.HANDLERS], unknown=oxenstored.UNKNOWN),
    guest=_table([oxenstored.HANDLERS], unknown=oxenstored.UNKNOWN),
    unknown=oxenstored.UNKNOWN,
    always_fail=(),
    no_transaction="EIO",
    everybody=(),
    features=FEATURE_RECONNECTION,
    long_replies=True,
    accounting=False,
    drops_events=False,
    portable=False,
    watches=oxenstored.WatchTrie,
    plant=oxenstored.plant,
    introduced=oxenstored.introduced,
    died=oxenstored.died,
    shutdown=oxenstored.shutdown,
    limits=oxenstored.LIMITS,
    names=oxenstored.NAMES,
)

PROFILES: Mapping[str, Profile] = MappingProxyType({one.name: one for one in (XENSTORED, OXENSTORED)})


def profile_of(name: str) -> Profile:
    """UsageError for a name that is not there."""
    if name not in PROFILES:
        raise UsageError(f"no profile {name!r}; there are {', '.join(PROFILES)}")
    return PROFILES[name]
