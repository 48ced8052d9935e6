"""A kernel's network stack, spoken for: `unshare -n python -m xenbus.cli.demo.stack` has a network namespace
of its own, and does there what a guest's programs would do. A request a line on stdin, an answer on stdout.

Needs nothing but the kernel: addresses are set by ioctl (netdevice(7)). With the argument `try` it tries to
make a TAP device, and ends. kernels.py is its caller.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000
IFF_UP = 1
PATIENCE = 20.0
CHUNK = 256 << 10
ECHO_REQUEST, ECHO_REPLY = 8, 0


def _request(number: int, device: str, rest: bytes = b"") -> bytes:
    """struct ifreq: a name of 16 bytes, and what follows."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        return fcntl.ioctl(control, number, (device.encode().ljust(16, b"\0") + rest).ljust(40, b"\0"))[16:]


def _address(address: str) -> bytes:
    return struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(address))


def make_tap() -> None:
    """OSError where that is not allowed. It goes with this process."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"try%d", IFF_TAP | IFF_NO_PI))


def echo_request(identifier: int, number: int, payload: bytes) -> bytes:
    """ICMP (RFC 792): type, code, checksum, identifier, sequence number, data of an even length."""
    head = struct.pack(">BBHHH", ECHO_REQUEST, 0, 0, identifier, number)
    total = sum(struct.unpack(f">{(len(head) + len(payload)) // 2}H", head + payload))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:2] + struct.pack(">H", total ^ 0xFFFF) + head[4:] + payload


class Stack:
    """Each method is a request."""

    def up(self, device: str, address: str) -> None:
        """An IPv4 address in a network of 256, and the device up."""
        _request(SIOCSIFADDR, device, _address(address))
        _request(SIOCSIFNETMASK, device, _address("255.255.255.0"))
        flags = struct.unpack_from("H", _request(SIOCGIFFLAGS, device))[0]
        _request(SIOCSIFFLAGS, device, struct.pack("H", flags | IFF_UP))

    def devices(self) -> list[str]:
        return [name for _, name in socket.if_nameindex() if name != "lo"]

    def ping(self, host: str, count: int) -> list[float]:
        """Seconds that each took that came back as it went; the first one waits for the address, too."""
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            found, end = [], time.monotonic() + PATIENCE
            for number in range(count):
                request = echo_request(os.getpid() & 0xFFFF, number, os.urandom(56))
                took = None
                while took is None and time.monotonic() < end:
                    started = time.monotonic()
                    raw.sendto(request, (host, 0))
                    if self._echoed(raw, request[4:], started + 0.2):
                        took = time.monotonic() - started
                found += [took] if took is not None else []
            return found

    @staticmethod
    def _echoed(raw: socket.socket, wanted: bytes, end: float) -> bool:
        while (left := end - time.monotonic()) > 0:
            raw.settimeout(left)
            try:
                data = raw.recv(65535)
            except TimeoutError:
                break
            body = data[(data[0] & 15) * 4 :]
            if body[0] == ECHO_REPLY and body[4:] == wanted:
                return True
        return False

    def listen(self, path: str) -> int:
        """The port; what whoever connects first sends is written to a file."""
        server = socket.create_server(("0.0.0.0", 0))
        server.settimeout(PATIENCE)
        self._heard: dict[str, Any] = {}

        def hear() -> None:
            with server, server.accept()[0] as peer, Path(path).open("wb") as file:
                peer.settimeout(PATIENCE)
                sha, count = hashlib.sha256(), 0
                while data := peer.recv(CHUNK):
                    file.write(data)
                    sha.update(data)
                    count += len(data)
                self._heard = {"sha256": sha.hexdigest(), "bytes": count}

        self._hearing = threading.Thread(target=hear, daemon=True)
        self._hearing.start()
        return int(server.getsockname()[1])

    def heard(self) -> dict[str, Any]:
        self._hearing.join(PATIENCE)
        return self._heard

    def push(self, host: str, port: int, path: str) -> float:
        """A file over TCP; the seconds until all of it was taken by the other end."""
        started = time.monotonic()
        with socket.create_connection((host, port), timeout=PATIENCE) as peer, Path(path).open("rb") as file:
            peer.sendfile(file)
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)  # its end of file: it has read ours
        return time.monotonic() - started


def main() -> None:
    if sys.argv[1:] == ["try"]:
        make_tap()
        return
    stack = Stack()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": getattr(stack, request.pop("do"))(**request)}
        except Exception as error:  # noqa: BLE001 - the caller's to judge
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
