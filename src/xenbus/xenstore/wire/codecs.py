"""One table: operation -> how its request and its reply are written and read. No I/O.

Knows the payload grammar of docs/misc/xenstore.txt; not who sends, nor what a daemon decides.
Text is UTF-8 with surrogate escapes, so that any byte survives a round trip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from xenbus.errors import PeerError, UsageError
from xenbus.xenstore.wire.message import Op
from xenbus.xenstore.wire.perms import Perm, format_perms, parse_perms

OK = b"OK\0"
# "Always send at least one byte": oxenstored waits for more input on an empty payload.
NOTHING = b"\0"


@dataclass(slots=True, frozen=True)
class Codec:
    """How one operation travels.

    request:       arguments -> payload; UsageError for what cannot be written
    parse_request: payload -> the same arguments as a tuple; UsageError if malformed
    reply:         result -> payload
    parse_reply:   payload -> result; PeerError if malformed
    """

    request: Callable[..., bytes]
    parse_request: Callable[[bytes], tuple[Any, ...]]
    reply: Callable[[Any], bytes]
    parse_reply: Callable[[bytes], Any]


def text(payload: bytes) -> str:
    return payload.decode("utf-8", "surrogateescape")


def data(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")


def join_words(*values: str | int) -> bytes:
    """Each value with a NUL after it. UsageError for a NUL inside, or a negative number."""
    parts = [str(value) for value in values]
    for part in parts:
        if "\0" in part:
            raise UsageError(f"NUL inside {part!r}")
    for value in values:
        if isinstance(value, int) and value < 0:
            raise UsageError(f"negative number {value}")
    return data("\0".join(parts) + "\0")


def split_words(payload: bytes) -> list[str]:
    """NUL-terminated words; UsageError if the last is not terminated. Nothing but a NUL is no word."""
    if not payload or payload == NOTHING:
        return []
    if payload[-1]:
        raise UsageError("a word without a NUL at its end")
    return text(payload[:-1]).split("\0")


def parse_number(word: str) -> int:
    """A decimal number of at most 20 digits; UsageError otherwise."""
    if not (word.isascii() and word.isdigit() and len(word) <= 20):
        raise UsageError(f"{word!r} is not a decimal number")
    return int(word)


# ---- requests ----


def _no_arguments() -> bytes:
    return NOTHING


def _parse_nothing(payload: bytes) -> tuple[()]:
    return ()


def _counted(low: int, high: int, words: list[str]) -> list[str]:
    if not low <= len(words) <= high:
        raise UsageError(f"{len(words)} words, expected {low} to {high}")
    return words


def _path_request(path: str) -> bytes:
    return join_words(path)


def _parse_path(payload: bytes) -> tuple[str]:
    (path,) = _counted(1, 1, split_words(payload))
    return (path,)


def _write_request(path: str, value: bytes | str) -> bytes:
    return join_words(path) + (data(value) if isinstance(value, str) else bytes(value))


def _parse_write(payload: bytes) -> tuple[str, bytes]:
    path, found, value = payload.partition(b"\0")
    if not found:
        raise UsageError("no NUL after the path")
    return text(path), value


def _set_perms_request(path: str, perms: Iterable[Perm | str]) -> bytes:
    return join_words(path) + format_perms(perms)


def _parse_set_perms(payload: bytes) -> tuple[str, list[Perm]]:
    path, rest = _parse_write(payload)
    return path, parse_perms(rest)


def _watch_request(path: str, token: str, depth: int | None = None) -> bytes:
    return join_words(path, token) if depth is None else join_words(path, token, depth)


def _parse_watch(payload: bytes) -> tuple[str, str, int | None]:
    words = _counted(2, 3, split_words(payload))
    return words[0], words[1], parse_number(words[2]) if len(words) == 3 and words[2] else None


def _parse_unwatch(payload: bytes) -> tuple[str, str]:
    words = _counted(2, 3, split_words(payload))
    return words[0], words[1]


def _end_request(commit: bool) -> bytes:
    return b"T\0" if commit else b"F\0"


def _parse_end(payload: bytes) -> tuple[bool]:
    if payload not in (b"T\0", b"F\0"):
        raise UsageError(f"{payload!r}: expected T or F")
    return (payload == b"T\0",)


def _numbers(low: int, high: int) -> tuple[Callable[..., bytes], Callable[[bytes], tuple[int, ...]]]:
    def parse(payload: bytes) -> tuple[int, ...]:
        return tuple(parse_number(word) for word in _counted(low, high, split_words(payload)))

    def request(*values: int) -> bytes:
        if not low <= len(values) <= high:
            raise UsageError(f"{len(values)} numbers, expected {low} to {high}")
        return join_words(*map(int, values)) if values else NOTHING

    return request, parse


def _parse_part_request(payload: bytes) -> tuple[str, int]:
    path, offset = _counted(2, 2, split_words(payload))
    return path, parse_number(offset)


def _part_request(path: str, offset: int) -> bytes:
    return join_words(path, offset)


def _get_quota_request(name: str | None = None, domid: int | None = None) -> bytes:
    if name is None:
        return NOTHING
    return join_words(name) if domid is None else join_words(domid, name)


def _parse_get_quota(payload: bytes) -> tuple[str | None, int | None]:
    words = _counted(0, 2, split_words(payload))
    return words[-1] if words else None, parse_number(words[0]) if len(words) == 2 else None


def _set_quota_request(name: str, value: int, domid: int | None = None) -> bytes:
    return join_words(name, value) if domid is None else join_words(domid, name, value)


def _parse_set_quota(payload: bytes) -> tuple[str, int, int | None]:
    words = _counted(2, 3, split_words(payload))
    return words[-2], parse_number(words[-1]), parse_number(words[0]) if len(words) == 3 else None


def _control_request(*words: str) -> bytes:
    return join_words(*words)


def _parse_control(payload: bytes) -> tuple[str, ...]:
    return tuple(split_words(payload))


# ---- replies ----


def _ok(result: object = None) -> bytes:
    return OK


def _parse_ok(payload: bytes) -> None:
    if payload != OK:
        raise PeerError(f"reply {payload!r}: expected OK")


def _value(result: bytes) -> bytes:
    return result


def _text_reply(result: str) -> bytes:
    return data(result) + b"\0"


def _parse_text(payload: bytes) -> str:
    return text(payload.rstrip(b"\0"))


def _list_reply(result: Iterable[str]) -> bytes:
    return data("".join(f"{name}\0" for name in result))


def _parse_list(payload: bytes) -> list[str]:
    if not payload:
        return []
    return text(payload.removesuffix(b"\0")).split("\0")


def _perms_reply(result: Iterable[Perm]) -> bytes:
    return format_perms(result)


def _peer_parse(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A parser of requests used on a reply: there, the peer is to blame."""

    def checked(payload: bytes) -> Any:
        try:
            return parse(payload)
        except UsageError as error:
            raise PeerError(f"reply {payload!r}: {error}") from None

    return checked


