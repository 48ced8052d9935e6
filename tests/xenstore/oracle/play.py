"""Scripts played with random numbers, fast and for as long as one likes; a divergence is made short.

python -m tests.xenstore.oracle.play --minutes 60
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Iterable

from tests.xenstore.oracle.duel import Action, Divergence, Duel, Pair
from tests.xenstore.oracle.oxen_script import OXENSTORED, OXENSTORED_DEATHS, OxenScript
from tests.xenstore.oracle.script import QUOTAS, Script

PAIRS = {"c": Pair(quotas=QUOTAS), "o": OXENSTORED, "o-deaths": OXENSTORED_DEATHS}


def script_of(pair: Pair) -> Script:
    return OxenScript(pair) if pair.reference == "o" else Script(pair)


def play(pair: Pair, seed: int, length: int) -> None:
    """One script of that many actions. Divergence."""
    choice = random.Random(seed).choice
    with Duel(pair) as duel:
        script = script_of(pair)
        for action in script.prologue():
            script.learn(action, duel.do(action))
        for _ in range(length):
            for action in script.next(choice):
                script.learn(action, duel.do(action))
        script.epilogue(duel.ask)


def replay(pair: Pair, actions: Iterable[Action]) -> Divergence | None:
    """The same actions once more, and what differs, if anything does."""
    with Duel(pair) as duel:
        try:
            for action in actions:
                duel.do(action)
        except Divergence as divergence:
            return divergence
    return None


def shorten(pair: Pair, actions: list[Action], seconds: float = 60.0) -> list[Action]:
    """A shorter list that diverges as well: ever smaller pieces are left out, for at most that time."""
    until = time.monotonic() + seconds
    piece = len(actions) // 2
    while piece:
        at = 0
        while at < len(actions) and time.monotonic() < until:
            rest = actions[:at] + actions[at + piece :]
            try:
                fails = replay(pair, rest) is not None
            except (OSError, ValueError, AssertionError):
                fails = False  # what is left makes no sense
            if fails:
                actions = rest
            else:
                at += piece
        piece //= 2
    return actions


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.xenstore.oracle.play", description=__doc__)
    parser.add_argument("--pair", choices=PAIRS, default="c")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--length", type=int, default=150, help="actions of one script")
    parser.add_argument("--seed", type=int, default=None, help="of the first script; the next is one more")
    options = parser.parse_args()
    pair = PAIRS[options.pair]
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    # Ours says why it does not introduce a domain that is gone.
    logging.disable()
    began = time.monotonic()
    scripts = 0
    while time.monotonic() - began < options.minutes * 60:
        try:
            play(pair, seed + scripts, options.length)
        except Divergence as divergence:
            print(f"script {seed + scripts} diverges; what is left of it:", file=sys.stderr)
            short = replay(pair, shorten(pair, list(divergence.actions)))
            print(short or divergence, file=sys.stderr)
            return 1
        scripts += 1
    minutes = (time.monotonic() - began) / 60
    print(f"{scripts} scripts from seed {seed} on, {Duel.compared} answers compared, {minutes:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
