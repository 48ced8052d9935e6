"""What a killed xnb leaves at any moment, and what the next one makes of it.

The front checks ids, statuses, pages and bytes: see vif_lives.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.vif_lives import Life, World, finish

from xenbus.ring.shared import MASK

GROUP, OTHER = bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")


def in_loop(test):
    """For timers that are set, and never run."""

    async def main():
        return test()

    return asyncio.run(main())


def traffic(world, life):
    """Packets of all kinds, both ways, over the end of both rings; a chain whose end comes later; groups."""
    for turn in range(3):
        for queue in range(world.queues):
            world.post(queue, world.slots)
            for size in (60, 1514, 61):
                assert world.send(queue, size)
        life.kick()
        for queue in range(world.queues):
            assert world.send(queue, 9000)
            assert world.send(queue, 10)
            assert world.send(queue, 14000, gso=True)
            assert world.join(queue, GROUP) and world.join(queue, OTHER, add=turn != 1)
        life.give([(60, False)] * 2 + [(9000, False), (100, False), (5000, True)])
        life.kick()
        world.collect()


@pytest.mark.parametrize("mapped", [False, True], ids=["copied", "mapped"])
@pytest.mark.parametrize(("queues", "start"), [(1, 0), (1, MASK - 4), (2, 7)])
def test_killed_between_any_two_stores(queues, start, mapped):
    def test():
        world = World(queues, 16, start)
        life = Life(world, resumes=False, mapped=mapped)
        seen = world.watch(lambda: traffic(world, life))
        world.check(lossless=True)
        assert len(seen) > 100 * queues
        for n, each in enumerate(seen):
            finish(world.fork(each, random.Random(n)), mapped=mapped)
            after = world.fork(each)
            after.collect()
            finish(after, mapped=mapped)

    in_loop(test)


ACTS = st.one_of(
    st.tuples(st.just("send"), st.sampled_from([60, 1514, 9000, 10])),
    st.tuples(st.just("gso"), st.sampled_from([3000, 14000])),
    st.tuples(st.just("join"), st.booleans()),
    st.tuples(st.just("post"), st.integers(1, 16)),
    st.tuples(st.just("collect"), st.just(0)),
    st.tuples(st.just("kick"), st.none()),
    st.tuples(
        st.just("give"), st.lists(st.tuples(st.sampled_from([60, 1514, 9000]), st.booleans()), max_size=5)
    ),
)


@pytest.mark.slow
@given(
    st.lists(st.tuples(ACTS, st.integers(0, 1), st.none() | st.floats(0, 1)), max_size=40),
    st.integers(1, 2),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_any_story_with_any_deaths(story, queues, mapped):
    """Each death is somewhere in what the back end does just then; the next one dies as it begins."""

    def test():
        world = World(queues, 16, MASK - 20)
        life, deaths = Life(world, resumes=False, mapped=mapped), 0
        for (what, how), queue, dies in story:
            doing = None
            match what:
                case "send" | "gso":
                    world.send(queue % queues, how, what == "gso")
                case "join":
                    world.join(0, GROUP, add=how)  # two rings have no order
                case "post":
                    world.post(queue % queues, how)
                case "collect":
                    world.collect()
                case "kick":
                    doing = life.kick
                case "give":
                    doing = partial(life.give, how)
            if doing is not None and dies is None:
                doing()
            elif doing is not None:
                for _ in range(2):
                    seen = world.watch(doing)
                    deaths += 1
                    world = world.fork(seen[int(dies * (len(seen) - 1))], random.Random(deaths))
                    doing = partial(Life, world, resumes=True, mapped=mapped)
                life = Life(world, resumes=True, mapped=mapped)
        finish(world, None if deaths else life, mapped=mapped)
        world.check(lossless=not deaths)

    in_loop(test)
