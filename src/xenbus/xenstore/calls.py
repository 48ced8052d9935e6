"""What can be asked of a store: each operation once, as a value that either client sends in its own way.

Knows payloads and the order of questions; no clock, no session, no I/O. A `Call` is one request and how its
reply is read. A `Program` asks in rounds: it yields calls that go out together, and is sent their outcomes.
client.py, sync.py and batch.py only bind these functions to names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from xenbus.errors import Conflict, Denied, NoEntry, PeerError, StoreError, UsageError, XenbusError
from xenbus.xenstore.wire.codecs import CODECS, NOTHING, data, text
from xenbus.xenstore.wire.message import PAYLOAD_MAX, Op, op_name
from xenbus.xenstore.wire.paths import check_path, join
from xenbus.xenstore.wire.perms import Perm

T = TypeVar("T")
# Text is UTF-8, bytes that are none kept as surrogates.
Path: TypeAlias = str | bytes
Value: TypeAlias = str | bytes | bytearray | memoryview

# The children of one node, as a list of bytes, over however many replies.
LISTING_CAP = 16 << 20
# How often a list that came in parts may have changed meanwhile.
LISTING_RESTARTS = 64
# Nodes of one level that are asked for in one round, and nodes of one walk.
WALK_ROUND = 256
WALK_LIMIT = 1_000_000

_READ = int(Op.READ)
_WRITE = int(Op.WRITE)


class Call(Generic[T]):
    """One request. `tx_id` is set by whoever sends it within a transaction.

    StoreError E2BIG for a payload that the store would hang up on (libxenstore says so too).
    """

    __slots__ = ("op", "parse", "path", "payload", "tx_id")

    def __init__(self, op: int, path: str, payload: bytes, parse: Callable[[bytes], T]) -> None:
        if len(payload) > PAYLOAD_MAX:
            detail = f"{len(payload)} bytes, at most {PAYLOAD_MAX}"
            raise StoreError("E2BIG", op_name(op), path, detail=detail)
        self.op = op
        self.path = path
        self.payload = payload
        self.parse = parse
        self.tx_id = 0


# Yields calls that go out together; is sent, in the same order, what each came to: a result or an error.
Program: TypeAlias = Generator[Sequence[Call[Any]], list[Any], T]


def checked(op: int, path: Path) -> str:
    """`path` as text, or StoreError EINVAL as the store would say, without asking it."""
    try:
        return check_path(path if isinstance(path, str) else text(path))
    except UsageError as exc:
        raise StoreError("EINVAL", op_name(op), str(path), detail=str(exc)) from None


def value_of(outcome: Any) -> Any:
    """The outcome of a call, or its error raised."""
    if isinstance(outcome, XenbusError):
        raise outcome
    return outcome


def _same(payload: bytes) -> bytes:
    return payload


def _of_path(op: Op, path: Path) -> Call[Any]:
    name = checked(op, path)
    return Call(op, name, name.encode() + b"\0", CODECS[op].parse_reply)


def _of_words(op: Op, path: str, *words: Any) -> Call[Any]:
    codec = CODECS[op]
    return Call(op, path, codec.request(*words), codec.parse_reply)


# ---- nodes ----


def read(path: Path) -> Call[bytes]:
    """The node's value."""
    name = checked(_READ, path)
    return Call(_READ, name, name.encode() + b"\0", _same)


def read_str(path: Path) -> Call[str]:
    """The value as text: UTF-8, bytes that are none kept as surrogates."""
    name = checked(_READ, path)
    return Call(_READ, name, name.encode() + b"\0", text)


def write(path: Path, value: Value) -> Call[None]:
    """Makes missing parents, with empty values."""
    name = checked(_WRITE, path)
    # Not bytes(value): that makes NULs of a number.
    octets = data(value) if isinstance(value, str) else memoryview(value)
    return Call(_WRITE, name, name.encode() + b"\0" + octets, _ok)


_ok: Callable[[bytes], None] = CODECS[Op.WRITE].parse_reply


def mkdir(path: Path) -> Call[None]:
    """A node that exists keeps its value."""
    return _of_path(Op.MKDIR, path)


