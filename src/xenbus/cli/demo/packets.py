"""A small network stack of the demo's own, for where no kernel's can be had: ARP, ICMP echo and UDP over the
packet interface of a guest's xn, asked for through its control socket. Knows frames; starts nothing.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import socket
import struct
import time
from contextlib import suppress
from typing import Any

from xenbus.domain.rpc import RpcClient
from xenbus.drivers.net.frames import ones_sum
from xenbus.errors import DeadlineError, XenbusError

DEADLINE = 20.0
AGAIN = 0.2  # seconds after which what was not answered is sent again
BROADCAST = b"\xff" * 6
IP, ARP = 0x0800, 0x0806
ICMP, UDP = 1, 17
REQUEST, REPLY = 1, 2
ECHO_REQUEST, ECHO_REPLY = 8, 0
PORT = 7000
PIECE = 1400
WINDOW = 16  # datagrams on their way


def _checksum(data: bytes) -> int:
    """Over data with a blank one. Where it is not blank but right, `ones_sum` is 0."""
    return ones_sum(data) ^ 0xFFFF


class PacketStack:
    """`async with PacketStack(rpc, "xn0", mac, "10.0.0.1") as stack`. `rpc`: the guest's control socket."""

    def __init__(self, rpc: RpcClient, device: str, mac: str, address: str) -> None:
        self._rpc, self._device = rpc, device
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self.address = address
        self._ip = socket.inet_aton(address)
        self._neighbours: dict[bytes, bytes] = {}
        self._heard: dict[int, bytes] = {}
        # What came that somebody may wait for: an ARP answer's address, an echo's number, a datagram's.
        self._answers: set[object] = set()
        self._news = asyncio.Condition()
        self._failure: XenbusError | None = None

    async def __aenter__(self) -> PacketStack:
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        await self._rpc.close()

    # -- what the demo asks

    async def ping(self, host: str, count: int) -> list[float]:
        """Seconds that each took."""
        found = []
        mac = await self._resolve(socket.inet_aton(host))
        for number in range(count):
            head = struct.pack(">BBHHH", ECHO_REQUEST, 0, 0, 1, number) + os.urandom(56)
            request = head[:2] + struct.pack(">H", _checksum(head)) + head[4:]
            started = time.monotonic()
            await self._until(request[4:], mac, self._packet(ICMP, socket.inet_aton(host), request))
            found.append(time.monotonic() - started)
        return found

    async def push(self, host: str, data: bytes) -> None:
        """Datagrams of a number and PIECE bytes; each is sent until it was acknowledged."""
        to = socket.inet_aton(host)
        mac = await self._resolve(to)
        gate = asyncio.Semaphore(WINDOW)

        async def piece(number: int, body: bytes) -> None:
            async with gate:
                datagram = self._datagram(to, struct.pack(">BI", REQUEST, number) + body)
                await self._until(number, mac, self._packet(UDP, to, datagram))

        async with asyncio.TaskGroup() as tasks:
            for at in range(0, len(data), PIECE):
                tasks.create_task(piece(at // PIECE, data[at : at + PIECE]))

    def heard(self) -> dict[str, Any]:
        data = b"".join(self._heard[number] for number in sorted(self._heard))
        return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    # -- frames

    async def _send(self, to: bytes, kind: int, payload: bytes) -> None:
        frame = to + self._mac + struct.pack(">H", kind) + payload.ljust(46, b"\0")
        data = base64.b64encode(frame).decode()
        await self._rpc.call("device", device=self._device, operation="send", data=data)

    async def _until(self, answer: object, to: bytes, payload: bytes, kind: int = IP) -> None:
        """Send it until the answer is there."""
        end = time.monotonic() + DEADLINE
        while True:
            await self._send(to, kind, payload)
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN), self._news:
                    await self._news.wait_for(lambda: answer in self._answers or self._failure)
            if self._failure:
                raise self._failure
            if answer in self._answers:
                return
            if time.monotonic() > end:
                raise DeadlineError("an answer", f"the guest that {self.address} spoke to", DEADLINE)

    async def _resolve(self, address: bytes) -> bytes:
        if address not in self._neighbours:
            await self._until(address, BROADCAST, self._arp(REQUEST, bytes(6), address), ARP)
        return self._neighbours[address]

    def _arp(self, operation: int, mac: bytes, address: bytes) -> bytes:
        """RFC 826, for Ethernet and IPv4."""
        return struct.pack(">HHBBH", 1, IP, 6, 4, operation) + self._mac + self._ip + mac + address

    def _packet(self, protocol: int, to: bytes, payload: bytes) -> bytes:
        """RFC 791."""
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + self._ip + to
        return head[:10] + struct.pack(">H", _checksum(head)) + head[12:] + payload

    def _datagram(self, to: bytes, body: bytes) -> bytes:
        """RFC 768."""
        length = 8 + len(body)
        head = struct.pack(">HHHH", PORT, PORT, length, 0)
        sum_ = _checksum(self._ip + to + struct.pack(">HH", UDP, length) + head + body)
        return head[:6] + struct.pack(">H", sum_) + body

    # -- what comes

    async def _listen(self) -> None:
        try:
            while True:
                with suppress(DeadlineError):
                    frames = await self._rpc.call(
                        "device", device=self._device, operation="receive", seconds=5, timeout=10.0
                    )
                    for text in frames:
                        await self._take(base64.b64decode(text))
        except XenbusError as error:
            self._failure = error

    async def _take(self, frame: bytes) -> None:
        kind, payload = int.from_bytes(frame[12:14], "big"), frame[14:]
        if kind == ARP and len(payload) >= 28:
            await self._take_arp(payload)
        elif kind == IP and len(payload) >= 20 and payload[16:20] == self._ip:
            sender, length = payload[12:16], int.from_bytes(payload[2:4], "big")
            body = payload[20:length]
            if payload[9] == ICMP:
                await self._take_icmp(frame[6:12], sender, body)
            elif payload[9] == UDP:
                await self._take_udp(frame[6:12], sender, body)

    async def _take_arp(self, payload: bytes) -> None:
        operation, mac, address = int.from_bytes(payload[6:8], "big"), payload[8:14], payload[14:18]
        self._neighbours[address] = mac
        await self._tell(address)
        if operation == REQUEST and payload[24:28] == self._ip:
            await self._send(mac, ARP, self._arp(REPLY, mac, address))

    async def _take_icmp(self, mac: bytes, sender: bytes, body: bytes) -> None:
        if ones_sum(body):
            return
        if body[0] == ECHO_REPLY:
            await self._tell(body[4:])
        elif body[0] == ECHO_REQUEST:
            head = bytes([ECHO_REPLY, 0, 0, 0]) + body[4:]
            reply = head[:2] + struct.pack(">H", _checksum(head)) + head[4:]
            await self._send(mac, IP, self._packet(ICMP, sender, reply))

    async def _take_udp(self, mac: bytes, sender: bytes, datagram: bytes) -> None:
        if ones_sum(sender + self._ip + struct.pack(">HH", UDP, len(datagram)) + datagram):
            return
        what, number = struct.unpack_from(">BI", datagram, 8)
        if what == REPLY:
            await self._tell(number)
            return
        self._heard[number] = datagram[13:]
        answer = self._datagram(sender, struct.pack(">BI", REPLY, number))
        await self._send(mac, IP, self._packet(UDP, sender, answer))

    async def _tell(self, answer: object) -> None:
        async with self._news:
            self._answers.add(answer)
            self._news.notify_all()
