"""What the lab is at, in one line: kept up to date on a terminal, said once elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time

TERMINAL = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
COLOURS = {"passed": "32", "skipped": "33", "failure": "31", "error": "31"}

_text = ""
_began = 0.0
_lock = threading.Lock()
_ticking = False


def step(text: str) -> None:
    """From now on it is at this; "" ends the line."""
    global _text, _began, _ticking
    with _lock:
        _text, _began = text, time.monotonic()
        if TERMINAL:
            sys.stdout.write("\r\x1b[K")
        elif text:
            sys.stdout.write(text + "\n")
        sys.stdout.flush()
        if TERMINAL and not _ticking:
            _ticking = True
            threading.Thread(target=_tick, daemon=True).start()


def _tick() -> None:
    while True:
        with _lock:
            if _text:
                sys.stdout.write(f"\r\x1b[K{_text} ({time.monotonic() - _began:.0f} s)")
                sys.stdout.flush()
        time.sleep(0.5)


def coloured(kind: str, text: str) -> str:
    return f"\x1b[{COLOURS[kind]}m{text}\x1b[0m" if TERMINAL else text
