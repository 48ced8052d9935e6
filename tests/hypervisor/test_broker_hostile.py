"""Domain processes that do not keep to the protocol: they fall, and nobody else does."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import mmap
import os
import random
import socket

import pytest

from tests.support.hypervisor_actor import open_files
from tests.support.until import until
from xenbus.errors import HypervisorError
from xenbus.hypervisor import broker_wire as wire
from xenbus.hypervisor.broker import Broker, Limits, connect
from xenbus.hypervisor.broker_wire import Op
from xenbus.hypervisor.interface import PAGE_SIZE
from xenbus.hypervisor.memory import F_SEAL_FUTURE_WRITE, SIZE_SEALS, add_seals, sealed_memfd

DEADLINE = 10


class Raw:
    """A domain's socket in the hands of somebody who says what he likes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.serial = 0
        self.receiver = wire.Receiver(sock, wire.FDS_MAX)

    def send(self, data: bytes, fds=()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], ancillary)

    async def receive(self) -> wire.Message | None:
        async with asyncio.timeout(DEADLINE):
            while True:
                try:
                    return self.receiver.receive()
                except BlockingIOError:
                    await asyncio.sleep(0)
                except ConnectionResetError:
                    return None

    async def ask(self, op: int, payload: bytes = b"", fds=()) -> wire.Message | None:
        self.serial += 1
        self.send(wire.encode(op, self.serial, payload), fds)
        while (message := await self.receive()) is not None and message.serial != self.serial:
            wire.close_all(message.fds)
        return message


@contextlib.asynccontextmanager
async def broker_with(domids, **options):
    """A broker, an honest domain 0, and raw sockets of the others. Counts descriptors."""
    before = open_files()
    dead: list[int] = []
    broker = Broker(on_dead=dead.append, **options)
    broker.create(0)
    honest = await connect(broker.handle(0, privileged=True))
    raws = []
    for domid in domids:
        broker.create(domid)
        raws.append(Raw(broker.handle(domid)))
    broker.told = dead
    try:
        yield broker, honest, *raws
        # Whatever happened, domain 0 is still served.
        pages = await honest.grants.alloc(0, 1)
        mapping = await honest.gntdev.map(0, pages.refs)
        mapping.view[:2] = b"ok"
        assert pages.view[:2] == b"ok" and 0 not in dead
    finally:
        for raw in raws:
            raw.sock.close()
        await honest.close()
        await broker.close()
        await asyncio.sleep(0)
    assert open_files() == before


