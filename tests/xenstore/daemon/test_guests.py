"""Guests over their ring pages: introduction, service, faults, death; all on real shared pages."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.raw_store import until
from tests.support.store_host import CONNECTION, ERROR, FEATURES, REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD, host

from xenbus.errors import LinkDown, StoreError
from xenbus.xenstore.daemon import session as daemon_session
from xenbus.xenstore.wire import CODECS, Op, encode


def test_a_guest_is_served_over_its_page() -> None:
    async def run() -> None:
        async with host() as one:
            guest = await one.guest(5)
            await guest.write("data/x", b"value")
            assert await one.dom0.read("/local/domain/5/data/x") == b"value"
            with pytest.raises(StoreError, match="EACCES"):
                await guest.read("/tool")
            with pytest.raises(StoreError, match="EACCES"):
                await guest.introduce(6, 1, 1)
            await guest.close()

    asyncio.run(run())


def test_messages_longer_than_the_ring() -> None:
    async def run() -> None:
        async with host() as one:
            guest = await one.guest(5)
            await one.dom0.set_quota("node-size", 0, 5)
            value = bytes(range(256)) * 15
            await guest.write("big", value)
            assert await guest.read("big") == value
            await guest.close()

    asyncio.run(run())


def test_the_words_of_the_page_and_what_waits_in_it_at_introduction() -> None:
    async def run() -> None:
        async with host() as one:
            guest = await one.raw_guest(5, introduce=False)
            for offset in (REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD):
                guest.set(offset, 0xFFFFFFF0)  # "guests must not assume that they start at zero"
            guest.set(CONNECTION, 1)
            guest.put(encode(Op.GET_DOMAIN_PATH, 9, 0, b"5\0"))
            assert guest.word(RSP_PROD) == 0xFFFFFFF0
            await one.introduce(5)
            assert guest.word(FEATURES) == 14
            assert guest.word(CONNECTION) == 0
            await until(lambda: guest.word(RSP_PROD) != 0xFFFFFFF0)
            assert guest.kicks
            produced = guest.word(RSP_PROD)
            assert produced == (0xFFFFFFF0 + 16 + len(b"/local/domain/5\0")) % 2**32

    asyncio.run(run())


def test_features_set_before_introduction_are_in_the_page() -> None:
    async def run() -> None:
        async with host() as one:
            guest = await one.raw_guest(5, introduce=False)
            await one.dom0.set_feature(5, 2)
            await one.introduce(5)
            assert guest.word(FEATURES) == 2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("offset", "value"), [(REQ_PROD, 5000), (REQ_PROD, 0x80000000), (REQ_CONS, 77), (REQ_CONS, 2**32 - 2000)]
)
def test_request_indices_that_jump_stop_that_guest_alone(offset: int, value: int) -> None:
    async def run() -> None:
        async with host() as one:
            good, bad = await one.guest(6), await one.raw_guest(5)
            bad.put(encode(Op.WATCH, 1, 0, b"data\0t\0"))
            await bad.replies(2)
            for start in (REQ_CONS, REQ_PROD):
                bad.set(start, 0)
            bad.set(offset, value)
            bad.channel.notify()
            await until(lambda: bad.word(ERROR) == 2)
            assert await good.get_domain_path(6) == "/local/domain/6"
            assert one.daemon.engine.domain(5).watches == 0
            assert await one.dom0.is_introduced(5), "it stays introduced until RELEASE or death"
            await good.close()

    asyncio.run(run())


def test_response_indices_that_jump() -> None:
    async def run() -> None:
        async with host() as one:
            bad = await one.raw_guest(5)
            bad.set(RSP_CONS, 4000)
            bad.put(encode(Op.GET_DOMAIN_PATH, 1, 0, b"5\0"))
            await until(lambda: bad.word(ERROR) == 2)

    asyncio.run(run())


def test_a_message_too_long_sets_the_error_word() -> None:
    async def run() -> None:
        async with host() as one:
            good, bad = await one.guest(6), await one.raw_guest(5)
            bad.put(encode(Op.GET_DOMAIN_PATH, 1, 0, b"5\0") + struct.pack("<IIII", 11, 2, 0, 4097))
            assert [reply.op for reply in await bad.replies(1)] == [Op.GET_DOMAIN_PATH]
            await until(lambda: bad.word(ERROR) == 3)
            assert await good.get_domain_path(6) == "/local/domain/6"
            await good.close()

    asyncio.run(run())


def test_the_clients_of_a_stopped_guest_are_told() -> None:
    async def run() -> None:
        async with host() as one:
            guest = await one.guest(5)
            (session,) = [entry.session for entry in one.daemon._guests._guests.values()]
            session.stop(daemon_session.RingFault.PROTO, None)
            with pytest.raises(LinkDown, match="PROTO"):
                await guest.read("x")

    asyncio.run(run())


def test_release_gives_page_and_port_back_and_the_nodes_go() -> None:
    async def run() -> None:
        async with host() as one:
            guest = await one.guest(5)
            heard: list[str] = []
            await one.dom0.watch("@releaseDomain", heard.append, depth=1)
            assert (one.machine.held(0).mapped_pages, one.machine.held(0).ports) == (1, 1)
            await one.dom0.release(5)
            await until(one.idle)
            await until(lambda: heard == ["@releaseDomain", "@releaseDomain/5"])
            assert not await one.dom0.exists("/local/domain/5")
            assert not await one.dom0.is_introduced(5)
            await guest.close()

    asyncio.run(run())


def test_death_is_heard_once_and_a_new_domain_of_that_id_starts_clean() -> None:
    async def run() -> None:
        async with host() as one:
            heard: list[str] = []
            await one.dom0.watch("@releaseDomain", heard.append, depth=1)
            first = await one.guest(5)
            await first.write("data", "1")
            one.machine.kill(5)
            await until(one.idle)
            await until(lambda: len(heard) == 2)
            second = await one.guest(5)
            assert not await second.exists("data")
            await first.close()
            await second.close()

    asyncio.run(run())


def test_what_cannot_be_introduced_leaves_nothing() -> None:
    async def run() -> None:
        async with host() as one:
            guest = await one.raw_guest(5, introduce=False)
            for domid, port in ((7, 1), (5, 999)):
                with pytest.raises(StoreError) as caught:
                    await one.dom0.introduce(domid, 1, port)
                assert caught.value.name in ("ENOENT", "EPERM", "EINVAL")
                assert not await one.dom0.is_introduced(domid)
                assert one.idle()
            await one.introduce(5)
            guest.put(encode(Op.GET_DOMAIN_PATH, 1, 0, b"5\0"))
            assert len(await guest.replies(1)) == 1

    asyncio.run(run())


def test_requests_after_introduce_wait_for_it() -> None:
    """As with a daemon that does one thing after the other: what is asked next sees the domain there."""

    async def run() -> None:
        async with host() as one:
            await one.raw_guest(5, introduce=False)
            results = await asyncio.gather(
                one.dom0.is_introduced(5),
                one.dom0.introduce(5, 1, one.machine.store_port(5)),
                one.dom0.is_introduced(5),
                one.dom0.set_perms("/tool", ["n0", "r5"]),
                one.dom0.release(5),
                one.dom0.is_introduced(5),
            )
            assert results == [False, None, True, None, None, False]

    asyncio.run(run())


def test_a_domain_that_dies_while_it_is_introduced() -> None:
    async def run() -> None:
        async with host() as one:
            await one.raw_guest(5, introduce=False)
            task = asyncio.ensure_future(one.dom0.introduce(5, 1, one.machine.store_port(5)))
            for _ in range(3):
                await asyncio.sleep(0)
            one.machine.kill(5)
            with contextlib.suppress(StoreError):
                await task
            await until(one.idle)
            assert not await one.dom0.is_introduced(5)

    asyncio.run(run())


def test_introducing_again_starts_the_connection_anew() -> None:
    async def run() -> None:
        async with host() as one:
            guest = await one.raw_guest(5)
            guest.put(encode(Op.WATCH, 1, 0, b"data\0t\0"))
            await guest.replies(2)
            assert one.daemon.engine.domain(5).watches == 1
            heard: list[str] = []
            await one.dom0.watch("@introduceDomain", heard.append)
            guest.put(b"half a mess")
            await until(lambda: guest.word(REQ_CONS) == guest.word(REQ_PROD))
            fresh = await guest.hv.evtchn.alloc_unbound(0, lambda: None)
            await one.dom0.introduce(5, 1, fresh.port)
            assert one.daemon.engine.domain(5).watches == 0
            guest.channel = fresh
            guest.put(encode(Op.GET_DOMAIN_PATH, 2, 0, b"5\0"))
            assert [reply.req_id for reply in await guest.replies(1)] == [2]
            assert heard == ["@introduceDomain"], "only the watch's own first event"
            assert one.machine.held(0).mapped_pages == 1

    asyncio.run(run())


def test_a_guest_that_does_not_read_is_stalled_and_others_are_not() -> None:
    async def run() -> None:
        async with host() as one:
            good, deaf = await one.guest(6), await one.raw_guest(5)
            await one.dom0.write("/local/domain/5/data", "x" * 1000)
            message = encode(Op.READ, 1, 0, b"data\0")
            sent = 0
            for _ in range(400):
                if 1024 - (deaf.word(REQ_PROD) - deaf.word(REQ_CONS)) % 2**32 < len(message):
                    break
                deaf.put(message)
                sent += 1
                assert await good.get_domain_path(6) == "/local/domain/6"
            assert sent < 200, "it is not read from any more"
            session = one.daemon._guests._guests[5].session
            assert session.conn.queued + session.transport.backlog < 40 * 1100
            got = await deaf.replies(sent)
            assert len(got) == sent, "and all is there once it reads"
            await good.close()

    asyncio.run(run())


def test_events_that_a_guest_does_not_take_do_not_stall_who_caused_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(daemon_session, "EVENT_SECONDS", 0.05)

    async def run() -> None:
        async with host() as one:
            writer, deaf = await one.guest(6), await one.raw_guest(5)
            await writer.write("shared", "")
            await writer.set_perms("shared", ["n6", "r5"])
            deaf.put(encode(Op.WATCH, 1, 0, CODECS[Op.WATCH].request("/local/domain/6/shared", "t" * 60)))
            await deaf.replies(2)
            async with asyncio.timeout(5):
                for number in range(60):
                    await writer.write(f"shared/{number}", "")
            assert "events not taken" in caplog.text
            await writer.close()

    asyncio.run(run())


def test_oxenstoreds_events_wait_until_they_are_taken() -> None:
    async def run() -> None:
        async with host("oxenstored") as one:
            deaf = await one.raw_guest(5)
            request = CODECS[Op.WATCH].request("/local/domain/5", "t" * 60)
            deaf.put(encode(Op.WATCH, 1, 0, request))
            await deaf.replies(2)
            for number in range(60):
                await one.dom0.write(f"/local/domain/5/{number}", "")
            session = one.daemon._guests._guests[5].session
            assert session.conn.out
            assert session._deadline is None, "nobody counts the seconds"
            events = await deaf.replies(60)
            assert events[-1].payload == b"/local/domain/5/59\0" + b"t" * 60 + b"\0"

    asyncio.run(run())


@settings(max_examples=25, deadline=None)
@given(
    st.binary(min_size=1, max_size=900),
    st.lists(st.tuples(st.integers(512, 519), st.integers(0, 2**32 - 1)), max_size=3),
)
def test_noise_in_a_ring_harms_nobody(noise: bytes, words: list[tuple[int, int]]) -> None:
    async def run() -> None:
        async with host() as one:
            good, bad = await one.guest(6), await one.raw_guest(5)
            bad.put(noise)
            for index, value in words:
                bad.set(index * 4, value)
            bad.channel.notify()
            for _ in range(3):
                assert await good.get_domain_path(6) == "/local/domain/6"
                bad.channel.notify()
            one.machine.kill(5)
            assert await good.get_domain_path(6) == "/local/domain/6"
            await good.close()

    asyncio.run(run())
