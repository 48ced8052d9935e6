"""The far sides of net drivers: TAP devices, a switch, the packet interface. `open_port` is the way in.

The node `xenbus-port` of either half of a `vif` has the target; with none a front end has `packet:`, a back
end `tap:` where a hotplug script is configured (`script`), otherwise `packet:`.
Knows packets; knows nothing of rings or the store. To add a scheme: one file in `schemes/`, one decorator.
"""

from xenbus.drivers.net.ports.registry import PortError, Target, open_port, port_scheme, scheme_names

__all__ = ["PortError", "Target", "open_port", "port_scheme", "scheme_names"]
