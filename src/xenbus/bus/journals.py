"""Journals as files: one a ring, in a directory that the operator names: a tmpfs, to go with the machine.

Knows files, locks and the layout of ring/journal.py; knows no device but by its node. The lock is the
process's: who holds it serves the ring, and the kernel ends it with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from xenbus.ring.journal import Journal, JournalError, journal_size

_NODE: Final = re.compile(r"[A-Za-z0-9_@-]{1,64}(?:/[A-Za-z0-9_@-]{1,64}){1,4}")
_FILE: Final = re.compile(r"([A-Za-z0-9_@-]{1,64}(?:\.[A-Za-z0-9_@-]{1,64}){1,4})\.q[0-9]{1,4}")
_NEVER_FOLLOW: Final = os.O_NOFOLLOW | os.O_CLOEXEC


class JournalBusy(JournalError):
    """Another process that lives serves this ring."""


class JournalFile:
    """A ring's journal, locked and mapped. The ring that works on `journal` is released before `close`."""

    __slots__ = ("_map", "journal", "path")

    def __init__(self, path: Path, mapped: mmap.mmap, entries: int, slot_size: int) -> None:
        self.path = path
        self._map = mapped
        view = memoryview(mapped)
        self.journal = Journal(view, entries, slot_size)
        view.release()

    def close(self) -> None:
        """The file stays, for the process that comes next. Idempotent."""
        self.journal.release()
        self._map.close()  # and with it the descriptor that holds the lock

    def remove(self) -> None:
        """The connection is over, there is nothing to go on with. Idempotent."""
        if not self._map.closed:
            _unlink(self.path)
        self.close()


def identity(*parts: object) -> bytes:
    """The 32 bytes that say whose ring a journal is for."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).digest()


def create(
    directory: Path, node: str, queue: int, whose: bytes, index: int, entries: int, slot_size: int
) -> JournalFile:
    """A new journal for the ring of that queue of `node`; one that was left from before is removed.

    whose: see `identity`; index: where the ring stands. JournalBusy; JournalError with why it cannot be made,
    a full filesystem included (it takes all its room at once).
    """
    path = _path(directory, node, queue)
    size = journal_size(entries, slot_size)
    old = -1
    try:
        try:
            # Held until the new one is there: its owner, if it lives, must not lose it.
            old = _open(path, os.O_RDWR)
        except FileNotFoundError:
            pass
        else:
            path.unlink()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NEVER_FOLLOW, 0o600)
        try:
            _lock(fd, path)
            os.posix_fallocate(fd, 0, size)  # a hole in a full tmpfs would be SIGBUS later
            made = JournalFile(path, mmap.mmap(fd, size), entries, slot_size)
        except BaseException:
            _unlink(path)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    finally:
        if old >= 0:
            os.close(old)
    made.journal.begin(whose, index)
    return made


def resume(directory: Path, node: str, queue: int, whose: bytes, entries: int, slot_size: int) -> JournalFile:
    """What a former process left of that ring. JournalBusy; JournalError if there is none, or not of it."""
    path = _path(directory, node, queue)
    size = journal_size(entries, slot_size)
    try:
        fd = _open(path, os.O_RDWR)
        try:
            there = os.fstat(fd).st_size
            if there != size:
                raise JournalError(f"{path}: {there} bytes, not {size}")
            found = JournalFile(path, mmap.mmap(fd, size), entries, slot_size)
        finally:
            os.close(fd)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    try:
        found.journal.check(whose)
    except JournalError as error:
        found.close()
        raise JournalError(f"{path}: {error}") from None
    return found


def check_directory(directory: Path) -> None:
    """JournalError unless it is a directory that nobody else may write into: who can put a journal there can
    make us do requests that no guest asked for."""
    try:
        info = directory.lstat()
    except OSError as error:
        raise JournalError(f"{directory}: {error.strerror}") from error
    if not stat.S_ISDIR(info.st_mode):
        raise JournalError(f"{directory}: no directory")
    if info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise JournalError(f"{directory}: it has to be ours, and writable for nobody else (mode 0700)")


def sweep(directory: Path, nodes: Collection[str]) -> list[Path]:
    """Removes what was left for devices that are not among `nodes`. Returns which files; JournalError."""
    keep = {_base(node) for node in nodes}
    return _remove(directory, lambda base: base not in keep)


def discard(directory: Path, node: str) -> list[Path]:
    """Removes what was left for this device. Returns which files; JournalError."""
    base = _base(node)
    return _remove(directory, base.__eq__)


def _base(node: str) -> str:
    return node.replace("/", ".")


def _remove(directory: Path, unwanted: Callable[[str], bool]) -> list[Path]:
    check_directory(directory)
    removed: list[Path] = []
    for path in directory.iterdir():
        match = _FILE.fullmatch(path.name)
        if match is None or not unwanted(match[1]):
            continue
        try:
            fd = _open(path, os.O_RDWR)
        except (OSError, JournalError):
            continue  # somebody's who lives, or no file of ours
        path.unlink()
        os.close(fd)
        removed.append(path)
    return removed


def _path(directory: Path, node: str, queue: int) -> Path:
    check_directory(directory)
    if _NODE.fullmatch(node) is None:
        raise JournalError(f"no journal for a device at {node!r}")
    return directory / f"{_base(node)}.q{queue}"


def _open(path: Path, flags: int) -> int:
    """A locked descriptor of a plain file of ours. OSError, JournalError, JournalBusy."""
    fd = os.open(path, flags | _NEVER_FOLLOW | os.O_NONBLOCK)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise JournalError(f"{path}: no plain file of ours with mode 0600")
        _lock(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalBusy(f"{path}: another process serves this ring") from None


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass
