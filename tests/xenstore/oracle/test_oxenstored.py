"""What of oxenstored is not an answer to one request: credit for conflicts, long replies, many events.

Each test is done by Debian's oxenstored and by ours with that profile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.machine import PORT_BASE
from tests.support.probe import Probe
from tests.support.xenstored import DEADLINE, Xenstored, needs, start

Start = Callable[..., Xenstored]


@pytest.fixture(params=[pytest.param("o", marks=needs("o")), "ours-o"])
def begin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Starts the daemon; it is stopped in the end."""
    daemons = []

    def start_it(**options: object) -> Xenstored:
        daemons.append(start(request.param, tmp_path / "d", **options))  # type: ignore[arg-type]
        return daemons[0]

    yield start_it
    for daemon in daemons:
        daemon.stop()


def conflict(probe: Probe, victim: str, guilty: str, number: int) -> None:
    """A commit of `victim` fails, for what `guilty` wrote."""
    name = f"t{number}"
    assert probe.ask(f"{victim} START {name}") == "a transaction"
    probe.ask(f"{victim}@{name} READ /shared/x")
    assert probe.ask(f"{victim}@{name} WRITE /shared/y 1") == "OK"
    assert probe.ask(f"{guilty} WRITE /shared/x {number}") == "OK"
    assert probe.ask(f"{victim}@{name} END T") == "EAGAIN"


def test_who_makes_transactions_fail_is_not_listened_to(begin: Start) -> None:
    # Credit comes back too late for this test: nothing here goes by the clock.
    probe = Probe(begin(patience=1000))
    probe.ask("A WRITE /shared")
    probe.ask("A SET_PERMS /shared b0")
    for number in range(4):
        conflict(probe, "1", "2", number)
    conflict(probe, "1", "A", 4)
    conflict(probe, "A", "1", 5)
    assert probe.ask("2 READ /shared/x") == "5"
    waiting = probe.without("2")
    conflict(waiting, "1", "2", 6)
    probe.post("2 WRITE /shared/late 1")
    for _ in range(50):
        assert waiting.ask("A READ /shared/late") == "ENOENT"
        assert waiting.ask("1 READ /shared/late") == "ENOENT"


def test_only_who_did_it_is_to_blame(begin: Start) -> None:
    probe = Probe(begin(patience=1000))
    probe.ask("A WRITE /shared")
    probe.ask("A SET_PERMS /shared b0")
    for number in range(7):
        name = f"t{number}"
        probe.ask(f"A START {name}")
        probe.ask(f"A@{name} READ /shared/x")
        probe.ask(f"A@{name} WRITE /shared/y 1")
        assert probe.ask("1 WRITE /shared/z 1") == "OK"
        assert probe.ask(f"B WRITE /shared/x {number}") == "OK"
        assert probe.ask("2 WRITE /shared/z 2") == "OK", "nothing that the transaction looked at"
        assert probe.ask(f"A@{name} END T") == "EAGAIN"


def test_credit_comes_back(begin: Start) -> None:
    probe = Probe(begin(patience=0.002))
    probe.ask("A WRITE /shared")
    probe.ask("A SET_PERMS /shared b0")
    for number in range(20):
        conflict(probe, "1", "2", number)


def test_a_socket_gets_a_list_as_long_as_it_is_and_a_ring_does_not(begin: Start) -> None:
    probe = Probe(begin())
    for number in range(60):
        probe.ask(f"A MKDIR /local/domain/1/list/{number:02d}n*70")
    assert probe.ask("A DIRECTORY /local/domain/1/list") == "4379 bytes"
    assert probe.ask("1 DIRECTORY list") == "E2BIG"
    assert probe.ask("A START t") == "a transaction"
    assert probe.ask("A@t DIRECTORY /local/domain/1/list") == "4379 bytes"


def test_an_event_too_long_for_a_ring_is_an_error_there(begin: Start) -> None:
    probe = Probe(begin())
    assert probe.ask("A WATCH /local/domain/1 t*3500") == "OK, event /local/domain/1 3500 bytes"
    assert probe.ask("1 WATCH /local/domain/1 t*3500") == "OK, event /local/domain/1 3500 bytes"
    assert probe.ask("A WRITE /local/domain/1/n*700 1") == "OK, event 716 bytes 3500 bytes, 1: E2BIG"


