"""What every hypervisor of ours must do, run on each: in one process, by the broker with its handles in one
process, and by the broker with its domains in processes of their own."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.hypervisor_actor import open_files
from tests.support.hypervisor_rigs import DENIED, BrokerRig, EmbeddedRig, ProcessRig, not_ours, refused
from xenbus.errors import LinkDown, UsageError
from xenbus.hypervisor.interface import (
    GNTST_bad_copy_arg,
    GNTST_bad_gntref,
    GNTST_general_error,
    GNTST_okay,
)
from xenbus.hypervisor.limits import Limits

DEADLINE = 10


@pytest.fixture(scope="module")
def children():
    kept = {}
    yield kept
    for child in kept.values():
        child.kill()


@pytest.fixture(params=[EmbeddedRig, BrokerRig, ProcessRig], ids=["embedded", "broker", "processes"])
def run(request, children):
    """run(test, limits=...): calls the coroutine function with a rig, and counts descriptors."""

    def runner(test, limits=None):
        async def main():
            rig = request.param(children, limits)
            try:
                await asyncio.wait_for(test(rig), 3 * DEADLINE)
            finally:
                await rig.close()

        before = open_files()
        alive = len(children)
        asyncio.run(main())
        # A child that stays for the next test keeps its one socket here.
        assert open_files() - before == len(children) - alive

    return runner


def test_a_grant_is_shared_memory(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        pages, refs = await front.alloc(0, 3)
        assert len(set(refs)) == 3 and min(refs) >= 8
        assert await front.peek(pages, 0, 3 * 4096) == bytes(3 * 4096)
        mapping = await back.map(1, refs)
        await front.poke(pages, 4090, b"across a page")
        assert await back.peek(mapping, 4090, 13) == b"across a page"
        await back.poke(mapping, 0, b"back")
        assert await front.peek(pages, 0, 4) == b"back"
        assert await back.held() == [0, 3, 0]
        assert rig.host.held(0).mapped_pages == 3 and rig.host.held(1).granted_pages == 3 + 1
        await back.unmap(mapping)
        await back.unmap(mapping)
        await front.revoke(pages)
        await front.revoke(pages)
        assert rig.host.held(0).mapped_pages == 0 and rig.host.held(1).granted_pages == 1
        with pytest.raises((ValueError, AssertionError)):
            await back.peek(mapping, 0, 1)
        with pytest.raises((ValueError, AssertionError)):
            await front.peek(pages, 0, 1)

    run(test)


def test_refs_in_any_order_make_one_row(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        one, refs1 = await front.alloc(0, 3)
        two, refs2 = await front.alloc(0, 300)  # more than an arena of the first size has left
        three, refs3 = await front.alloc(0, 1, False)
        for n in range(3):
            await front.poke(one, n * 4096, b"one%d" % n)
        await front.poke(two, 299 * 4096, b"two!")
        await front.poke(three, 0, b"three")
        order = [refs1[2], refs2[299], refs1[0], refs1[1], refs1[2]]
        mapping = await back.map(1, order)
        for n, expected in enumerate((b"one2", b"two!", b"one0", b"one1", b"one2")):
            assert await back.peek(mapping, n * 4096, 4) == expected
        await back.poke(mapping, 4096, b"back")
        assert await front.peek(two, 299 * 4096, 4) == b"back"
        mixed = await back.map(1, [refs3[0], refs1[0]], False)
        assert await back.peek(mixed, 0, 5) == b"three"
        assert await back.poke(mixed, 4096, b"x") == "TypeError"
        await back.unmap(mapping)
        assert await back.peek(mixed, 4096, 4) == b"one0"
        kept = await back.keep_slice(mixed, 4096, 4)
        await back.unmap(mixed)
        assert await back.peek_slice(kept) in (b"one0", bytes(4))  # late, and no crash
        assert await back.held() == [0, 0, 0]

    run(test)


def test_thousands_of_pages_stay_mapped(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        grants = [await front.alloc(0, 100) for _ in range(20)]
        single = []
        for pages, refs in grants:
            await front.poke(pages, 99 * 4096, refs[99].to_bytes(4, "little"))
            single.append((await back.map(1, refs), refs[99]))
        scattered = await back.map(1, [refs[99] for _, refs in reversed(grants)])
        for mapping, ref in single:
            assert await back.peek(mapping, 99 * 4096, 4) == ref.to_bytes(4, "little")
        for n, (_, ref) in enumerate(reversed(single)):
            assert await back.peek(scattered, n * 4096, 4) == ref.to_bytes(4, "little")
        assert rig.host.held(0).mapped_pages == 2020

    run(test)


def test_read_only_is_read_only(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        pages, refs = await front.alloc(0, 2, False)
        await front.poke(pages, 0, b"fixed")
        await refused("EPERM", back.map(1, refs, True))
        mapping = await back.map(1, refs, False)
        assert await back.peek(mapping, 0, 5) == b"fixed"
        assert await back.poke(mapping, 0, b"x") == "TypeError"
        await front.poke(pages, 0, b"after")  # the owner still writes
        assert await back.peek(mapping, 0, 5) == b"after"
        writable, refs = await front.alloc(0, 1)
        mapping = await back.map(1, refs, False)
        assert await back.poke(mapping, 0, b"x") == "TypeError"
        assert await front.peek(writable, 0, 1) == b"\0"

    run(test)


def test_only_the_grantee_maps(run):
    async def test(rig):
        back, front, other = await rig.domain(0), await rig.domain(1), await rig.domain(2)
        _, refs = await front.alloc(0, 2)
        await refused("EPERM", other.map(1, refs))
        await refused("EPERM", other.map(1, refs, False))
        await refused("EPERM", other.map(1, [1]))  # the store's page of another guest
        await refused("EPERM", front.map(1, refs))
        _, theirs = await front.alloc(2, 1)
        await refused("EPERM", back.map(1, [refs[0], theirs[0]]))  # all or nothing
        assert rig.host.held(0).mapped_pages == 0
        assert (await other.copy([[1, refs[0], 0, 16]]))[0][0] in DENIED
        await back.map(1, refs)

    run(test)


def test_refs_that_are_not_there(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        pages, refs = await front.alloc(0, 2)
        await refused("ENOENT", back.map(1, [refs[0], 4_000_000_000]))
        await refused("ENOENT", back.map(1, [0]))
        await refused("ENOENT", back.map(1, [-1]))
        await refused("ENOENT", back.map(1, [1 << 32]))
        await refused("ENOENT", back.map(7, refs))
        await front.revoke(pages)
        await refused("ENOENT", back.map(1, refs))
        for call in (back.map(1, []), back.alloc(1, 0), back.alloc(0x7FF0, 1), back.map(-1, [8])):
            with pytest.raises(UsageError):
                await call
        assert await back.held() == [0, 0, 0]

    run(test)


def test_a_page_is_reused_after_its_last_unmap_and_zeroed(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        pages, refs = await front.alloc(0, 1)
        await front.poke(pages, 0, b"old")
        first, second = await back.map(1, refs), await back.map(1, refs)
        await front.revoke(pages)
        assert await back.peek(first, 0, 3) == b"old"  # revoking stops new maps only
        await back.unmap(first)
        new = [await front.alloc(0, 1) for _ in range(4)]
        for number, _ in new:
            await front.poke(number, 0, b"new")
        assert await back.peek(second, 0, 3) == b"old"
        await back.poke(second, 0, b"bad")
        for number, _ in new:
            assert await front.peek(number, 0, 3) == b"new"
        await back.unmap(second)
        for number, _ in new:
            await front.revoke(number)
        number, _ = await front.alloc(0, 250)
        assert await front.peek(number, 0, 4096 * 4) == bytes(4096 * 4)
        for _ in range(20):  # grants come and go without a limit in sight
            number, _ = await front.alloc(0, 1)
            await front.revoke(number)
        assert rig.host.held(1).granted_pages == 250 + 1

    run(test)


def test_grant_copy(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        pages, (ref, second) = await front.alloc(0, 2)
        fixed, (fixed_ref,) = await front.alloc(0, 1, False)
        await front.poke(pages, 100, b"from there")
        await front.poke(fixed, 0, b"fixed")
        status, local = await back.copy(
            [
                [1, ref, 100, 10],
                [1, second, 4092, b"end!"],
                [1, ref, 4000, 97],  # beyond the page
                [1, ref, -1, 4],
                [1, 999_999, 0, 4],
                [1, fixed_ref, 0, b"no"],
                [1, fixed_ref, 0, 5],
                [9, ref, 0, 4],
            ]
        )
        assert status[:5] == [
            GNTST_okay,
            GNTST_okay,
            GNTST_bad_copy_arg,
            GNTST_bad_copy_arg,
            GNTST_bad_gntref,
        ]
        assert status[5] in DENIED and status[6] == GNTST_okay
        assert status[7] < 0
        assert local[0] == b"from there" and local[6] == b"fixed"
        assert await front.peek(pages, 4096 + 4092, 4) == b"end!"
        await back.barrier()
        assert rig.host.held(0).mapped_pages == 0
        await front.revoke(pages)
        assert (await back.copy([[1, ref, 0, 4]]))[0][0] in (GNTST_bad_gntref, GNTST_general_error)

    run(test)


def test_event_channels_carry_levels_both_ways(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        mine, port = await front.port(0)
        theirs = await back.bind(1, port)
        assert await back.fired(theirs, 1) == 1  # a fresh binding fires once
        assert await front.fired(mine, 0) == 0
        await back.notify(theirs)
        assert await front.fired(mine, 1) == 1
        await front.notify(mine)
        assert await back.fired(theirs, 2) == 2
        # A second pair between the same two does not disturb the first.
        mine2, port2 = await front.port(0)
        theirs2 = await back.bind(1, port2)
        await back.fired(theirs2, 1)
        await back.notify(theirs2)
        assert await front.fired(mine2, 1) == 1
        assert await front.fired(mine, 1) == 1 and await back.fired(theirs, 2) == 2
        before = await back.fired(theirs, 2)
        await front.notify(mine, 50)
        assert before < await back.fired(theirs, before + 1) <= before + 50

    run(test)


def test_what_was_published_before_the_last_kick_is_seen(run):
    """However kicks and handlers interleave: what a ring stands on."""

    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        pages, refs = await front.alloc(0, 1)
        mapping = await back.map(1, refs)
        word = back.things[mapping].view[:4].cast("I")
        _, port = await front.port(0)
        last, done = 20_000, asyncio.Event()

        def look():
            if word[0] == last:
                done.set()

        mine, my_port = await front.port(0)
        channel = await back.bind_handler(1, my_port, look)
        other = await back.bind(1, port)  # a second channel of the same link, quiet
        await front.barrier()
        await front.count_up(mine, pages, last)
        await asyncio.wait_for(done.wait(), DEADLINE)
        assert await back.fired(other, 1) == 1
        word.release()
        await channel.close()

    run(test)


def test_masked_stays_pending_and_fires_once(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        mine, port = await front.port(0)
        theirs = await back.bind(1, port)
        await back.fired(theirs, 1)
        await front.mask(mine)
        for _ in range(3):
            await back.notify(theirs)
            assert await front.fired(mine, 0) == 0
        await front.unmask(mine)
        assert await front.fired(mine, 1) == 1
        await front.unmask(mine)
        assert await front.fired(mine, 1) == 1
        await front.mask(mine)
        await front.unmask(mine)
        assert await front.fired(mine, 1) == 1  # nothing was pending
        await back.notify(theirs)
        assert await front.fired(mine, 2) == 2

    run(test)


def test_masked_at_once_even_its_first_event_waits(run):
    """So the bus hands out a channel before its handler runs."""

    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        _, port = await front.port(0)
        theirs = await back.bind_masked(1, port)
        for _ in range(3):
            assert await back.fired(theirs, 0) == 0
        await back.unmask(theirs)
        assert await back.fired(theirs, 1) == 1

    run(test)


def test_who_may_bind(run):
    async def test(rig):
        back, front, other = await rig.domain(0), await rig.domain(1), await rig.domain(2)
        _, port = await front.port(0)
        await refused(not_ours(rig), other.bind(1, port))
        await refused(not_ours(rig), other.bind(1, rig.host.store_port(1)))
        await refused("ENOENT", back.bind(1, 77_777))
        await refused("ENOENT", back.bind(9, port))
        ports = rig.host.held(0).ports
        number = await back.bind(1, port)
        await refused(not_ours(rig), back.bind(1, port))
        assert rig.host.held(0).ports == ports + 1
        await back.close_port(number)
        assert rig.host.held(0).ports == ports

    run(test)


def test_a_closed_end_leaves_the_other_unbound(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        mine, port = await front.port(0)
        theirs = await back.bind(1, port)
        await back.fired(theirs, 1)
        await back.close_port(theirs)
        await back.close_port(theirs)
        await front.barrier()
        await front.notify(mine)  # no one there, no error
        assert await back.fired(theirs, 0) == 1
        again = await back.bind(1, port)  # unbound again, for the same domain
        assert await back.fired(again, 1) <= 2  # may also hear the kick from when nobody was there
        await back.notify(again)
        assert await front.fired(mine, 1) >= 1
        await front.close_port(mine)
        await back.barrier()
        await back.notify(again)
        await refused("ENOENT", back.bind(1, port))
        assert await back.held() == [0, 0, 1]

    run(test)


def test_start_info_and_the_store_s_side_of_it(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        ring = await back.map(1, [1])
        store = await back.bind(1, rig.host.store_port(1))
        await back.notify(store)  # before the guest has asked
        channel, page = await front.start()
        assert await front.fired(channel, 1) == 1
        await front.poke(page, 0, b"request")
        assert await back.peek(ring, 0, 7) == b"request"
        await front.notify(channel)
        assert await back.fired(store, 2) == 2
        with pytest.raises(UsageError):
            rig.host.store_port(0)
        await refused("ENOENT", back.start())

    run(test)


def test_suspend_cancelled_changes_nothing(run):
    async def test(rig):
        back, front = await rig.domain(0), await rig.domain(1)
        pages, refs = await front.alloc(0, 1)
        mapping = await back.map(1, refs)
        mine, port = await front.port(0)
        theirs = await back.bind(1, port)
        with pytest.raises(UsageError):
            rig.host.resume(1, cancelled=True)
        await front.suspend()
        await asyncio.wait_for(rig.host.suspended(1), DEADLINE)
        rig.host.resume(1, cancelled=True)
        assert await front.resumed() == [True, 1]
        await front.poke(pages, 0, b"same")
        assert await back.peek(mapping, 0, 4) == b"same"
        await back.notify(theirs)
        assert await front.fired(mine, 1) == 1
        assert rig.dead == []

    run(test)


def test_resume_under_a_new_domid_starts_with_nothing(run):
    async def test(rig):
        back, front = await rig.domain(0, privileged=True), await rig.domain(1)
        other = await rig.domain(2)
        channel, page = await front.start()
        store = await back.bind(1, rig.host.store_port(1))
        pages, refs = await front.alloc(0, 1)
        await front.poke(pages, 0, b"before")
        mapping = await back.map(1, refs)
        _, theirs = await back.alloc(1, 3)
        mapped = await front.map(0, theirs)
        kept = await front.keep_slice(mapped, 0, 4)
        mine, port = await front.port(0)
        await front.suspend()
        await asyncio.wait_for(rig.host.suspended(1), DEADLINE)
        with pytest.raises(UsageError):
            rig.host.resume(1, new_domid=2)
        rig.host.resume(1, new_domid=5)
        assert await front.resumed() == [False, 5]
        assert await back.deaths() == [1]
        assert rig.host.held(5) == type(rig.host.held(5))(1, 0, 1)
        for gone in (pages, mapped, page):
            with pytest.raises((ValueError, AssertionError)):
                await front.peek(gone, 0, 1)
        assert len(await front.peek_slice(kept)) == 4
        await front.notify(mine)
        await front.unmap(mapped)
        await front.revoke(pages)
        await front.close_port(mine)
        await back.notify(store)
        assert await back.peek(mapping, 0, 6) == b"before"  # until the peer lets go
        await back.unmap(mapping)
        await refused("ENOENT", back.map(1, refs))
        await refused("ENOENT", back.bind(1, port))
        await refused("EPERM", front.map(0, theirs))  # granted to domain 1
        # Fresh start info under the new id, and everything works again.
        channel, page = await front.start()
        ring = await back.map(5, [1])
        assert await back.peek(ring, 0, 4096) == bytes(4096)
        store = await back.bind(5, rig.host.store_port(5))
        await back.notify(store)
        assert await front.fired(channel, 1) == 1
        await front.poke(page, 0, b"anew")
        assert await back.peek(ring, 0, 4) == b"anew"
        _, refs = await front.alloc(0, 2)
        await back.map(5, refs)
        assert await other.held() == await other.held()

    run(test)


def test_a_killed_domain_gives_everything_back(run):
    async def test(rig):
        back, front, other = await rig.domain(0, privileged=True), await rig.domain(1), await rig.domain(2)
        base = await back.fds()
        pages, refs = await front.alloc(0, 4)
        await front.poke(pages, 0, b"last words")
        _, theirs = await back.alloc(1, 2)
        await front.map(0, theirs)
        _, others = await other.alloc(1, 1)
        await front.map(2, others)
        mapping = await back.map(1, refs)
        _, port = await front.port(0)
        channel = await back.bind(1, port)
        mine, back_port = await back.port(1)
        await front.bind(0, back_port)
        await rig.kill(front)
        await asyncio.wait_for(rig.died.wait(), DEADLINE)
        assert rig.dead == [1]
        assert rig.host.held(1) == type(rig.host.held(1))(0, 0, 0)
        assert await back.deaths() == [1]
        await back.notify(channel)
        await back.notify(mine)
        assert await back.peek(mapping, 0, 10) == b"last words"
        await refused("ENOENT", back.map(1, refs))
        await refused("ENOENT", back.bind(1, port))
        await back.unmap(mapping)
        await back.close_port(channel)
        await back.barrier()
        assert await back.fds() <= base
        with pytest.raises(UsageError):
            rig.host.store_port(1)

    run(test)


def test_a_domain_that_is_killed_hears_of_it(run):
    async def test(rig):
        front = await rig.domain(1)
        _, _ = await front.alloc(0, 1)
        if isinstance(rig, EmbeddedRig):
            rig.host.kill(1)
        else:
            rig.host.destroy(1)
        await front.wait_lost()
        assert await front.held() == [0, 0, 0]
        for call in (front.alloc(0, 1), front.map(0, [8]), front.port(0)):
            with pytest.raises(LinkDown):
                await call

    run(test)


def test_dying_while_suspending_is_told_to_who_waits(run):
    async def test(rig):
        await rig.domain(0)
        front = await rig.domain(1)
        waiting = asyncio.create_task(rig.host.suspended(1))
        await asyncio.sleep(0)
        await rig.kill(front)
        with pytest.raises(LinkDown):
            await asyncio.wait_for(waiting, DEADLINE)

    run(test)


def test_limits_stop_one_domain_alone(run):
    async def test(rig):
        back, front, other = await rig.domain(0), await rig.domain(1), await rig.domain(2)
        await front.alloc(0, 9)
        for count in (8, 100_000):
            await refused("ENOSPC", front.alloc(0, count))
        _, refs = await front.alloc(0, 1)
        await back.map(1, refs * 20)
        await refused("ENOSPC", back.map(1, refs))
        for _ in range(4):
            await front.port(0)  # and one is the store's
        await refused("ENOSPC", front.port(0))
        _, port = await other.port(1)
        await refused("ENOSPC", front.bind(2, port))
        await other.alloc(0, 10)

    run(test, Limits(granted_pages=16, mapped_pages=20, ports=5))


def test_renamed_but_still_parked(run):
    async def test(rig):
        back, front = await rig.domain(0, privileged=True), await rig.domain(1)
        pages, refs = await front.alloc(0, 1)
        with pytest.raises(UsageError):
            rig.host.rename(1, 5)
        await front.suspend()
        await asyncio.wait_for(rig.host.suspended(1), DEADLINE)
        with pytest.raises(UsageError):
            rig.host.rename(1, 0)
        rig.host.rename(1, 5)
        await refused("ESTALE", front.alloc(0, 1))  # or nobody would own it after the resume
        await front.revoke(pages)
        await refused("ENOENT", back.map(1, refs))
        await back.map(5, [1])
        await back.bind(5, rig.host.store_port(5))
        with pytest.raises(UsageError):
            rig.host.resume(5, cancelled=True)
        rig.host.resume(5)
        assert await front.resumed() == [False, 5]
        assert await back.deaths() == [1]
        channel, _ = await front.start()
        assert rig.host.held(5) == type(rig.host.held(5))(1, 0, 1)
        assert await front.fired(channel, 0) == 0
        await front.alloc(0, 1)
        assert rig.dead == []

    run(test)
