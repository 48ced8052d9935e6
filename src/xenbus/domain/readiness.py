"""Tells systemd how a daemon fares: readiness, status, watchdog (sd_notify(3), its datagram protocol).

Knows an environment variable and a socket. Without NOTIFY_SOCKET nothing happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from xenbus.newbus.runtime import end_task

log = logging.getLogger(__name__)


class Readiness:
    """`ready()`, `status(text)`, `stopping()`; `async with watchdog():` says twice a period that we live."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._seconds = 0.0
        # WATCHDOG_PID names whom the period is for; a child that inherited the variables is not it.
        if environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(ValueError):
                self._seconds = int(environment.get("WATCHDOG_USEC", "0")) / 1e6

    def ready(self, text: str) -> None:
        self._send(f"READY=1\nSTATUS={text}")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def stopping(self, text: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={text}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):  # a name in the abstract namespace
            address = "\0" + address[1:]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(text.encode(), address)
        except OSError as error:  # whoever supervises us is gone or slow: that must not stop the devices
            log.warning("NOTIFY_SOCKET %s: %s", self._address, error)

    @asynccontextmanager
    async def watchdog(self) -> AsyncIterator[None]:
        """While the body runs. A loop that stands still says nothing, and systemd ends it."""
        if not self._seconds or not self._address:
            yield
            return
        task = asyncio.create_task(self._beat(self._seconds / 2), name="watchdog")
        try:
            yield
        finally:
            await end_task(task)

    async def _beat(self, seconds: float) -> None:
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(seconds)
