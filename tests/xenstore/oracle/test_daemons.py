"""The three daemons of `tests/support/xenstored.py` serve sockets and rings, and hear of domains' ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.until import descriptors
from tests.support.xenstored import DEADLINE, KINDS, Xenstored, needs, start

from xenbus.errors import Denied, NoEntry
from xenbus.xenstore.sync import SyncClient


@pytest.fixture(params=[pytest.param(kind, marks=needs(kind)) for kind in KINDS])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Xenstored]:
    with start(request.param, tmp_path) as daemon:
        yield daemon


Connect = Callable[[Xenstored], SyncClient]


def on_the_socket(daemon: Xenstored) -> SyncClient:
    return SyncClient(daemon.connect(), DEADLINE)


def on_a_ring(daemon: Xenstored) -> SyncClient:
    return SyncClient(daemon.introduce(1), DEADLINE)


@pytest.mark.parametrize("connect", [on_the_socket, on_a_ring])
def test_write_read_watch(daemon: Xenstored, connect: Connect) -> None:
    client = connect(daemon)
    home = "/local/domain/1/data"
    client.write(home, "one")
    assert client.read(home) == b"one"
    watch = client.watch(home, lambda path: None)
    assert client.poll_watch(DEADLINE) == (watch, home)
    daemon.toolstack.write(f"{home}/deep", bytes(1900))
    assert client.poll_watch(DEADLINE) == (watch, f"{home}/deep")
    assert client.read(f"{home}/deep") == bytes(1900), "longer than the ring"
    daemon.toolstack.rm(home)
    assert client.poll_watch(DEADLINE) == (watch, home)
    with pytest.raises(NoEntry):
        client.read(home)


def test_a_guest_has_a_guests_rights_and_relative_paths(daemon: Xenstored) -> None:
    guest = on_a_ring(daemon)
    guest.write("mine", "1")
    assert daemon.toolstack.read("/local/domain/1/mine") == b"1"
    daemon.toolstack.write("/secret", "s")
    with pytest.raises(Denied):
        guest.read("/secret")


@pytest.mark.parametrize("end", [Xenstored.kill, Xenstored.shutdown])
def test_the_end_of_a_domain_fires(daemon: Xenstored, end: Callable[[Xenstored, int], None]) -> None:
    on_a_ring(daemon)
    watch = daemon.toolstack.watch("@releaseDomain", lambda path: None)
    assert daemon.toolstack.poll_watch(DEADLINE) == (watch, "@releaseDomain")
    assert daemon.toolstack.is_introduced(1)
    end(daemon, 1)
    assert daemon.toolstack.poll_watch(DEADLINE) == (watch, "@releaseDomain")
    assert daemon.toolstack.is_introduced(1) == (end is Xenstored.shutdown)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in KINDS])
def test_nothing_stays(kind: str, tmp_path: Path) -> None:
    start(kind, tmp_path / "first").stop()
    before = descriptors()
    with start(kind, tmp_path / "second") as daemon:
        on_a_ring(daemon).write("a", "1")
        daemon.connect()
        assert daemon.socket.is_socket()
    assert descriptors() == before
