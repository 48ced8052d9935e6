"""The XenStore engine, pure: tree, transactions, watches, permissions, quotas.

``Engine.handle(connection, message)`` is all a daemon calls; no I/O happens here.
"""

from xenbus.xenstore.engine.connection import (
    FEATURE_DOMID_ANY,
    FEATURE_ERROR,
    FEATURE_RECONNECTION,
    FEATURE_WATCHDEPTH,
    FEATURES,
    QUEUE_LIMIT,
    Connection,
    Domain,
)
from xenbus.xenstore.engine.dispatch import Hooks
from xenbus.xenstore.engine.engine import Engine
from xenbus.xenstore.engine.profiles import OXENSTORED, PROFILES, XENSTORED, Profile, profile_of
from xenbus.xenstore.engine.quotas import QUOTAS, Quotas

__all__ = [
    "FEATURES",
    "FEATURE_DOMID_ANY",
    "FEATURE_ERROR",
    "FEATURE_RECONNECTION",
    "FEATURE_WATCHDEPTH",
    "OXENSTORED",
    "PROFILES",
    "QUEUE_LIMIT",
    "QUOTAS",
    "XENSTORED",
    "Connection",
    "Domain",
    "Engine",
    "Hooks",
    "Profile",
    "Quotas",
    "profile_of",
]