def _number_reply(result: int) -> bytes:
    return b"%d\0" % result


def _parse_number_reply(payload: bytes) -> int:
    return parse_number(_parse_text(payload))


def _bool_reply(result: bool) -> bytes:
    return b"T\0" if result else b"F\0"


def _parse_bool(payload: bytes) -> bool:
    return _parse_end(payload)[0]


def _part_reply(result: tuple[str, bytes]) -> bytes:
    generation, chunk = result
    return join_words(generation) + chunk


def _parse_part(payload: bytes) -> tuple[str, bytes]:
    """(generation, list bytes from the offset on); the bytes end in an empty word when the list is over."""
    generation, found, chunk = payload.partition(b"\0")
    if not found:
        raise PeerError(f"DIRECTORY_PART reply without a generation: {payload[:40]!r}")
    return text(generation), chunk


_path_ok = Codec(_path_request, _parse_path, _ok, _parse_ok)
_one = _numbers(1, 1)
_domid_ok = Codec(*_one, _ok, _parse_ok)
_nothing_ok = Codec(_no_arguments, _parse_nothing, _ok, _parse_ok)
_number = _peer_parse(_parse_number_reply)

CODECS: Mapping[int, Codec] = MappingProxyType(
    {
        Op.CONTROL: Codec(_control_request, _parse_control, _text_reply, _parse_text),
        Op.DIRECTORY: Codec(_path_request, _parse_path, _list_reply, _parse_list),
        Op.READ: Codec(_path_request, _parse_path, _value, _value),
        Op.GET_PERMS: Codec(_path_request, _parse_path, _perms_reply, _peer_parse(parse_perms)),
        Op.WATCH: Codec(_watch_request, _parse_watch, _ok, _parse_ok),
        Op.UNWATCH: Codec(join_words, _parse_unwatch, _ok, _parse_ok),
        Op.TRANSACTION_START: Codec(_no_arguments, _parse_nothing, _number_reply, _number),
        Op.TRANSACTION_END: Codec(_end_request, _parse_end, _ok, _parse_ok),
        Op.INTRODUCE: Codec(*_numbers(3, 3), _ok, _parse_ok),
        Op.RELEASE: _domid_ok,
        Op.GET_DOMAIN_PATH: Codec(*_one, _text_reply, _parse_text),
        Op.WRITE: Codec(_write_request, _parse_write, _ok, _parse_ok),
        Op.MKDIR: _path_ok,
        Op.RM: _path_ok,
        Op.SET_PERMS: Codec(_set_perms_request, _parse_set_perms, _ok, _parse_ok),
        Op.IS_DOMAIN_INTRODUCED: Codec(*_one, _bool_reply, _peer_parse(_parse_bool)),
        Op.RESUME: _domid_ok,
        Op.SET_TARGET: Codec(*_numbers(2, 2), _ok, _parse_ok),
        Op.RESET_WATCHES: _nothing_ok,
        Op.DIRECTORY_PART: Codec(_part_request, _parse_part_request, _part_reply, _parse_part),
        Op.GET_FEATURE: Codec(*_numbers(0, 1), _number_reply, _number),
        Op.SET_FEATURE: Codec(*_numbers(2, 2), _ok, _parse_ok),
        Op.GET_QUOTA: Codec(_get_quota_request, _parse_get_quota, _text_reply, _parse_text),
        Op.SET_QUOTA: Codec(_set_quota_request, _parse_set_quota, _ok, _parse_ok),
    }
)


def encode_event(path: str, token: str) -> bytes:
    """Payload of a WATCH_EVENT."""
    return join_words(path, token)


def parse_event(payload: bytes) -> tuple[str, str]:
    """(path, token) of a WATCH_EVENT; PeerError if there are not two words. A token may be empty."""
    words = payload.removesuffix(b"\0").split(b"\0")
    if len(words) < 2:
        raise PeerError(f"WATCH_EVENT {payload!r}: expected path and token")
    return text(words[0]), text(words[1])


def parse_error(payload: bytes) -> str:
    """The errno name of an ERROR reply, also one that we do not know."""
    return text(payload.split(b"\0", 1)[0])
