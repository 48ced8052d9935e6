"""A store in a file, `--state FILE`: read when a daemon starts, written while it serves. asyncio.

Every change is in the file, by one write(2) a turn, before anybody hears that it was made: nothing of it is
lost when the process is killed. The disk is asked for it (fdatasync) once in `SYNC_SECONDS`: as much may be
lost when the power fails. Knows the file; what is in it is state/journal.py's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from xenbus.errors import UsageError
from xenbus.xenstore.state.image import Image
from xenbus.xenstore.state.journal import FIRST_BATCH, Journal, JournaledEngine, Rings, frame, replay
from xenbus.xenstore.state.records import StateError

_log = logging.getLogger("xenbus.xenstored")

SYNC_SECONDS = 1.0
# A file that could not be written is tried again after so long.
RETRY_SECONDS = 5.0
# A daemon that was killed a moment ago may not be quite gone.
LOCK_SECONDS = 1.0
# It is written anew when what was appended is longer than this, bytes, and than so many times the store.
COMPACT_BYTES = 1 << 20
COMPACT_TIMES = 4


class _File:
    """An open file that is appended to. `good`: its length, without what was written in part."""

    __slots__ = ("fd", "good", "number")

    def __init__(self, path: Path, data: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self.fd = os.open(path, flags, 0o600)
        self.good = 0
        self.number = FIRST_BATCH
        try:
            self._write(data)
        except BaseException:
            os.close(self.fd)
            path.unlink(missing_ok=True)
            raise

    def batch(self, records: bytes) -> None:
        """OSError: nothing of it is in the file."""
        self._write(frame(self.number, records))
        self.number += 1

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self.fd, data)
            while written < len(data):
                written += os.write(self.fd, memoryview(data)[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.good)
            raise
        self.good += len(data)


class Keeper:
    """One store's file, locked. `image`: what was in it, None if it was not there.

    path:    made if it is not there, mode 0600; its folder must be. UsageError if it cannot be used, or
             another daemon uses it; StateError, named with the path, if it makes no sense
    lock_fd: the lock, from the process that this one goes on for; then the file is not read
    """

    def __init__(self, path: str | os.PathLike[str], *, lock_fd: int | None = None) -> None:
        self.path = Path(os.path.realpath(path))
        self.image: Image | None = None
        self.sync_seconds = SYNC_SECONDS
        self._new = self.path.with_name(self.path.name + ".new")
        self._file: _File | None = None
        self._journal: Journal | None = None
        self._size = 0
        self._trouble = ""
        # Batches since a new file was begun that is not in place yet.
        self._since: list[bytes] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        if lock_fd is not None:
            os.set_inheritable(lock_fd, False)
            self.lock_fd = lock_fd
            return
        self._look()
        self.lock_fd = self._lock()
        try:
            self._read()
        except BaseException:
            os.close(self.lock_fd)
            raise

    # ---- opening ----

    def _look(self) -> None:
        try:
            mode = self.path.stat().st_mode
        except OSError:
            return
        if not stat.S_ISREG(mode):
            raise UsageError(f"state file {self.path}: not a regular file")

    def _lock(self) -> int:
        # Not the file itself: another takes its place.
        place = self.path.with_name(self.path.name + ".lock")
        try:
            fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise UsageError(f"state file {self.path}: cannot open {place}: {exc.strerror}") from exc
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except OSError as exc:
                if time.monotonic() > end:
                    os.close(fd)
                    raise UsageError(f"state file {self.path}: another daemon keeps its store there") from exc
            time.sleep(0.02)

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as exc:
            raise UsageError(f"state file {self.path}: {exc.strerror}") from exc
        try:
            found = replay(data)
        except StateError as exc:
            raise self.blamed(exc) from exc
        if found.torn:
            _log.warning("state file %s: cut off at byte %d: %s", self.path, found.good, found.torn)
        self.image = found.image

    def blamed(self, error: StateError) -> StateError:
        """The same with the path, and what to do."""
        text = f"{error.text} (state file {self.path}; move it away to begin with an empty store)"
        return StateError(text, error.record, error.kind, error.offset)

    # ---- writing ----

    def start(self, engine: JournaledEngine, rings: Rings) -> None:
        """Writes the file anew, on disk; from now on `commit` keeps it. UsageError if that fails."""
        self.image = None
        self._journal = Journal(engine, rings)
        try:
            self._rewrite_now()
        except OSError as exc:
            raise UsageError(f"state file {self.path}: {exc.strerror}") from exc

    def _rewrite_now(self) -> None:
        assert self._journal is not None
        data = self._journal.snapshot()
        file = _File(self._new, data)
        try:
            os.fsync(file.fd)
            self._put_in_place(file, len(data))
            _sync_folder(self.path.parent)
        except BaseException:
            if self._file is not file:
                os.close(file.fd)
            raise

    def _put_in_place(self, file: _File, size: int) -> None:
        self._new.rename(self.path)
        if self._file is not None:
            os.close(self._file.fd)
        self._file, self._size = file, size

    @property
    def trouble(self) -> str:
        """Why the file is behind the store; "" if it is not."""
        return self._trouble and f"state file {self.path} is behind: {self._trouble}"

    def commit(self) -> None:
        """What changed goes into the file. Call it before anybody hears of it."""
        journal, file = self._journal, self._file
        if journal is None or not journal.dirty or self._closed:
            return
        records = journal.batch()
        if self._since is not None:
            self._since.append(records)
        if self._trouble or file is None:
            return  # the next attempt writes all of it
        try:
            file.batch(records)
        except OSError as exc:
            self._failed(exc)
            return
        if self._since is None and file.good - self._size > max(COMPACT_BYTES, COMPACT_TIMES * self._size):
            self._run(self._compact)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.sync_seconds, self._tick)

    def _failed(self, exc: OSError) -> None:
        """The store goes on without its file, and says so; the file stays as it was, and is whole."""
        if not self._trouble:
            _log.error(
                "state file %s: %s; what changes from now on is lost if this daemon ends",
                self.path,
                exc.strerror,
            )
        self._trouble = exc.strerror or str(exc)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(RETRY_SECONDS, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._run(self._rewrite if self._trouble else self._sync)

    def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        """One thing at a time: what comes meanwhile has its turn by the timer."""
        if self._closed:
            return
        if self._task is not None:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self.sync_seconds, self._tick)
            return

        async def guarded() -> None:
            try:
                await work()
            except OSError as exc:
                self._failed(exc)
            finally:
                self._task = None

        self._task = asyncio.get_running_loop().create_task(guarded(), name=f"write {self.path}")

    async def _sync(self) -> None:
        if self._file is not None:
            fd = os.dup(self._file.fd)
            try:
                await asyncio.get_running_loop().run_in_executor(None, os.fdatasync, fd)
            finally:
                os.close(fd)

    async def _compact(self) -> None:
        """The file is kept as it is if there is no room for another; it is tried again when it has grown."""
        try:
            await self._rewrite()
        except OSError as exc:
            if self._trouble or self._file is None:
                raise
            _log.warning("state file %s: cannot be made shorter: %s", self.path, exc.strerror)
            self._size = self._file.good

    async def _rewrite(self) -> None:
        """The same store in a new file, which takes the old one's place once it is on disk."""
        assert self._journal is not None
        loop = asyncio.get_running_loop()
        self.commit()
        data = self._journal.snapshot()
        file = _File(self._new, data)
        self._since = []
        try:
            await loop.run_in_executor(None, os.fsync, file.fd)
            for records in self._since:
                file.batch(records)
            self._put_in_place(file, len(data))
        except BaseException:
            if self._file is not file:
                os.close(file.fd)
            raise
        finally:
            self._since = None
        await loop.run_in_executor(None, _sync_folder, self.path.parent)
        if self._trouble:
            _log.warning("state file %s: written again, and up to date", self.path)
            self._trouble = ""

    async def settle(self) -> None:
        """Nothing is under way with the file."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """The file is up to date and on disk, and unlocked. Idempotent."""
        if self._closed:
            return
        self.commit()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._file is not None:
            try:
                self._rewrite_now()
            except OSError as exc:
                _log.error("state file %s: %s", self.path, exc.strerror)
            os.close(self._file.fd)
        os.close(self.lock_fd)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
