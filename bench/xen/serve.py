"""dom0's back bus with our disk back end on it, until SIGTERM: `python -m bench.xen.serve TYPE`.

TYPE is the backend type it serves, so that xen-blkback and others of ours can run beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal

from xenbus.bus.driver import back_driver, drivers
from xenbus.domain.runtime import DomainRuntime
from xenbus.drivers.block.xbbd import Xbbd
from xenbus.hypervisor.linux import LinuxHypervisor
from xenbus.hypervisor.polling import polling_loop
from xenbus.xenstore.client import Client

STORE = "/dev/xen/xenbus"


async def serve(kind: str) -> None:
    drivers.remove(Xbbd)
    back_driver(kind)(Xbbd)
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
    parser.add_argument("kind", metavar="TYPE")
    parser.add_argument("--polling", action="store_true", help="by the polling event loop")
    parser.add_argument("--no-persistent", action="store_true", help="each page is granted and mapped anew")
    options = parser.parse_args()
    if options.no_persistent:
        Xbbd.max_persistent_grants = 0
    with asyncio.Runner(loop_factory=polling_loop if options.polling else None) as runner:
        runner.run(serve(options.kind))


if __name__ == "__main__":
    main()
