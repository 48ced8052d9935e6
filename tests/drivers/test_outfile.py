"""Captures and logs are files: nothing else is opened, nothing is waited for, and nobody shares one."""

from __future__ import annotations

import errno
import os
import socket
import stat

import pytest
from tests.support.until import descriptors

from xenbus.drivers import outfile
from xenbus.drivers.console.logfile import LogFile
from xenbus.drivers.net.capture import PcapngWriter
from xenbus.drivers.outfile import open_for_writing

WRITERS = {"log": lambda path: LogFile(path, 4096), "capture": lambda path: PcapngWriter(path, "x")}


def fifo(path):
    os.mkfifo(path)


def read_fifo(path):
    os.mkfifo(path)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def link(path):
    (path.parent / "there").touch()
    path.symlink_to(path.parent / "there")


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("make", [fifo, read_fifo, unix_socket, link])
def test_what_is_no_file_is_refused_at_once(make, writer, tmp_path):
    path = tmp_path / "it"
    reader = make(path)
    with pytest.raises(OSError, match="no file" if make is not link else "symbolic"):
        writer(path)
    if reader is not None:
        os.close(reader)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_device_is_refused(writer, tmp_path):
    """A log would be rotated, and the host be without its /dev/null."""
    with pytest.raises(OSError, match="no file"):
        writer("/dev/null")


@pytest.mark.parametrize("other", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_file_has_one_writer(writer, other, tmp_path):
    path = tmp_path / "it"
    one = writer(path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="another device"):
        other(path)
    assert path.read_bytes() == before  # not emptied either
    one.close()
    other(path).close()


@pytest.mark.parametrize(
    ("number", "opens"), [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)]
)
def test_a_file_system_without_locks(number, opens, tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outfile.fcntl, "flock", flock)
    before = descriptors()
    if opens:
        os.close(open_for_writing(tmp_path / "it"))
    else:
        with pytest.raises(OSError, match="Input/output"):
            open_for_writing(tmp_path / "it")
    assert descriptors() == before


def test_mode_and_what_is_kept(tmp_path):
    path = tmp_path / "it"
    path.write_bytes(b"before")
    fd = open_for_writing(path)
    os.write(fd, b" and after")
    os.close(fd)
    assert path.read_bytes() == b"before and after"
    os.close(open_for_writing(path, truncate=True))
    assert path.read_bytes() == b""
    os.close(open_for_writing(tmp_path / "new"))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
