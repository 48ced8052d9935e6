"""Ours with the profile oxenstored against Debian's: the same random actions, the same answers and events.

`make oracle ORACLE="--pair o"` (and `o-deaths`) goes on for as long as one likes.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.support.xenstored import needs
from tests.xenstore.oracle.duel import Pair
from tests.xenstore.oracle.oxen_script import OXENSTORED, OXENSTORED_DEATHS
from tests.xenstore.oracle.play import play
from tests.xenstore.oracle.test_oracle import StoreMachine

pytestmark = needs("o")


class OxenstoredMachine(StoreMachine):
    pair = OXENSTORED


class OxenstoredDeathsMachine(StoreMachine):
    pair = OXENSTORED_DEATHS


@pytest.mark.slow
@pytest.mark.parametrize("machine", [OxenstoredMachine, OxenstoredDeathsMachine])
@pytest.mark.parametrize("derandomize", [True, False], ids=["fixed", "new"])
def test_whatever_is_done_both_say_the_same(machine: type[StoreMachine], derandomize: bool) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=8,
            stateful_step_count=50,
            deadline=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("pair", [OXENSTORED, OXENSTORED_DEATHS], ids=["limits", "deaths"])
@pytest.mark.parametrize("seed", range(2))
def test_a_script(pair: Pair, seed: int) -> None:
    play(pair, seed, 150)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [OXENSTORED, OXENSTORED_DEATHS], ids=["limits", "deaths"])
def test_more_scripts(pair: Pair) -> None:
    for seed in (*range(2, 12), *(random.randrange(1 << 32) for _ in range(4))):
        play(pair, seed, 150)