def rm(path: Path) -> Call[None]:
    """The node and all below it. A missing one is fine, a missing parent is NoEntry."""
    return _of_path(Op.RM, path)


def get_perms(path: Path) -> Call[list[Perm]]:
    """The owner's entry first."""
    return _of_path(Op.GET_PERMS, path)


def set_perms(path: Path, perms: Iterable[Perm | str]) -> Call[None]:
    """Entries as `Perm` or as text (`"n5"`, `"r0"`)."""
    name = checked(Op.SET_PERMS, path)
    return _of_words(Op.SET_PERMS, name, name, perms)


def get(path: Path) -> Program[bytes | None]:
    """The node's value; None for NoEntry alone."""
    (found,) = yield [read(path)]
    if isinstance(found, NoEntry):
        return None
    result: bytes = value_of(found)
    return result


def exists(path: Path) -> Program[bool]:
    """False for NoEntry alone; a node that may not be read is an error."""
    return (yield from get(path)) is not None


def gather(
    directory: Path, wanted: Mapping[str, Callable[[bytes], Any]], defaults: Mapping[str, Any] | None = None
) -> Program[dict[str, Any]]:
    """`{name: converter}` read below `directory`, all in one write.

    A missing name is NoEntry unless `defaults` has it; a value that its converter refuses (ValueError)
    is PeerError, naming both.
    """
    base = checked(_READ, directory)
    asked = [read(join(base, name)) for name in wanted]
    outcomes = yield asked
    found: dict[str, Any] = {}
    for (name, convert), call, outcome in zip(wanted.items(), asked, outcomes, strict=True):
        if isinstance(outcome, NoEntry) and defaults is not None and name in defaults:
            found[name] = defaults[name]
            continue
        try:
            found[name] = convert(value_of(outcome))
        except ValueError as exc:
            if isinstance(exc, XenbusError):
                raise
            raise PeerError(f"{call.path}: {outcome!r} is not what belongs there ({exc})") from exc
    return found


# ---- lists ----


class Listing:
    """A list of children that comes in parts (DIRECTORY_PART). `offset` is where to ask on."""

    __slots__ = ("_generation", "_names", "restarts")

    def __init__(self) -> None:
        self._generation = ""
        self._names = b""
        self.restarts = 0

    @property
    def offset(self) -> int:
        return len(self._names)

    def add(self, part: tuple[str, bytes]) -> bool:
        """True when the list is whole. A node that changed meanwhile means: from the start again.
        PeerError for a list over LISTING_CAP."""
        generation, chunk = part
        if self._names and generation != self._generation:
            self._names = b""
            self.restarts += 1
            return False
        self._generation = generation
        self._names += chunk
        if len(self._names) > LISTING_CAP:
            raise PeerError(f"a list of children over {LISTING_CAP} bytes")
        if self._names.endswith(b"\0\0") or self._names == b"\0":
            self._names = self._names[:-1]
            return True
        return not chunk

    def names(self) -> list[str]:
        result: list[str] = CODECS[Op.DIRECTORY].parse_reply(self._names)
        return result


def directory(path: Path) -> Program[list[str]]:
    """The children's names; a list too long for one reply is fetched in parts, of one generation.

    Conflict if it changed LISTING_RESTARTS times before it was whole.
    """
    call = _of_path(Op.DIRECTORY, path)
    (found,) = yield [call]
    return (yield from _whole(call.path, found))


def _whole(path: str, found: Any) -> Program[list[str]]:
    """The list that one DIRECTORY brought, or did not because it is too long."""
    if not (isinstance(found, StoreError) and found.name == "E2BIG"):
        result: list[str] = value_of(found)
        return result
    listing = Listing()
    while True:
        (part,) = yield [_of_words(Op.DIRECTORY_PART, path, path, listing.offset)]
        if listing.add(value_of(part)):
            return listing.names()
        if listing.restarts >= LISTING_RESTARTS:
            detail = f"the list changed {listing.restarts} times while it was read"
            raise Conflict("EAGAIN", "DIRECTORY_PART", path, detail=detail)


class Node(NamedTuple):
    """One node of a walk. `value` is None where it may not be read; `perms` where it was not asked for, or
    may not be read."""

    path: str
    value: bytes | None
    perms: list[Perm] | None = None


