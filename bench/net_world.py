"""`python -m bench.net_world SECONDS`, as root of a user namespace: two stacks, and four ways between them.

Prints {way: {"packets": a second, "bytes": a second}} as JSON. Packets are UDP datagrams of 18 bytes (frames
of 60) from one sender that does not wait, counted where they arrive; bytes are those of one TCP stream.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.rows import pin

LEFT, RIGHT = "10.0.0.1", "10.0.0.2"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TAP_NO_PI = 0x400454CA, 0x1002
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
_SETTLE = 0.3  # seconds in which a load comes up to speed, not counted
_PATIENCE = 20.0


class Namespace:
    """A network namespace, kept by a process that sleeps. `do` runs a function in it."""

    def __init__(self) -> None:
        self._keeper = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
        self.path = Path(f"/proc/{self._keeper.pid}/ns/net")
        own = Path("/proc/self/ns/net").stat().st_ino
        end = time.monotonic() + _PATIENCE
        while self.path.stat().st_ino == own:  # it has not got there yet
            if time.monotonic() > end:
                raise TimeoutError("unshare -n")
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        return self._keeper.pid

    def enter(self) -> None:
        with self.path.open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def start(self, function: Callable[[], object], cpu: int | None = None) -> int:
        """In a process of its own; its pid."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            self.enter()
            if cpu is not None:
                pin(cpu)
            function()
            code = 0
        finally:
            os._exit(code)

    def do(self, function: Callable[[], object]) -> None:
        _, status = os.waitpid(self.start(function), 0)
        if status:
            raise RuntimeError("what was done in a namespace failed")

    def received(self, device: str) -> int:
        """Packets that came in by a device."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == device:
                return int(counters.split()[1])
        raise LookupError(device)

    def close(self) -> None:
        self._keeper.kill()
        self._keeper.wait()


def configure(device: str, address: str) -> None:
    """Up, with an address in a network of 256."""

    def inet(text: str) -> bytes:
        return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))

    def request(number: int, rest: bytes = b"") -> bytes:
        given = struct.pack("16s", device.encode()) + rest
        return fcntl.ioctl(control, number, given.ljust(40, b"\0"))[16:]

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request(_SIOCSIFADDR, inet(address))
        request(_SIOCSIFNETMASK, inet("255.255.255.0"))
        flags = struct.unpack_from("H", request(_SIOCGIFFLAGS))[0]
        request(_SIOCSIFFLAGS, struct.pack("H", flags | 1))


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def packets(left: Namespace, right: Namespace, device: str, seconds: float) -> float:
    """A second, at the right's device."""

    def blast() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect((RIGHT, 9))
            data = bytes(18)
            while True:
                try:
                    sender.send(data)
                except OSError:  # nobody listens there, and ICMP says so
                    continue

    pid = left.start(blast, 1)
    try:
        time.sleep(_SETTLE)
        before, began = right.received(device), time.perf_counter()
        time.sleep(seconds)
        return (right.received(device) - before) / (time.perf_counter() - began)
    finally:
        _stop(pid)


def stream(left: Namespace, right: Namespace, seconds: float) -> float:
    """Bytes a second of one TCP stream, as its reader counts them."""
    reading, writing = os.pipe()

    def receive() -> None:
        buffer = bytearray(1 << 20)
        with socket.create_server((RIGHT, 5001)) as server:
            os.write(writing, b"r")
            peer = server.accept()[0]
            began = total = 0
            first = time.perf_counter() + _SETTLE
            while count := peer.recv_into(buffer):
                now = time.perf_counter()
                if now < first:
                    began = total = 0
                    continue
                total += count
                began = began or now
                if now - began >= seconds:
                    break
            os.write(writing, struct.pack("d", total / (time.perf_counter() - began)))

    def send() -> None:
        data = bytes(256 << 10)
        with socket.create_connection((RIGHT, 5001), timeout=_PATIENCE) as peer:
            while True:
                peer.sendall(data)

    receiver = right.start(receive)
    try:
        os.read(reading, 1)
        sender = left.start(send, 1)
        try:
            return float(struct.unpack("d", os.read(reading, 8))[0])
        finally:
            _stop(sender)
    finally:
        os.waitpid(receiver, 0)
        os.close(reading)
        os.close(writing)


def cpu_of(parent: int, seconds: float) -> float:
    """Milliseconds of CPU a second that a process and its children take while nobody asks for anything."""

    def family() -> list[Path]:
        found = [parent]
        for number in found:
            children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
            found += [int(child) for child in children]
        return [task for number in found for task in Path(f"/proc/{number}/task").iterdir()]

    def spent() -> int:
        return sum(int((task / "schedstat").read_text().split()[0]) for task in family())

    time.sleep(_SETTLE)
    before, began = spent(), time.perf_counter()
    time.sleep(seconds)
    return (spent() - before) / 1e6 / (time.perf_counter() - began)


