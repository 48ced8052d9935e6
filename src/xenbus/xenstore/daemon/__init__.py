"""The XenStore daemon: sessions over sockets, ring pages and in-process pairs, around one engine."""

from xenbus.xenstore.daemon.server import Daemon

__all__ = ["Daemon"]
