"""The logs of a host's processes: each is bounded, and their last words can be told. Files only."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

LOG_MAX = 4 << 20  # bytes of one log; as many again are kept of what came before, in NAME.log.1
LOOK_EVERY = 2.0  # seconds
TAIL = 8192  # bytes of a log that are looked at for its last line


async def keep_bounded(folder: Path, limit: int = LOG_MAX, every: float = LOOK_EVERY) -> None:
    """Until cancelled. What the processes write goes straight into the files (opened to append), so that the
    words of one that crashes are kept too, whoever has ended before it."""
    while True:
        await asyncio.sleep(every)
        try:
            for path in folder.glob("*.log"):
                if path.stat().st_size > limit:
                    rotate(path, limit)
        except OSError as error:
            log.warning("%s: %s", folder, error)


def rotate(path: Path, limit: int = LOG_MAX) -> None:
    """The newest `limit` bytes go to `path`.1; `path` is empty then: its writers append, and go on at 0."""
    with path.open("rb") as file:
        file.seek(-min(limit, os.fstat(file.fileno()).st_size), os.SEEK_END)
        kept = file.read(limit)
    path.with_name(path.name + ".1").write_bytes(kept)
    os.truncate(path, 0)


def last_words(path: Path) -> str:
    """The last line of a log."""
    try:
        with path.open("rb") as file:
            file.seek(-min(TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
            lines = file.read(TAIL).decode(errors="replace").strip().splitlines()
    except OSError as error:
        return f"{path}: {error.strerror}"
    return lines[-1] if lines else f"it said nothing in {path}"