# -- the ways: each gives the right's device


@contextmanager
def veth(left: Namespace, right: Namespace) -> Iterator[str]:
    """The kernel's own pair: what no copy in user space can be."""
    subprocess.run(["ip", "link", "add", "left", "type", "veth", "peer", "name", "right"], check=True)
    for name, where in (("left", left), ("right", right)):
        subprocess.run(["ip", "link", "set", name, "netns", str(where.pid)], check=True)
    yield "right"


@contextmanager
def copier(left: Namespace, right: Namespace) -> Iterator[str]:
    """A loop of read and write between two TAP devices, in plain Python, without offloads."""

    def open_tap(where: Namespace, name: str) -> int:
        ours, theirs = socket.socketpair()

        def make() -> None:
            fd = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_PI))
            socket.send_fds(theirs, [b"x"], [fd])

        where.do(make)
        fd = socket.recv_fds(ours, 1, 1)[1][0]
        ours.close()
        theirs.close()
        return fd

    one, two = open_tap(left, "left"), open_tap(right, "right")

    def copy() -> None:
        import select

        os.set_blocking(one, False)
        os.set_blocking(two, False)
        poll = select.epoll()
        other = {one: two, two: one}
        for fd in other:
            poll.register(fd, select.EPOLLIN)
        while True:
            for fd, _ in poll.poll():
                to = other[fd]
                try:
                    for _ in range(64):
                        os.write(to, os.read(fd, 65536))
                except BlockingIOError:
                    continue
                except OSError:  # the other one is not up yet
                    continue

    pid = os.fork()
    if not pid:
        pin(0)
        copy()
    try:
        yield "right"
    finally:
        _stop(pid)
        os.close(one)
        os.close(two)


@contextmanager
def ports(left: Namespace, right: Namespace) -> Iterator[str]:
    """Our two TAP ports joined in one process, without the drivers between them: what these alone take."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        pin(0)
        _join(left, right, writing)
    os.read(reading, 1)
    try:
        yield "right"
    finally:
        _stop(pid)
        os.close(reading)
        os.close(writing)


def _join(left: Namespace, right: Namespace, ready: int) -> None:
    import asyncio

    from xenbus.drivers.net.ports import open_port

    async def main() -> None:
        one = await open_port(f"tap:left?up=0&netns={left.path}")
        two = await open_port(f"tap:right?up=0&netns={right.path}")
        one.start(two)
        two.start(one)
        await asyncio.sleep(0)
        os.write(ready, b"r")
        await asyncio.Event().wait()

    asyncio.run(main())


@contextmanager
def pair(left: Namespace, right: Namespace) -> Iterator[str]:
    """TAP, xn in a guest's process, xnb in domain 0's, TAP."""

    def xenbus(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "xenbus", *words], check=True, stdout=subprocess.DEVNULL)

    root = tempfile.mkdtemp(prefix="xb-")
    os.environ["XENBUS_DIR"] = f"{root}/host"
    host = subprocess.Popen([sys.executable, "-m", "xenbus", "up"], stdout=subprocess.PIPE)
    try:
        assert host.stdout is not None
        host.stdout.readline()
        xenbus("domain", "create", "g")
        front, back = (
            f"{name}?up=0&netns={where.path}" for name, where in (("left", left), ("right", right))
        )
        xenbus("attach", "net", "--domain", "g", "--front", f"tap:{front}&mac=guest", "--tap", back)
        _hosts.append(host.pid)
        yield "right"
        _hosts.clear()
        xenbus("detach", "g/vif0")
    finally:
        host.send_signal(signal.SIGTERM)
        host.communicate(timeout=_PATIENCE)
        shutil.rmtree(root, ignore_errors=True)


_hosts: list[int] = []  # of the pair, while it stands
WAYS = {"veth": veth, "copier": copier, "ports": ports, "pair": pair}


def main() -> None:
    seconds = float(sys.argv[1])
    found: dict[str, dict[str, float]] = {}
    for name, way in WAYS.items():
        if name == "veth" and shutil.which("ip") is None:
            continue
        left, right = Namespace(), Namespace()
        try:
            with way(left, right) as device:
                left.do(lambda: configure("left", LEFT))
                right.do(lambda device=device: configure(device, RIGHT))
                found[name] = {
                    "packets": packets(left, right, device, seconds),
                    "bytes": stream(left, right, seconds),
                }
                if _hosts:
                    found[name]["idle"] = cpu_of(_hosts[0], seconds)
        finally:
            left.close()
            right.close()
        print(name, {key: f"{value:,.0f}" for key, value in found[name].items()}, file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