def walk(path: Path = "/", perms: bool = False, limit: int = WALK_LIMIT) -> Program[list[Node]]:
    """The node and all below it, parents first, as the store lists them.

    Level by level, one write for up to WALK_ROUND nodes of a level. A node that goes meanwhile is left out;
    what may not be read has None for its value, and no children if they may not be listed. Only in a
    transaction is it the tree of one moment. NoEntry if `path` itself is missing; PeerError past
    `limit` nodes.
    """
    top = checked(_READ, path)
    nodes: dict[str, Node] = {}
    below: dict[str, list[str]] = {}
    level = [top]
    while level:
        following: list[str] = []
        for start in range(0, len(level), WALK_ROUND):
            following += yield from _look(level[start : start + WALK_ROUND], perms, nodes, below)
        if top not in nodes:
            raise NoEntry("ENOENT", "READ", top)
        if len(nodes) > limit:
            raise PeerError(f"more than {limit} nodes at and below {top}")
        level = following
    found, stack = [], [top]
    while stack:
        here = stack.pop()
        if here in nodes:
            found.append(nodes[here])
            stack += reversed(below.get(here, ()))
    return found


def _look(
    paths: Sequence[str], perms: bool, nodes: dict[str, Node], below: dict[str, list[str]]
) -> Program[list[str]]:
    """Values and children of `paths`, put where they belong; the children's paths."""
    step = 3 if perms else 2
    asked: list[Call[Any]] = []
    for path in paths:
        asked += (read(path), _of_path(Op.DIRECTORY, path))
        if perms:
            asked.append(get_perms(path))
    outcomes = yield asked
    children: list[str] = []
    for place, path in enumerate(paths):
        value, names, *rights = outcomes[place * step : (place + 1) * step]
        if any(isinstance(one, NoEntry) for one in (value, names, *rights)):
            continue
        nodes[path] = Node(path, _readable(value), _readable(rights[0]) if rights else None)
        try:
            listed = (yield from _whole(path, names)) if not isinstance(names, Denied) else []
        except NoEntry:
            continue
        below[path] = [join(path, name) for name in listed]
        children += below[path]
    return children


def _readable(outcome: Any) -> Any:
    return None if isinstance(outcome, Denied) else value_of(outcome)


def dump(path: Path = "/") -> Program[dict[str, bytes | None]]:
    """`{path: value}` of the node and all below it: `walk` as a dictionary."""
    return {node.path: node.value for node in (yield from walk(path))}


# ---- several at once ----


def within(program: Program[T], tx_id: int) -> Program[T]:
    """The same questions, asked in a transaction."""
    try:
        calls = next(program)
        while True:
            for call in calls:
                call.tx_id = tx_id
            calls = program.send((yield calls))
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        program.close()


def together(requests: Sequence[Call[Any] | Program[Any]]) -> Program[list[Any]]:
    """Several at once, their rounds side by side: what each came to, a result or an error, in their order."""
    outcomes: list[Any] = [None] * len(requests)
    asking: list[tuple[int, Program[Any] | None, Sequence[Call[Any]]]] = []
    programs = [request for request in requests if not isinstance(request, Call)]
    try:
        for place, request in enumerate(requests):
            if isinstance(request, Call):
                asking.append((place, None, (request,)))
            else:
                _advance(place, request, None, asking, outcomes)
        while asking:
            heard = yield [call for _, _, calls in asking for call in calls]
            before, asking, start = asking, [], 0
            for place, program, calls in before:
                mine = heard[start : start + len(calls)]
                start += len(calls)
                if program is None:
                    outcomes[place] = mine[0]
                else:
                    _advance(place, program, mine, asking, outcomes)
        return outcomes
    finally:
        for program in programs:
            program.close()


def _advance(place: int, program: Program[Any], heard: Any, asking: list[Any], outcomes: list[Any]) -> None:
    try:
        asking.append((place, program, program.send(heard)))
    except StopIteration as end:
        outcomes[place] = end.value
    except XenbusError as exc:
        outcomes[place] = exc


# ---- transactions and watches: what the clients themselves send ----


