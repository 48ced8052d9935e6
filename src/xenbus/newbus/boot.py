"""The hold on boot: whoever waits for the first devices waits until every token is released or too old.

Pure: the caller says what time it is. FreeBSD's config_intrhook, but one token a holder instead of a count,
so that none is released twice or never (B3).
"""

from __future__ import annotations

from collections.abc import Callable


class Token:
    """One reason to hold boot. `release` counts once."""

    __slots__ = ("_hold", "expires", "what")

    def __init__(self, hold: BootHold, what: str, expires: float) -> None:
        self._hold: BootHold | None = hold
        self.what = what
        self.expires = expires

    @property
    def held(self) -> bool:
        return self._hold is not None

    def release(self) -> None:
        """Idempotent."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold._released(self)


class BootHold:
    """The tokens of one tree. `late`: whose time was over, by name, since the hold was last clear."""

    __slots__ = ("_on_clear", "_tokens", "late")

    def __init__(self) -> None:
        self._tokens: dict[Token, None] = {}
        self.late: dict[str, None] = {}
        self._on_clear: list[Callable[[], None]] = []

    def hold(self, what: str, expires: float) -> Token:
        """what: who holds, for the message when it is too old; expires: in the caller's clock, seconds."""
        if not self._tokens:
            self.late.clear()
        token = Token(self, what, expires)
        self._tokens[token] = None
        return token

    def _released(self, token: Token) -> None:
        del self._tokens[token]
        if not self._tokens:
            for callback in list(self._on_clear):
                callback()

    @property
    def clear(self) -> bool:
        return not self._tokens

    @property
    def holders(self) -> list[str]:
        return [token.what for token in self._tokens]

    def next_expiry(self) -> float | None:
        """When the oldest token ends; None without tokens."""
        return min((token.expires for token in self._tokens), default=None)

    def expire(self, now: float) -> list[str]:
        """Releases what is too old; who that was."""
        old = [token for token in self._tokens if token.expires <= now]
        for token in old:
            self.late[token.what] = None
            token.release()
        return [token.what for token in old]

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Runs `callback` when the hold clears; returns what ends that."""
        self._on_clear.append(callback)
        return lambda: self._on_clear.remove(callback) if callback in self._on_clear else None
