"""A kernel's own network stack in a namespace: the program `python -m tests.support.station` speaks for it.

One request a line on stdin, one answer a line on stdout, both JSON. `Station` is its caller. Needs no
iproute2: addresses are set by ioctl.
"""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import hashlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from xenbus.cli.demo.stack import (
    CHUNK,
    IFF_UP,
    PATIENCE,
    SIOCGIFFLAGS,
    SIOCSIFFLAGS,
    Stack,
    _request,
    echo_request,
)

SIOCGIFHWADDR, SIOCGIFMTU, SIOCSIFNAME, SIOCBRADDBR = 0x8927, 0x8921, 0x8923, 0x89A0
# proc(5), /proc/net/snmp: a checksum that is wrong, a header that is none.
_WRONG = ("InCsumErrors", "InHdrErrors", "TcpInErrs")


class Station:
    """`async with Station() as one: await one.ask("up", device="tap0", address="10.0.0.1")`."""

    async def __aenter__(self) -> Station:
        # A namespace of the network alone, in the user namespace that we are in already.
        self._process = await asyncio.create_subprocess_exec(
            "unshare",
            "-n",
            sys.executable,
            "-m",
            "tests.support.station",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        await self.ask("hello")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    @property
    def netns(self) -> str:
        return f"/proc/{self._process.pid}/ns/net"

    async def ask(self, what: str, **parameters: Any) -> Any:
        """What came of it; RuntimeError with the station's own words."""
        async with asyncio.timeout(PATIENCE + 10):
            self._process.stdin.write(json.dumps({"do": what, **parameters}).encode() + b"\n")
            answer = json.loads(await self._process.stdout.readline() or '{"error": "the station ended"}')
        if "error" in answer:
            raise RuntimeError(f"{what}: {answer['error']}")
        return answer["result"]


# -- inside


class Talker(Stack):
    """Each method is a request: what the demo's stack can do, and what only tests ask for."""

    def hello(self) -> str:
        self.up("lo")
        return "hello"

    def up(self, device: str, address: str = "") -> dict[str, Any]:
        """With an IPv4 address in a network of 256, its flags, MTU, MAC and link-local address told."""
        try:
            Path(f"/proc/sys/net/ipv6/conf/{device}/accept_dad").write_text("0")
        except OSError:
            pass  # IPv6 is usable a second later, or not at all
        if address:
            super().up(device, address)
        else:
            flags = struct.unpack_from("H", _request(SIOCGIFFLAGS, device))[0]
            _request(SIOCSIFFLAGS, device, struct.pack("H", flags | IFF_UP))
        return self.link(device)

    def link(self, device: str) -> dict[str, Any]:
        flags = struct.unpack_from("H", _request(SIOCGIFFLAGS, device))[0]
        return {
            "up": bool(flags & 1),
            "running": bool(flags & 0x40),
            "mtu": struct.unpack_from("i", _request(SIOCGIFMTU, device))[0],
            "mac": _request(SIOCGIFHWADDR, device)[2:8].hex(":"),
            "inet6": self._inet6(device),
        }

    def _inet6(self, device: str) -> str:
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            raw, _, _, _, _, name = line.split()
            if name == device:
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(raw)) + "%" + device
        return ""

    def bridge(self, name: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, SIOCBRADDBR, name.encode().ljust(16, b"\0"))

    def rename(self, device: str, name: str) -> None:
        _request(SIOCSIFNAME, device, name.encode())

    def delete(self, device: str) -> None:
        """As `ip link del` (rtnetlink(7), RTM_DELLINK)."""
        request, ack, delete = 1, 4, 17
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
            body = struct.pack("BxHiII", 0, 0, socket.if_nametoindex(device), 0, 0)
            link.send(struct.pack("IHHII", 16 + len(body), delete, request | ack, 1, 0) + body)
            error = struct.unpack_from("i", link.recv(4096), 16)[0]
            if error:
                raise OSError(-error, os.strerror(-error), device)

    def inject(self, device: str, count: int, first: int = 0) -> None:
        """Frames of an experimental type (IEEE 802, 0x88b5) out of a device, numbered from `first` on."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((device, 0))
            for number in range(first, first + count):
                raw.send(b"\xff" * 6 + b"\x02" + bytes(5) + b"\x88\xb5" + number.to_bytes(46, "big"))

    def ping(self, host: str, size: int = 56, count: int = 3) -> int:
        """How many came back, each with what it went with."""
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            back, end = 0, time.monotonic() + PATIENCE
            for number in range(count):
                request = echo_request(os.getpid() & 0xFFFF, number, os.urandom(size))
                answered = False
                while not answered and time.monotonic() < end:
                    raw.sendto(request, (host, 0))
                    answered = self._echoed(raw, request[4:], time.monotonic() + 0.2)
                back += answered
            return back

    def listen(self, family: str = "inet") -> int:
        """The port; whoever connects first is heard to its end."""
        six = family == "inet6"
        server = socket.socket(socket.AF_INET6 if six else socket.AF_INET)
        server.bind(("::" if six else "0.0.0.0", 0))
        server.listen(1)
        server.settimeout(PATIENCE)
        self._heard: dict[str, Any] = {"error": "nobody connected"}

        def hear() -> None:
            with server, server.accept()[0] as peer:
                peer.settimeout(PATIENCE)
                sha, count = hashlib.sha256(), 0
                while data := peer.recv(CHUNK):
                    sha.update(data)
                    count += len(data)
                self._heard = {"sha256": sha.hexdigest(), "bytes": count}

        self._hearing = threading.Thread(target=hear, daemon=True)
        self._hearing.start()
        return int(server.getsockname()[1])

    def push(self, host: str, port: int, size: int, seed: int = 1) -> str:
        """SHA-256 of what was sent over TCP."""
        dice, sha, left = random.Random(seed), hashlib.sha256(), size
        with self._connected(host, port) as peer:
            while left:
                data = dice.randbytes(min(CHUNK, left))
                sha.update(data)
                peer.sendall(data)
                left -= len(data)
            peer.shutdown(socket.SHUT_WR)
        return sha.hexdigest()

    def _connected(self, host: str, port: int) -> socket.socket:
        """IPv6 addresses take their time to be usable."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return socket.create_connection((host, port), timeout=PATIENCE)
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def run(self, words: list[str], seconds: float = PATIENCE) -> dict[str, Any]:
        """A program, here, to its end."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
        return {"code": done.returncode, "out": done.stdout, "err": done.stderr}

    def start(self, words: list[str]) -> None:
        """A program that goes on; it ends with the station."""
        program = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        atexit.register(program.kill)

    def wrong(self) -> dict[str, int]:
        """What this kernel found wrong with packets that came, as it counts it: all that is not zero."""
        found = {}
        lines = Path("/proc/net/snmp").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            kind = names.partition(":")[0]
            numbers = map(int, values.split()[1:])
            found |= {kind + name: n for name, n in zip(names.split()[1:], numbers, strict=True)}
        for line in Path("/proc/net/snmp6").read_text().splitlines():
            found[line.split()[0]] = int(line.split()[1])
        return {name: n for name, n in found.items() if n and name.endswith(_WRONG)}

    def udp_serve(self) -> int:
        """Answers each datagram with itself."""
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("0.0.0.0", 0))

        def answer() -> None:
            while True:
                data, who = server.recvfrom(65535)
                server.sendto(data, who)

        threading.Thread(target=answer, daemon=True).start()
        return int(server.getsockname()[1])

    def udp_ask(self, host: str, port: int, size: int, count: int) -> int:
        """How many came back as they went, each tried until it did."""
        back, end = 0, time.monotonic() + PATIENCE
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(0.2)
            for _ in range(count):
                data = os.urandom(size)
                while time.monotonic() < end:
                    client.sendto(data, (host, port))
                    try:
                        if client.recv(65535) == data:
                            back += 1
                            break
                    except TimeoutError:
                        continue
        return back


def main() -> None:
    talker = Talker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": getattr(talker, request.pop("do"))(**request)}
        except Exception as error:  # noqa: BLE001 - the caller's to judge
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
