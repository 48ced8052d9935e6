"""Ours against Debian's C xenstored: the same random actions, the same answers and events in the same order.

Scripts from fixed seeds and a few new ones, some of them chosen by hypothesis; `make oracle` goes on for as
long as one likes.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from tests.support.xenstored import needs
from tests.xenstore.oracle.duel import Action, Duel
from tests.xenstore.oracle.play import PAIRS, play, script_of

C = PAIRS["c"]


class StoreMachine(RuleBasedStateMachine):
    """A script with hypothesis choosing: what diverges comes out as small as it gets."""

    pair = C

    def __init__(self) -> None:
        super().__init__()
        self.duel = Duel(self.pair)
        self.script = script_of(self.pair)
        self.agree = False

    def teardown(self) -> None:
        try:
            if self.agree:
                self.script.epilogue(self.duel.ask)
        finally:
            self.duel.close()

    def _do(self, actions: list[Action]) -> None:
        self.agree = False
        for action in actions:
            self.script.learn(action, self.duel.do(action))
        self.agree = True

    @initialize()
    def begin(self) -> None:
        self._do(self.script.prologue())

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        self._do(self.script.next(lambda options: data.draw(st.sampled_from(options))))


@needs("c")
@pytest.mark.slow
@pytest.mark.parametrize("derandomize", [True, False], ids=["fixed", "new"])
def test_whatever_is_done_both_say_the_same(derandomize: bool) -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=20,
            stateful_step_count=50,
            deadline=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


@needs("c")
@pytest.mark.parametrize("seed", range(4))
def test_a_script(seed: int) -> None:
    play(C, seed, 150)


@needs("c")
@pytest.mark.slow
def test_more_scripts() -> None:
    for seed in (*range(4, 30), *(random.randrange(1 << 32) for _ in range(4))):
        play(C, seed, 150)
