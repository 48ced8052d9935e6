"""Debian's programs say the same on ours with the profile oxenstored and on Debian's oxenstored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.xenstored import Xenstored
from tests.xenstore.peers import test_programs
from tests.xenstore.peers.conftest import Both, served

pytestmark = pytest.mark.slow

# Where the daemon writes what it is: Debian's the path of its program.
OWN_NAME = "/tool/xenstored"


@pytest.fixture(scope="module")
def ours() -> Iterator[Xenstored]:
    with served("ours-o") as daemon:
        yield daemon


@pytest.mark.parametrize(
    "programs",
    [
        test_programs.test_write_and_read,
        test_programs.test_values_that_are_no_text,
        test_programs.test_list_and_ls,
        test_programs.test_exists,
        test_programs.test_rm,
        test_programs.test_chmod,
        test_programs.test_the_xenstore_program,
        test_programs.test_control,
        test_programs.test_watch_and_its_wrong_words,
    ],
)
def test_programs_of_both(both_oxenstored: Both, programs: Callable[[Both], None]) -> None:
    for daemon in (both_oxenstored.theirs, both_oxenstored.ours):
        daemon.toolstack.write(OWN_NAME, "")
    programs(both_oxenstored)


@pytest.mark.parametrize("which", ["theirs", "ours"])
def test_watch(both_oxenstored: Both, which: str) -> None:
    test_programs.test_watch(both_oxenstored, which)


def test_xens_own_test_program(ours: Xenstored, tmp_path: Path) -> None:
    test_programs.test_xens_own_test_program(ours, tmp_path)
