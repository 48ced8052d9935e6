"""The host's directory: names, modes, paths that are too long, the lock; logs that do not grow."""

import asyncio
import os
import stat

import pytest
from tests.support.hosts import place

from xenbus.domain.layout import HostLayout, check_name
from xenbus.domain.logs import keep_bounded, last_words, rotate
from xenbus.errors import UsageError


@pytest.mark.parametrize("name", ["guest", "a", "Domain-0", "x.y_z+1", "1a", "a" * 63])
def test_names_that_are_taken(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-x", "a/b", "../a", "a b", "a\n", "a\0", "ä", "a" * 64, "7", "007"]
)
def test_names_that_are_not(name):
    with pytest.raises(UsageError, match="a domain's name"):
        check_name(name)


def test_what_is_made_is_its_owners_alone():
    with place() as short:
        _check_modes(short / "a" / "host")


def _check_modes(root):
    layout = HostLayout(root)
    before = os.umask(0)
    try:
        layout.make()
        layout.make()  # what is there is no error
        os.close(layout.lock())
    finally:
        os.umask(before)
    for folder in (root, root / "control", root / "log", root / "xenstored"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    assert stat.S_IMODE((root / "lock").stat().st_mode) == 0o600


def test_a_path_that_no_socket_could_have_is_refused_before_anything_is_made(tmp_path):
    root = tmp_path / ("x" * 100)
    with pytest.raises(UsageError, match="107 bytes"):
        HostLayout(root).make()
    assert not root.exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    root = tmp_path / place
    with pytest.raises(UsageError, match=str(root)):
        HostLayout(root).make()


def test_the_lock_is_held_by_whoever_has_the_descriptor(tmp_path):
    layout = HostLayout(tmp_path)
    first = layout.lock()
    inherited = os.dup(first)
    with pytest.raises(BlockingIOError):
        layout.lock()
    os.close(first)
    with pytest.raises(BlockingIOError):
        layout.lock()
    os.close(inherited)
    os.close(layout.lock())
    with pytest.raises(UsageError, match="lock"):
        HostLayout(tmp_path / "nowhere").lock()


def test_a_log_is_bounded_and_its_writer_goes_on(tmp_path):
    path = tmp_path / "guest.log"

    async def main():
        task = asyncio.create_task(keep_bounded(tmp_path, limit=1000, every=0.01))
        with path.open("ab", buffering=0) as writer:
            for number in range(100):
                writer.write(b"line %3d of the log\n" % number)
            async with asyncio.timeout(5):
                while path.stat().st_size > 1000:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            writer.write(b"the last line\n")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert path.read_bytes() == b"the last line\n"
    old = (tmp_path / "guest.log.1").read_bytes()
    assert len(old) == 1000 and old.endswith(b"line  99 of the log\n")


def test_a_short_log_can_be_rotated_too(tmp_path):
    path = tmp_path / "a.log"
    path.write_bytes(b"x")
    rotate(path, 10)
    assert path.read_bytes() == b"" and (tmp_path / "a.log.1").read_bytes() == b"x"


def test_last_words(tmp_path):
    path = tmp_path / "a.log"
    assert "No such file" in last_words(path)
    path.write_bytes(b"\n")
    assert "said nothing" in last_words(path)
    path.write_bytes(b"x" * 100_000 + b"\nthe error\xff\n\n")
    assert last_words(path) == "the error\ufffd"
