"""CONTROL: what a person asks the daemon itself (xenstore-control). Pure.

Follows control.c of xenstored; a word that is not known is EINVAL there and here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xenbus.errors import UsageError
from xenbus.xenstore.engine.connection import Connection
from xenbus.xenstore.engine.dispatch import Fail, Handler, words_of
from xenbus.xenstore.engine.quotas import QUOTAS
from xenbus.xenstore.engine.transactions import Transaction
from xenbus.xenstore.engine.tree import child_path, parent_of
from xenbus.xenstore.engine.update import live_update
from xenbus.xenstore.wire import Message, Op

if TYPE_CHECKING:
    from xenbus.xenstore.engine.engine import Engine

LOG_SWITCHES = ("io", "quota")
_SOFT = "soft-"
LIVE_UPDATE = "live-update"


def _check(engine: Engine, words: list[str]) -> str:
    if words:
        raise Fail("EINVAL")
    wrong = inconsistencies(engine)
    if engine.hooks is not None:
        wrong += engine.hooks.trouble()
    return "OK" if not wrong else "\n".join(wrong[:20])


def _log(engine: Engine, words: list[str]) -> str:
    if not words:
        states = (f"{name:<8}: {'on' if on else 'off'}\n" for name, on in engine.log_switches.items())
        return "Log switch settings:\n" + "".join(states)
    if len(words) != 1:
        raise Fail("EINVAL")
    (word,) = words
    if word in ("on", "off"):
        engine.logging = word == "on"
    elif word[:1] in ("+", "-") and word[1:] in engine.log_switches:
        engine.log_switches[word[1:]] = word[0] == "+"
    else:
        raise Fail("EINVAL")
    return "OK"


def _memreport(engine: Engine, words: list[str]) -> str:
    if len(words) > 1:
        raise Fail("EINVAL")
    lines = [
        f"generation {engine.generation}",
        f"nodes {len(engine.nodes)}",
        f"watches {sum(map(len, engine.watches.by_path.values()))}",
    ]
    for domid, domain in sorted(engine.domains.items()):
        queued = sum(conn.queued for conn in domain.connections)
        lines.append(
            f"domain {domid}: nodes {domain.nodes} watches {domain.watches} transactions "
            f"{domain.transactions} memory {domain.memory} "
            f"connections {len(domain.connections)} queued {queued}"
        )
    report = "\n".join(lines) + "\n"
    if not words:
        return report[:4000]
    if engine.hooks is None or not engine.hooks.write_report(words[0], report):
        raise Fail("EINVAL")
    return "OK"


def _print(engine: Engine, words: list[str]) -> str:
    if len(words) != 1:
        raise Fail("EINVAL")
    if engine.hooks is not None:
        engine.hooks.log(f"control: {words[0]}")
    return "OK"


def _is_number(word: str) -> bool:
    """Decimal digits: of ASCII, which str.isdigit alone does not say, and not thousands of them."""
    return word.isascii() and word.isdigit() and len(word) <= 20


def _usage(engine: Engine, domid: int) -> dict[str, int]:
    domain = engine.domains.get(domid)
    if domain is None:
        raise Fail("ENOENT")
    return {
        "nodes": domain.nodes,
        "watches": domain.watches,
        "transactions": domain.transactions,
        "outstanding": sum(conn.outstanding for conn in domain.connections),
        "memory": domain.memory,
    }


def _quota_set(engine: Engine, words: list[str], prefix: str) -> str:
    if len(words) != 2 or not _is_number(words[1]) or not int(words[1]):
        raise Fail("EINVAL")
    name, value = prefix + words[0], int(words[1])
    if name == "permissions":
        name = "node-permissions"  # what it is called in 4.17
    try:
        engine.quotas.set(name, value)
    except UsageError:
        raise Fail("EINVAL") from None
    # As in 4.17, for those that are there as well.
    for domain in engine.domains.values():
        domain.quotas.set(name, value)
    return "OK"


def _quota_list(engine: Engine, *, soft: bool) -> str:
    rows = (
        f"{name.removeprefix(_SOFT):<17}: {engine.quotas.get(name):8d} {text}\n"
        for name, (_, text) in QUOTAS.items()
        if name.startswith(_SOFT) == soft
    )
    return "Quota settings:\n" + "".join(rows)


def _quota(engine: Engine, words: list[str]) -> str:
    if not words:
        return _quota_list(engine, soft=False)
    if words[0] == "set":
        return _quota_set(engine, words[1:], "")
    if words[0] == "max":
        return _quota_max(engine, words[1:])
    if len(words) != 1 or not _is_number(words[0]):
        raise Fail("EINVAL")
    rows = (f"{name:<16}: {value:8d}\n" for name, value in _usage(engine, int(words[0])).items())
    return f"Domain {int(words[0])}:\n" + "".join(rows)


def _quota_max(engine: Engine, words: list[str]) -> str:
    if words not in ([], ["-r"]):
        raise Fail("EINVAL")
    if words:
        engine.maxima.clear()
    for domid in engine.domains:
        if domid:
            for name, value in _usage(engine, domid).items():
                engine.maxima[name] = max(value, engine.maxima.get(name, 0))
    rows = (f"{name:<17}: {value:8d}\n" for name, value in engine.maxima.items())
    return "Max. seen accounting values:\n" + "".join(rows)


def _quota_soft(engine: Engine, words: list[str]) -> str:
    if not words:
        return _quota_list(engine, soft=True)
    if words[0] != "set":
        raise Fail("EINVAL")
    return _quota_set(engine, words[1:], _SOFT)


def _help(engine: Engine, words: list[str]) -> str:
    if words:
        raise Fail("EINVAL")
    return "".join(f"{name:<15} {parameters}\n" for name, (_, parameters) in _COMMANDS.items())


_COMMANDS: dict[str, tuple[Callable[[Engine, list[str]], str], str]] = {
    "check": (_check, ""),
    "log": (_log, "[on|off|+<switch>|-<switch>]"),
    LIVE_UPDATE: (_help, "[-c <cmdline>] [-F] [-t <timeout>] <file>"),
    "memreport": (_memreport, "[<file>]"),
    "print": (_print, "<string>"),
    "quota": (_quota, "[set <name> <val>|<domid>|max [-r]]"),
    "quota-soft": (_quota_soft, "[set <name> <val>]"),
    "help": (_help, ""),
}


def control(engine: Engine, conn: Connection, message: Message, tx: Transaction | None) -> bytes | None:
    words = [word.decode("utf-8", "replace") for word in words_of(message.payload)]
    if not words or words[0] not in _COMMANDS:
        raise Fail("EINVAL")
    if words[0] == LIVE_UPDATE:
        answer = live_update(engine, conn, message, words[1:])
        return None if answer is None else answer.encode() + b"\0"
    function, _ = _COMMANDS[words[0]]
    return function(engine, words[1:]).encode() + b"\0"


HANDLERS: dict[int, Handler] = {Op.CONTROL: control}


def inconsistencies(engine: Engine) -> list[str]:
    """What does not add up: children without nodes, nodes without parents, counts, stale owners."""
    wrong: list[str] = []
    # oxenstored does not count the root.
    counts: dict[int, int] = {} if engine.profile.accounting else {0: -1}
    children = 0
    for path, node in engine.nodes.items():
        counts[node.owner] = counts.get(node.owner, 0) + 1
        names = node.children or {}
        children += len(names)
        if node.childlen != sum(len(name) + 1 for name in names):
            wrong.append(f"{path!r}: length of child names")
        wrong += [
            f"{path!r}: child {name!r} has no node"
            for name in names
            if child_path(path, name) not in engine.nodes
        ]
        if path[:1] == b"/" and path != b"/":
            above = engine.nodes.get(parent_of(path))
            name = path[path.rindex(b"/") + 1 :]
            if above is None or name not in (above.children or {}):
                wrong.append(f"{path!r}: not in its parent")
    for domid, domain in engine.domains.items():
        if domain.nodes != counts.pop(domid, 0):
            wrong.append(f"domain {domid}: {domain.nodes} nodes counted")
        if domain.watches != sum(len(conn.watches) for conn in domain.connections):
            wrong.append(f"domain {domid}: {domain.watches} watches counted")
        if domain.transactions != sum(len(conn.transactions) for conn in domain.connections):
            wrong.append(f"domain {domid}: {domain.transactions} transactions counted")
        memory = _memory(engine, domid)
        if domain.memory != memory:
            wrong.append(f"domain {domid}: {domain.memory} bytes counted, {memory} found")
    wrong += [f"domain {domid} is not known but owns {count} nodes" for domid, count in counts.items()]
    return wrong


def _memory(engine: Engine, domid: int) -> int:
    total = 0
    if engine.profile.accounting:
        total = sum(len(path) + node.size for path, node in engine.nodes.items() if node.owner == domid)
    for conn in engine.domains[domid].connections:
        total += sum(len(watch.path) + len(watch.token) for watch in conn.watches.values())
        total += sum(tx.memory for tx in conn.transactions.values())
        total += conn.queued if conn.guest else 0
    return total