BAD = {
    "empty": b"",
    "one byte": b"\x01",
    "half a header": b"\x01\x00\x00\x00",
    "no such operation": wire.encode(77, 1),
    "an event": wire.encode(Op.DEAD, 1, wire.DOMID.pack(0)),
    "too long": b"\x01" * (wire.MESSAGE_MAX + 1),
    "wrong magic": wire.encode(Op.HELLO, 1, wire.HELLO.pack(1, wire.VERSION)),
    "wrong version": wire.encode(Op.HELLO, 1, wire.HELLO.pack(wire.MAGIC, 99)),
    "short alloc": wire.encode(Op.ALLOC, 1, b"\0\0\0"),
    "long alloc": wire.encode(Op.ALLOC, 1, wire.ALLOC.pack(0, 1, 1) + b"x"),
    "no page": wire.encode(Op.ALLOC, 1, wire.ALLOC.pack(0, 1, 0)),
    "a domid that is none": wire.encode(Op.ALLOC, 1, wire.ALLOC.pack(0x7FF0, 1, 1)),
    "a flag of 2": wire.encode(Op.ALLOC, 1, wire.ALLOC.pack(0, 2, 1)),
    "an arena without descriptor": wire.encode(Op.ARENA, 1, wire.ARENA.pack(0, 1, 1)),
    "map of nothing": wire.encode(Op.MAP, 1, wire.MAP.pack(1, 0)),
    "map of fewer than it says": wire.encode(Op.MAP, 1, wire.MAP.pack(1, 9) + bytes(12)),
    "map of too many": wire.encode(Op.MAP, 1, wire.MAP.pack(1, 5000) + bytes(12 * 5000)),
    "a port for domain 2^31": wire.encode(Op.PORT_ALLOC, 1, wire.DOMID.pack(1 << 31)),
    "start info with more": wire.encode(Op.START_INFO, 1, b"x"),
    "suspend with more": wire.encode(Op.SUSPEND, 1, b"x"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_message_that_no_layout_allows_ends_its_sender(name):
    async def main():
        async with broker_with([1, 2]) as (broker, _, bad, good):
            bad.send(BAD[name])
            await until(lambda: broker.told)
            assert broker.told == [1] and 1 not in broker.domids()
            assert await bad.receive() is None
            assert (await good.ask(Op.PORT_ALLOC, wire.DOMID.pack(0))).status == 0

    asyncio.run(main())


def test_garbage_of_any_kind_harms_nobody_else():
    async def main():
        dice = random.Random(20)
        async with broker_with([]) as (broker, _):
            for domid in range(1, 120):
                broker.create(domid)
                raw = Raw(broker.handle(domid))
                for _ in range(10):
                    head = wire.encode(dice.choice(list(Op)), dice.randrange(1 << 32))
                    body = bytes(
                        dice.choice((0, 1, 255, dice.randrange(256))) for _ in range(dice.randrange(40))
                    )
                    with contextlib.suppress(OSError):
                        raw.send(head + body)
                await asyncio.sleep(0)
                raw.sock.close()
            await until(lambda: broker.domids() == (0,))

    asyncio.run(main())


def test_descriptors_nobody_asked_for():
    async def main():
        async with broker_with([1, 2, 3]) as (broker, _, one, two, three):
            fds = [arena(1, SIZE_SEALS) for _ in range(5)]
            try:
                one.send(wire.encode(Op.HELLO, 1, wire.HELLO.pack(wire.MAGIC, wire.VERSION)), fds[:1])
                two.send(wire.encode(Op.ARENA, 1, wire.ARENA.pack(0, 1, 1)), fds)
                three.send(b"", fds[:1])
                await until(lambda: sorted(broker.told) == [1, 2, 3])
            finally:
                wire.close_all(fds)

    asyncio.run(main())


def arena(pages: int, seals: int, size: int | None = None) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, pages * PAGE_SIZE if size is None else size)
    add_seals(fd, seals)
    return fd


@pytest.mark.parametrize(
    ("fd", "writable"),
    [
        (lambda: arena(1, 0), 1),
        (lambda: arena(1, SIZE_SEALS & ~2), 1),  # it could be cut short under who maps it
        (lambda: arena(1, SIZE_SEALS & ~1), 1),
        (lambda: arena(2, SIZE_SEALS), 1),
        (lambda: arena(1, SIZE_SEALS, 100), 1),
        (lambda: arena(1, SIZE_SEALS), 0),  # read-only only by word
        (lambda: os.open("/dev/zero", os.O_RDWR), 1),
        (lambda: os.eventfd(0), 1),
        (lambda: os.memfd_create("no seals allowed", 0), 1),
    ],
)
def test_an_arena_that_is_not_sealed_as_it_should_be(fd, writable):
    async def main():
        async with broker_with([1]) as (broker, _, bad):
            number = fd()
            bad.send(wire.encode(Op.ARENA, 1, wire.ARENA.pack(0, writable, 1)), [number])
            os.close(number)
            await until(lambda: broker.told == [1])

    asyncio.run(main())


def test_what_a_mapper_can_do_to_a_read_only_arena():
    """Not write to it, not by opening its descriptor again, and nobody can cut it short."""

    async def main():
        async with broker_with([1]) as (_, honest, raw):
            pages = await honest.grants.alloc(1, 1, writable=False)
            entry = wire.MAP_ENTRY.pack(0, 1, pages.refs[0], 1)
            assert (await raw.ask(Op.MAP, wire.MAP.pack(1, 1) + entry)).status == errno.EPERM
            entry = wire.MAP_ENTRY.pack(0, 0, pages.refs[0], 1)
            message = await raw.ask(Op.MAP, wire.MAP.pack(1, 1) + entry)
            (fd,) = message.fds
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            try:
                for number in (fd, again):
                    with pytest.raises(PermissionError):
                        mmap.mmap(number, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                    with pytest.raises(PermissionError):
                        os.pwrite(number, b"x", 0)
                    for length in (0, 1 << 30):
                        with pytest.raises(PermissionError):
                            os.ftruncate(number, length)
                    with pytest.raises(PermissionError):
                        add_seals(number, 0x8)
                pages.view[:5] = b"still"
                with mmap.mmap(again, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
                    assert seen[:5] == b"still"
            finally:
                wire.close_all((fd, again))

    asyncio.run(main())


def test_nobody_reaches_what_was_not_granted_to_him():
    async def main():
        async with broker_with([1, 2]) as (broker, honest, one, two):
            pages = await honest.grants.alloc(1, 1)
            ref, writable_entry = pages.refs[0], 1
            for strict in (0, 1):
                entry = wire.MAP_ENTRY.pack(0, writable_entry, ref, 1)
                message = await two.ask(Op.MAP, wire.MAP.pack(strict, 1) + entry)
                assert message.fds == ()
                if strict:
                    assert message.status == errno.EPERM
                else:
                    assert wire.SLOT.unpack_from(message.payload, wire.MAPPED.size)[0] == errno.EPERM
            channel = await honest.evtchn.alloc_unbound(1, lambda: None)
            assert (await two.ask(Op.PORT_BIND, wire.BIND.pack(0, channel.port))).status == errno.EPERM
            await two.ask(Op.PORT_CLOSE, wire.PORT.pack(channel.port))  # a number of its own, if any
            assert broker.held(0).ports == 1
            assert (await two.ask(Op.REVOKE, wire.REVOKE.pack(ref, 1))).status == errno.ENOENT
            assert (await two.ask(Op.UNMAP, wire.MAP_ID.pack(1))).status in (0, errno.ENOENT)
            assert (await one.ask(Op.REVOKE, wire.REVOKE.pack(1, 4_000_000_000))).status == errno.ENOENT

    asyncio.run(main())


def test_who_asks_and_does_not_read_stops_himself():
    async def main():
        async with broker_with([1]) as (broker, _, raw):
            for _ in range(100):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        raw.send(wire.encode(Op.PORT_ALLOC, 1, wire.DOMID.pack(0)))
                before = broker.held(1).ports
                for _ in range(30):
                    await asyncio.sleep(0)
                if broker.held(1).ports == before:
                    break
            else:
                raise AssertionError("it never stopped")
            assert broker.told == []
            while broker.held(1).ports == before:  # once it reads, it is served again
                await raw.receive()

    asyncio.run(main())


def test_who_does_not_read_what_happens_to_him_is_dropped(caplog):
    async def main():
        async with broker_with([1], max_queued=100) as (broker, honest, raw):
            ports = [
                wire.PORT.unpack((await raw.ask(Op.PORT_ALLOC, wire.DOMID.pack(0))).payload)[0]
                for _ in range(3000)
            ]
            # Any number of changes of one port is one message that waits.
            for _ in range(400):
                await (await honest.evtchn.bind_interdomain(1, ports[0], lambda: None)).close()
            assert broker.told == []
            for port in ports[1:]:
                try:
                    await honest.evtchn.bind_interdomain(1, port, lambda: None)
                except HypervisorError:
                    break
            assert broker.told == [1]
            assert "does not read" in caplog.text

    with caplog.at_level(logging.INFO, "xenbus.hypervisor.broker_server"):
        asyncio.run(main())


def test_arenas_are_counted():
    async def main():
        async with broker_with([1], limits=Limits(arenas=3)) as (_, _, raw):
            for number in range(3):
                fd = sealed_memfd("test", PAGE_SIZE)
                add_seals(fd, SIZE_SEALS | F_SEAL_FUTURE_WRITE)
                message = await raw.ask(Op.ARENA, wire.ARENA.pack(0, 0, 1), [fd])
                os.close(fd)
                assert message.status == (errno.ENOSPC if number == 2 else 0)  # one is the store's page

    asyncio.run(main())


def test_a_peer_that_scribbles_on_the_pending_map_only_makes_noise():
    async def main():
        async with broker_with([1]) as (_, honest, raw):
            hits = []
            mine = [await honest.evtchn.alloc_unbound(1, lambda n=n: hits.append(n)) for n in range(3)]
            links = []
            for channel in mine:
                message = await raw.ask(Op.PORT_BIND, wire.BIND.pack(0, channel.port))
                links.append(wire.PORT_STATE.unpack(message.payload))
                if message.fds:
                    fds = message.fds
            await honest.evtchn.alloc_unbound(1, lambda: None)  # it has heard of the bindings by now
            side = links[0][3]
            with mmap.mmap(fds[2], 2 * wire.LINK_PORTS) as pending:
                start = (1 - side) * wire.LINK_PORTS
                pending[start : start + wire.LINK_PORTS] = b"\xff" * wire.LINK_PORTS
                os.eventfd_write(fds[1], 5)
                await asyncio.sleep(0.01)
                assert hits == []
                pending[start : start + wire.LINK_PORTS] = b"\1" * wire.LINK_PORTS
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(fds[1], 0xFFFFFFFFFFFFFFFE)
                await until(lambda: sorted(hits) == [0, 1, 2])
                # A counter that is full does not stop who kicks.
                os.eventfd_write(fds[0], 0xFFFFFFFFFFFFFFFE)
                mine[0].notify()
                assert pending[side * wire.LINK_PORTS + links[0][2]] == 1
            wire.close_all(fds)

    asyncio.run(main())


def test_too_many_descriptors_under_way_are_not_the_reader_s_fault(monkeypatch):
    """unix(7), ETOOMANYREFS: sent a little later, and nobody is dropped."""

    async def main():
        async with broker_with([1]) as (broker, honest, raw):
            message = await raw.ask(Op.PORT_ALLOC, wire.DOMID.pack(0))
            (port,) = wire.PORT.unpack(message.payload)
            failures = [OSError(errno.ETOOMANYREFS, "too many"), OSError(errno.ETOOMANYREFS, "too many")]
            send = wire.send

            def failing(sock, data, fds=()):
                if fds and failures:
                    raise failures.pop()
                send(sock, data, fds)

            monkeypatch.setattr(wire, "send", failing)
            fired = asyncio.Event()
            await asyncio.wait_for(honest.evtchn.bind_interdomain(1, port, fired.set), DEADLINE)
            await asyncio.wait_for(fired.wait(), DEADLINE)
            assert not failures and broker.told == []
            while not (message := await raw.receive()).fds:
                pass
            wire.close_all(message.fds)

    asyncio.run(main())
