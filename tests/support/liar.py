"""Runs in the lab's Python guest: a front end played by hand, which says and does whatever a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct

from xenbus.drivers.block import blkif
from xenbus.drivers.block.blkif import Op
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.ring.shared import REQ_PROD, RSP_PROD, FrontRing, RingError
from xenbus.xenstore.client import Client

PAGE = 4096
PATIENCE = 80.0  # seconds for the other end, under emulation
CLOSING, CLOSED = b"5", b"6"
# What a front end publishes: how the keys begin.
OURS = ("ring", "event", "queue", "multi", "num-", "protocol", "feature")


class Liar:
    """One disk of this guest, and what it has granted and bound for it.

    answers: (id, operation, status) in order of arrival; done: how often a storm or a flapping went round
    """

    def __init__(self, store: Client, hv: LinuxHypervisor, devid: int, order: int) -> None:
        self.store = store
        self.hv = hv
        self.node = f"device/vbd/{devid}"
        self.order = order
        self.abi = blkif.X86_64
        self.answers: list[tuple[int, int, int]] = []
        self.done = 0
        self.stopping = False
        self.work: asyncio.Future | None = None

    @classmethod
    async def begin(cls, devid: int, order: int = 0) -> Liar:
        """Pages, ring and port, and the other end waits for us."""
        store = await Client.connect("/dev/xen/xenbus")
        liar = cls(store, LinuxHypervisor(int(await store.read_str("domid"))), devid, order)
        liar.back = await store.read_str(f"{liar.node}/backend")
        await liar.take()
        await liar.until(b"2")
        return liar

    async def take(self) -> None:
        hv = self.hv
        self.pages = await hv.grants.alloc(0, 1 << self.order)
        self.data = await hv.grants.alloc(0, 16)
        self.ring = FrontRing(self.pages.view, self.abi.request_size, self.abi.response_size)
        self.ring.init()
        self.channel = await hv.evtchn.alloc_unbound(0, self.kicked)

    async def give_back(self) -> None:
        self.ring.release()
        await self.channel.close()
        for pages in (self.pages, self.data):
            await self.hv.grants.revoke(pages)

    def kicked(self) -> None:
        with contextlib.suppress(RingError):  # after what we wrote into it ourselves
            for raw in self.ring.take_responses():
                self.answers.append(self.abi.response.unpack(raw))
            self.ring.final_check_for_responses()

    async def until(self, *states: bytes) -> bytes | None:
        """Until the other end is in one of these states."""
        path = f"{self.back}/state"
        return await self.store.wait_for(path, lambda value: value in states, PATIENCE)

    async def say(self, state: int) -> None:
        await self.store.write(f"{self.node}/state", str(state))

    def truth(self) -> dict[str, object]:
        refs = self.pages.refs
        names = [f"ring-ref{n}" for n in range(len(refs))] if self.order else ["ring-ref"]
        keys = {"event-channel": self.channel.port, "protocol": self.abi.name, "feature-persistent": 0}
        return (
            keys
            | dict(zip(names, refs, strict=True))
            | ({"ring-page-order": self.order} if self.order else {})
        )

    async def publish(self, lies: dict[str, object] | None = None) -> bytes | None:
        """Our parameters, these instead of true ones (None: no such key), and Initialised. What the other end
        makes of it: b"4", b"5", b"6"."""
        said = {key: value for key, value in (self.truth() | (lies or {})).items() if value is not None}
        await asyncio.gather(
            *(
                self.store.write(f"{self.node}/{key}", value if isinstance(value, bytes) else str(value))
                for key, value in said.items()
            )
        )
        await self.say(3)
        state = await self.until(b"4", CLOSING, CLOSED)
        if state == b"4":
            await self.say(4)
        return state

    async def begin_anew(self) -> None:
        """Closed, and Initialising again with fresh pages, as the other end's `online` allows."""
        await self.say(6)
        await self.until(CLOSED)
        await self.give_back()
        keys = await self.store.directory(self.node)
        await asyncio.gather(*(self.store.rm(f"{self.node}/{key}") for key in keys if key.startswith(OURS)))
        self.answers = []
        await self.take()
        await self.say(1)
        await self.until(b"2")

    # -- requests

    def word(self, page: int, first: int = 0, last: int = 7) -> int:
        return blkif.segment_word(self.data.refs[page], first, last)

    def put(self, op: int, ident: int, sector: int, *words: int, count: int | None = None) -> None:
        abi, at = self.abi, self.ring.request_offset()
        abi.rw.pack_into(self.ring.slots, at, op, len(words) if count is None else count, 0, ident, sector)
        abi.words[len(words)].pack_into(self.ring.slots, at + abi.segments_at, *words)
        self.ring.commit_request()

    def put_raw(self, data: bytes) -> None:
        self.ring.put_request(data)

    def indirect(self, op: int, ident: int, count: int, *refs: int, fill: bytes = b"") -> None:
        refs = refs or (self.data.refs[15],)
        if fill:
            self.data.view[15 * PAGE : 15 * PAGE + len(fill)] = fill
        self.put_raw(
            self.abi.indirect.pack(Op.INDIRECT, op, count, ident, 0, 0, *refs, *(0,) * (8 - len(refs)))
        )

    async def answered(self, count: int) -> list[tuple[int, int, int]]:
        """Pushes what was put; the answers, once there are so many in all."""
        self.ring.push_requests()
        self.channel.notify()
        async with asyncio.timeout(PATIENCE):
            while len(self.answers) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return sorted(self.answers)

    def poke(self, word: int, value: int) -> None:
        """An index of the ring, without regard to what is right."""
        self.ring.words[word] = value & 0xFFFFFFFF
        self.channel.notify()

    # -- what goes on until `stop`

    def storm(self, *, asking: bool = False) -> None:
        """Events without end, from a thread; asking: with a full ring of reads each time there is room."""
        self.work = asyncio.get_running_loop().run_in_executor(None, self._storm, asking)

    def _storm(self, asking: bool) -> None:
        while not self.stopping:
            self.channel.notify()
            self.done += 1

    def scribble(self) -> None:
        """Requests without end, and the slots and indices of the ring overwritten while they are served."""
        self.work = asyncio.get_running_loop().run_in_executor(None, self._scribble)

    def _scribble(self) -> None:
        words, slots = self.ring.words, self.ring.slots
        size = self.ring.size
        while not self.stopping:
            slots[:] = os.urandom(len(slots))
            for n in range(size):  # all of them known operations on pages that are granted
                struct.pack_into("<BB", slots, n * 112, self.done % 7, 1)
                struct.pack_into("<Q", slots, n * 112 + 24, self.word(n % 15))
            # As many as there is room for, by what it answered.
            words[REQ_PROD] = words[RSP_PROD] + size & 0xFFFFFFFF
            self.channel.notify()
            self.done += 1

    def flap(self, states: list[object]) -> None:
        """These states, one after the other, without end and as fast as the store takes them."""

        async def run() -> None:
            while not self.stopping:
                for state in states:
                    await self.store.write(f"{self.node}/state", str(state))
                self.done += 1

        self.work = asyncio.ensure_future(run())

    async def stop(self) -> int:
        self.stopping = True
        if self.work is not None:
            await self.work
        self.stopping, self.work, done, self.done = False, None, self.done, 0
        return done

    async def close(self) -> None:
        """Closed, if there is still a node to say it in."""
        if await self.store.exists(f"{self.node}/state"):
            await self.say(6)

    async def end(self) -> None:
        """The disk was detached: nothing of ours is left granted or bound, whatever went on."""
        await self.stop()
        await self.give_back()
        await self.hv.close()
        await self.store.close()
