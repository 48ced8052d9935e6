"""The embedded hypervisor across processes: a domain is a process, pages are sealed memfds, kicks eventfds.

Only names the two halves: `Broker` (broker_server, in the supervisor) and `connect` (broker_client, in a
domain process).
"""

from xenbus.hypervisor.broker_client import BrokerHypervisor, connect
from xenbus.hypervisor.broker_server import Broker
from xenbus.hypervisor.limits import Limits

__all__ = ["Broker", "BrokerHypervisor", "Limits", "connect"]
