"""Journals as files: one a ring or a device, in a directory that the operator names: a tmpfs, to go with the
machine.

Knows files and locks; knows no device but by its node, and of a layout that it can be checked. The lock is
the process's: who holds it serves the ring, and the kernel ends it with the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import re
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

from xenbus.ring.journal import JournalError

_NODE: Final = re.compile(r"[A-Za-z0-9_@-]{1,64}(?:/[A-Za-z0-9_@-]{1,64}){1,4}")
_FILE: Final = re.compile(r"([A-Za-z0-9_@-]{1,64}(?:\.[A-Za-z0-9_@-]{1,64}){1,4})\.(?:q[0-9]{1,4}|rings)")
_NEVER_FOLLOW: Final = os.O_NOFOLLOW | os.O_CLOEXEC


class JournalBusy(JournalError):
    """Another process that lives serves this ring."""


class Kept(Protocol):
    """A journal: what is made of a file's bytes."""

    def check(self, identity: bytes) -> None:
        """JournalError unless it was begun for this very connection."""
        ...

    def release(self) -> None:
        """Let go of the bytes. Idempotent."""
        ...


J = TypeVar("J", bound=Kept)


@dataclass(slots=True, frozen=True)
class Layout(Generic[J]):
    """size: bytes of a file; over: the journal in a buffer of so many. It may raise JournalError"""

    size: int
    over: Callable[[memoryview], J]


class JournalFile(Generic[J]):
    """A journal, locked and mapped. What works on `journal` is released before `close`."""

    __slots__ = ("_map", "journal", "path")

    def __init__(self, path: Path, mapped: mmap.mmap, layout: Layout[J]) -> None:
        self.path = path
        self._map = mapped
        with memoryview(mapped) as view:
            self.journal = layout.over(view)

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
    """The 32 bytes that say which connection a journal is for."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).digest()


def create(directory: Path, node: str, name: str, layout: Layout[J]) -> JournalFile[J]:
    """A new journal for that part of `node`, zeroed; one that was left from before is removed.

    name: "q0", "q1" of a queue, "rings" of all there are. JournalBusy; JournalError with why it cannot be
    made, a full filesystem included (it takes all its room at once).
    """
    path = _path(directory, node, name)
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
            os.posix_fallocate(fd, 0, layout.size)  # a hole in a full tmpfs would be SIGBUS later
            return JournalFile(path, mmap.mmap(fd, layout.size), layout)
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


def resume(directory: Path, node: str, name: str, layout: Layout[J], whose: bytes) -> JournalFile[J]:
    """What a former process left of that part. JournalBusy; JournalError if there is none, or not of it.

    whose: see `identity`
    """
    path = _path(directory, node, name)
    try:
        fd = _open(path, os.O_RDWR)
        try:
            there = os.fstat(fd).st_size
            if there != layout.size:
                raise JournalError(f"{path}: {there} bytes, not {layout.size}")
            found = JournalFile(path, mmap.mmap(fd, layout.size), layout)
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


def _path(directory: Path, node: str, name: str) -> Path:
    check_directory(directory)
    if _NODE.fullmatch(node) is None:
        raise JournalError(f"no journal for a device at {node!r}")
    return directory / f"{_base(node)}.{name}"


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
