"""`python -m xenbus.xenstore.daemon`: a XenStore daemon as a process of its own.

Parses arguments, connects to the broker if it is given one, serves until SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence

from xenbus.errors import XenbusError
from xenbus.hypervisor.interface import Hypervisor
from xenbus.xenstore.daemon.keeper import Keeper
from xenbus.xenstore.daemon.loop import run
from xenbus.xenstore.daemon.server import Daemon
from xenbus.xenstore.daemon.update import SIGNALS, Resumed, Updater, tried
from xenbus.xenstore.engine import PROFILES, XENSTORED, Profile, Quotas, profile_of
from xenbus.xenstore.state.records import StateError

READY = b"ready\n"
# Descriptors: for all clients that the daemon takes, and a page and a channel or two of every guest.
DESCRIPTORS = 65536


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m xenbus.xenstore.daemon", description=__doc__)
    parser.add_argument("--socket", required=True, metavar="PATH", help="domain 0's socket (mode 0600)")
    parser.add_argument("--broker-fd", type=int, metavar="N", help="handle of the broker, for guests' rings")
    parser.add_argument("--profile", choices=PROFILES, default=XENSTORED.name, help="the daemon it is like")
    parser.add_argument(
        "--quota", action="append", default=[], metavar="NAME=N", help="a guest's limit, e.g. nodes=10000"
    )
    parser.add_argument(
        "--ready-fd", type=int, metavar="N", help="gets 'ready' and a newline, and is closed, once it serves"
    )
    parser.add_argument("--state", metavar="FILE", help="keep the store there, and begin with what is in it")
    parser.add_argument("--verbose", action="store_true", help="log more than what went wrong")
    return parser


def _say_ready(fd: int | None) -> None:
    if fd is not None:
        os.write(fd, READY)
        os.close(fd)


def _allow_descriptors() -> None:
    """As many as we may have: the usual limit of 1024 is less than the clients that are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def serve(
    path: str,
    quotas: Quotas,
    broker_fd: int | None = None,
    ready_fd: int | None = None,
    profile: Profile = XENSTORED,
    state: str | None = None,
) -> None:
    """Until SIGTERM, SIGINT, or the broker's end. `quotas` that are not the profile's own count more than
    those in the state file."""
    if tried(profile):
        return
    _allow_descriptors()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    resumed = Resumed.take()
    hypervisor = None
    if broker_fd is not None:
        from xenbus.hypervisor.broker import connect

        hypervisor = await connect(broker_fd)
        hypervisor.on_lost(stop.set)
    daemon = _daemon(hypervisor, quotas, profile, state, resumed)
    daemon.updater = Updater(daemon, evtchn_fd=-1 if broker_fd is None else broker_fd)
    try:
        await daemon.go_on(sockets=resumed is not None)
        if resumed is not None and resumed.listener >= 0:
            daemon.adopt_listener(resumed.listener)
        else:
            await daemon.listen_unix(path)
        if resumed is None:
            _say_ready(ready_fd)
        await stop.wait()
    finally:
        await daemon.close()
        if hypervisor is not None:
            await hypervisor.close()


def _daemon(
    hypervisor: Hypervisor | None,
    quotas: Quotas,
    profile: Profile,
    state: str | None,
    resumed: Resumed | None,
) -> Daemon:
    """With the store of the process before, of the file, or an empty one."""
    if resumed is not None:
        keeper = resumed.keeper(state)
        return Daemon(hypervisor, quotas, profile=profile, keeper=keeper, image=resumed.image)
    usual = profile.quotas().as_dict()
    given = {name: value for name, value in quotas.as_dict().items() if value != usual[name]}
    keeper = Keeper(state) if state is not None else None
    try:
        daemon = Daemon(hypervisor, quotas, profile=profile, keeper=keeper)
    except StateError as exc:
        raise (keeper.blamed(exc) if keeper is not None else exc) from exc
    for name, value in given.items():
        daemon.engine.quotas.set(name, value)
    return daemon


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="xenstored: %(message)s")
    try:
        profile = profile_of(options.profile)
        quotas = profile.parse_quotas(options.quota)
        run(serve(options.socket, quotas, options.broker_fd, options.ready_fd, profile, options.state))
    except XenbusError as exc:
        logging.getLogger("xenbus.xenstored").error("%s", exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
