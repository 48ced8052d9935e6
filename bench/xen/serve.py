"""dom0's back bus with our disk back end on it, until SIGTERM: `python -m bench.xen.serve [--profile FILE]`.

Under a backend type of its own, so that xen-blkback can be loaded beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import signal

from bench.xen.backends import OURS_KIND
from xenbus.bus.driver import back_driver, drivers
from xenbus.domain.runtime import DomainRuntime
from xenbus.drivers.block.xbbd import Xbbd
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.hypervisor.polling import polling_loop
from xenbus.xenstore.client import Client

STORE = "/dev/xen/xenbus"


async def serve() -> None:
    drivers.remove(Xbbd)
    back_driver(OURS_KIND)(Xbbd)
    hv = LinuxHypervisor(0)
    runtime = DomainRuntime("Domain-0", hv, lambda: Client.connect(STORE))
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    await runtime.start()
    print("ready", flush=True)
    await over.wait()
    await runtime.stop()
    await hv.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.xen.serve", description=__doc__)
    parser.add_argument("--profile", metavar="FILE", help="write cProfile's figures there")
    parser.add_argument("--polling", action="store_true", help="by the polling event loop")
    options = parser.parse_args()
    profile = cProfile.Profile() if options.profile else None
    if profile is not None:
        profile.enable()
    with asyncio.Runner(loop_factory=polling_loop if options.polling else None) as runner:
        runner.run(serve())
    if profile is not None:
        profile.disable()
        profile.dump_stats(options.profile)


if __name__ == "__main__":
    main()