def test_no_event_is_lost_or_merged(begin: Start) -> None:
    probe = Probe(begin())
    probe.ask("1 WATCH /shared t")
    probe.ask("A WRITE /shared")
    probe.ask("A SET_PERMS /shared r0")
    quiet = probe.without("1")
    for _ in range(200):
        assert quiet.ask("A WRITE /shared/x 1") == "OK"
    assert probe.ask("1 READ /shared/x") == ", ".join(["event /shared/x t"] * 200 + ["1"])


def test_a_domain_that_stops_is_told_of_each_time(begin: Start) -> None:
    daemon = begin()
    probe = Probe(daemon)
    probe.ask("A WATCH @releaseDomain t")
    quiet = probe.without("1").without("2")
    daemon.shutdown(1)
    while (said := quiet.ask("A READ /none")) == "ENOENT":
        pass
    assert said == "event @releaseDomain t, ENOENT"
    assert probe.ask("1 READ /none") == "ENOENT", "it is served all the same"


def test_a_guest_begins_anew(begin: Start) -> None:
    """The feature RECONNECTION: what was in its rings and what it had open is gone."""
    daemon = begin()
    probe = Probe(daemon)

    page = probe.rings[1].page
    assert page.features == 1
    assert probe.ask("1 START t") == "a transaction"
    assert probe.ask("1@t WRITE x 1") == "OK"
    page.write(b"\xff" * 5)  # the beginning of something
    page.connection = 1
    daemon.machine.raise_port(PORT_BASE + 1)
    end = time.monotonic() + DEADLINE
    while page.connection:
        assert time.monotonic() < end
    assert not page.readable
    assert probe.ask("1@t WRITE x 2") == "EIO"
    assert probe.ask("1 START t") == "a transaction"
    assert probe.ask("1@t WRITE x 3") == "OK"
    assert probe.ask("1@t END T") == "OK"
    assert probe.ask("A READ /local/domain/1/x") == "3"


def test_the_last_number_of_all_is_nobody(begin: Start) -> None:
    """OCaml's integers have 63 bits, and -1 owns what is to go."""
    probe = Probe(begin())
    for name, perm in (("a", "n0x7fffffffffffffff"), ("b", "n-1"), ("c", "n4611686018427387903")):
        assert probe.ask(f"A WRITE /{name} 1") == "OK"
        assert probe.ask(f"A SET_PERMS /{name} {perm}") == "OK"
    assert probe.ask("A SET_PERMS /c n4611686018427387904") == "EINVAL"
    assert probe.ask("A GET_PERMS /a") == "n9223372036854775807"
    assert probe.ask("A GET_PERMS /b") == "n9223372036854775807"
    assert probe.ask("A RELEASE 2") == "OK"
    assert probe.ask("A READ /a") == "ENOENT"
    assert probe.ask("A READ /b") == "ENOENT"
    assert probe.ask("A GET_PERMS /c") == "n4611686018427387903"


def test_the_root_is_nobodys_after_its_owner(begin: Start) -> None:
    """And what is made below it goes with whoever dies next."""
    probe = Probe(begin())
    assert probe.ask("A SET_PERMS / b1 r2") == "OK"
    assert probe.ask("2 WRITE /a/b x") == "EACCES"
    assert probe.ask("1 WRITE /a/b x") == "OK"
    assert probe.ask("A RELEASE 1") == "OK"
    assert probe.ask("A GET_PERMS /") == "b9223372036854775807 r2"
    assert probe.ask("A DIRECTORY /") == "@introduceDomain @releaseDomain local tool"
    assert probe.ask("A MKDIR /a") == "OK"
    assert probe.ask("A GET_PERMS /a") == "b9223372036854775807 r2"
    assert probe.ask("A RELEASE 2") == "OK"
    assert probe.ask("A GET_PERMS /") == "b9223372036854775807"
    assert probe.ask("A DIRECTORY /") == "@introduceDomain @releaseDomain local tool"
