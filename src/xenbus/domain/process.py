"""The program of a domain process: `python -m xenbus.domain.process`, started by the host.

Takes its broker handle by number, says "ready" on a pipe, ends with an exit code that tells why. Domain 0's
program (in the toolstack) is this one with more around it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

from xenbus.domain.host import ExitCode
from xenbus.domain.layout import HostLayout
from xenbus.domain.runtime import DomainRuntime, ring_store
from xenbus.domain.service import DomainService
from xenbus.errors import XenbusError
from xenbus.hypervisor.broker import BrokerHypervisor, connect
from xenbus.hypervisor.polling import polling_loop

log = logging.getLogger(__name__)

_CODES = {"poweroff": ExitCode.POWEROFF, "reboot": ExitCode.REBOOT, "lost": ExitCode.LOST_HOST}
# Given the runtime while it is up: what more a domain does.
Around = Callable[[DomainRuntime, HostLayout], AbstractAsyncContextManager[object]]
MakeRuntime = Callable[[str, BrokerHypervisor, HostLayout], Awaitable[DomainRuntime]]


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="xenbus-domain", description="One domain of an embedded host.")
    parser.add_argument("--broker-fd", type=int, required=True, help="its handle of the broker")
    parser.add_argument("--name", required=True)
    parser.add_argument("--host", type=Path, required=True, help="the host's directory")
    parser.add_argument("--ready-fd", type=int, required=True, help='where "ready" is written')
    return parser.parse_args(arguments)


def set_up_logging(level: str | None = None) -> None:
    logging.basicConfig(
        level=level or os.environ.get("XENBUS_LOG", "INFO"),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


async def guest(name: str, hv: BrokerHypervisor, layout: HostLayout) -> DomainRuntime:
    return DomainRuntime(name, hv, ring_store(hv), life=hv)


async def run(given: argparse.Namespace, make: MakeRuntime = guest, around: Around | None = None) -> int:
    """Until the domain ends; the exit code."""
    layout = HostLayout(given.host)
    hv = await connect(given.broker_fd)
    runtime = await make(given.name, hv, layout)
    loop = asyncio.get_running_loop()
    hv.on_lost(lambda: runtime.end("lost"))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runtime.end, "poweroff")
    service = DomainService(runtime)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runtime.stop)
        stack.push_async_callback(service.close)
        # Before the devices: whoever sees one Connected may ask, and a boot that hangs can be looked at.
        await service.serve(layout.control_socket(given.name))
        await runtime.start()
        if around is not None:
            await stack.enter_async_context(around(runtime, layout))
        os.write(given.ready_fd, b"ready\n")
        os.close(given.ready_fd)
        reason = await runtime.ended
        log.info("ending: %s", reason)
    # The handle is left to the kernel: its end of file is this domain's death, and the exit code is next.
    return _CODES[reason]


def main(
    arguments: Sequence[str] | None = None, make: MakeRuntime = guest, around: Around | None = None
) -> int:
    given = options(arguments)
    set_up_logging()
    try:
        with asyncio.Runner(loop_factory=polling_loop) as runner:
            return runner.run(run(given, make, around))
    except XenbusError as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
