"""Journals as files: made, locked, found again, refused, swept."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from tests.support.until import descriptors

from xenbus.bus import journals
from xenbus.ring.journal import Journal, JournalError, journal_size

NODE = "backend/vbd/1/51712"
WHOSE = journals.identity(NODE, 1, (8,), 3)


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "journals"
    path.mkdir(mode=0o700)
    before = descriptors()
    yield path
    assert descriptors() == before


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def layout(entries=32):
    return journals.Layout(journal_size(entries, 112), lambda view: Journal(view, entries, 112))


def create(directory, node=NODE, name="q0", whose=WHOSE):
    made = journals.create(directory, node, name, layout())
    made.journal.begin(whose, 0)
    return made


def resume(directory, node=NODE, name="q0", whose=WHOSE, entries=32):
    return journals.resume(directory, node, name, layout(entries), whose)


def test_made_left_found_and_removed(directory):
    made = create(directory)
    assert names(directory) == ["backend.vbd.1.51712.q0"]
    info = made.path.stat()
    assert info.st_mode & 0o777 == 0o600 and info.st_blocks * 512 >= info.st_size
    made.journal.taken[0] += 5
    count = made.journal.taken[0]
    made.close()
    found = resume(directory)
    assert found.journal.taken[0] == count
    found.remove()
    found.remove()
    assert names(directory) == []
    with pytest.raises(JournalError, match=r"q0: No such file"):
        resume(directory)


def test_the_next_connection_begins_anew(directory):
    create(directory).close()
    made = create(directory, whose=journals.identity("another"))
    made.close()
    with pytest.raises(JournalError, match=r"q0: it is another connection's"):
        resume(directory)


def test_a_ring_of_another_size(directory):
    create(directory).close()
    with pytest.raises(JournalError, match=r"bytes, not"):
        resume(directory, entries=64)


def test_one_process_at_a_time(directory):
    made = create(directory)
    for call in (create, resume):
        with pytest.raises(journals.JournalBusy, match="another process"):
            call(directory)
    create(directory, name="q1").remove()
    assert journals.sweep(directory, []) == []
    made.close()
    resume(directory).close()


HOLDER = """
import sys, signal
from pathlib import Path
from xenbus.bus import journals
from xenbus.ring.journal import Journal, journal_size
layout = journals.Layout(journal_size(32, 112), lambda view: Journal(view, 32, 112))
held = journals.resume(Path(sys.argv[1]), sys.argv[2], "q0", layout, bytes.fromhex(sys.argv[3]))
print("held", flush=True)
signal.pause()
"""


def test_a_killed_process_holds_no_lock(directory):
    create(directory).close()
    command = [sys.executable, "-c", HOLDER, directory, NODE, WHOSE.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(journals.JournalBusy):
            resume(directory)
        process.kill()
    resume(directory).remove()


@pytest.mark.parametrize(
    "node", ["", "backend", "../etc/passwd", "backend/vbd/../x", "/backend/vbd/1/2", "a/b\0"]
)
def test_a_node_that_is_no_name(directory, node):
    with pytest.raises(JournalError, match="no journal for"):
        create(directory, node)


def test_what_is_no_plain_file_of_ours(directory, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    path = directory / "backend.vbd.1.51712.q0"
    path.symlink_to(other)
    for call in (create, resume):
        with pytest.raises(JournalError, match="q0"):
            call(directory)
    path.unlink()
    os.mkfifo(path, 0o600)
    for call in (create, resume):
        with pytest.raises(JournalError, match="no plain file"):
            call(directory)
    path.unlink()
    create(directory).close()
    path.chmod(0o644)
    with pytest.raises(JournalError, match="mode 0600"):
        resume(directory)
    assert other.read_bytes() == b"precious"


def test_a_directory_that_others_may_write_into(directory, tmp_path):
    directory.chmod(0o777)
    with pytest.raises(JournalError, match="0700"):
        create(directory)
    with pytest.raises(JournalError, match="No such file"):
        create(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(JournalError, match="no directory"):
        create(tmp_path / "file")


def test_a_full_filesystem_is_said_at_once(directory, monkeypatch):
    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(JournalError, match="No space left"):
        create(directory)
    assert names(directory) == []


def test_sweep_takes_what_no_device_wants(directory):
    for node in (NODE, "backend/vbd/2/51712", "backend/vbd/2/51728"):
        create(directory, node).close()
    create(directory, "backend/vif/2/0", "rings").close()
    for name in ("notes", "backend.vbd.2.51712"):
        (directory / name).touch()
    removed = journals.sweep(directory, [NODE])
    gone = ["backend.vbd.2.51712.q0", "backend.vbd.2.51728.q0", "backend.vif.2.0.rings"]
    assert sorted(path.name for path in removed) == gone
    assert names(directory) == ["backend.vbd.1.51712.q0", "backend.vbd.2.51712", "notes"]
    assert journals.discard(directory, "backend/vbd/1/5171") == []
    assert [path.name for path in journals.discard(directory, NODE)] == ["backend.vbd.1.51712.q0"]