def start() -> Call[int]:
    return _of_words(Op.TRANSACTION_START, "")


def end(commit: bool) -> Call[None]:
    return _of_words(Op.TRANSACTION_END, "", commit)


def watch(path: Path, token: int, depth: int | None = None) -> Call[None]:
    name = checked(Op.WATCH, path)
    return _of_words(Op.WATCH, name, name, str(token), depth)


def unwatch(path: str, token: int) -> Call[None]:
    return _of_words(Op.UNWATCH, path, path, token)


def reset_watches() -> Call[None]:
    """All watches and transactions of this connection are gone."""
    return _of_words(Op.RESET_WATCHES, "")


# ---- domains and the store itself (dom0's, but for get_domain_path and get_feature) ----


def introduce(domid: int, gfn: int, port: int) -> Call[None]:
    """The store maps the domain's ring page (its grant 1; `gfn` is ignored by ours) and binds `port`."""
    return _of_words(Op.INTRODUCE, str(domid), domid, gfn, port)


def release(domid: int) -> Call[None]:
    """The store forgets the domain, and what is the domain's in it."""
    return _of_words(Op.RELEASE, str(domid), domid)


def is_introduced(domid: int) -> Call[bool]:
    """Whether the store serves the domain."""
    return _of_words(Op.IS_DOMAIN_INTRODUCED, str(domid), domid)


def resume_domain(domid: int) -> Call[None]:
    """@releaseDomain will fire for the domain's next shutdown again."""
    return _of_words(Op.RESUME, str(domid), domid)


def set_target(domid: int, target: int) -> Call[None]:
    """`domid` gets `target`'s rights (a device model's)."""
    return _of_words(Op.SET_TARGET, str(domid), domid, target)


def get_domain_path(domid: int) -> Call[str]:
    """The domain's home, where its relative paths begin."""
    return _of_words(Op.GET_DOMAIN_PATH, str(domid), domid)


def get_feature(domid: int | None = None) -> Call[int]:
    """Bits of XENSTORE_SERVER_FEATURE_*; our own without `domid`."""
    return _of_words(Op.GET_FEATURE, "", *([] if domid is None else [domid]))


def set_feature(domid: int, bits: int) -> Call[None]:
    """Before the domain is introduced."""
    return _of_words(Op.SET_FEATURE, str(domid), domid, bits)


def quota_names() -> Call[list[str]]:
    """The quotas that the store knows."""
    parse = CODECS[Op.GET_QUOTA].parse_reply
    return Call(Op.GET_QUOTA, "", NOTHING, lambda payload: parse(payload).split())


def get_quota(name: str, domid: int | None = None) -> Call[int]:
    """The global value (the default of new domains) without `domid`."""
    codec = CODECS[Op.GET_QUOTA]

    def parse(payload: bytes) -> int:
        value: str = codec.parse_reply(payload)
        if not (value.isascii() and value.isdigit() and len(value) <= 20):
            raise PeerError(f"quota {name}: {value!r} is not a number")
        return int(value)

    return Call(Op.GET_QUOTA, name, codec.request(name, domid), parse)


def set_quota(name: str, value: int, domid: int | None = None) -> Call[None]:
    """0 is no limit."""
    return _of_words(Op.SET_QUOTA, name, name, value, domid)


def control(*words: str) -> Call[str]:
    """A command for the daemon, its answer as text."""
    return _of_words(Op.CONTROL, words[0] if words else "", *words)


# ---- binding ----

_RESULT = re.compile(r"(?:Call|Program)\[(.*)\]")
_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)


def describe(method: Any, make: Callable[..., Any], result: str = "{}") -> Any:
    """`method`, with the name, the text and the signature of the operation that it carries out, for people
    who ask `help`. `result` says what becomes of the operation's own."""
    signature = inspect.signature(make)
    found = _RESULT.fullmatch(str(signature.return_annotation))
    method.__name__ = make.__name__
    method.__qualname__ = make.__name__
    method.__doc__ = make.__doc__
    method.__signature__ = signature.replace(
        parameters=[_SELF, *signature.parameters.values()],
        return_annotation=result.format(found[1] if found else "Any"),
    )
    return method
