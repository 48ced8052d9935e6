"""Whether the node in the store is still the device that we attached (B18), and its links to the peer.

The store gives clients no identity of a node, so it is inferred. Two facts make it sound: whoever makes a
device sets its `state` to Initialising; and the store's answers and events come in one order, so that any
removal before a read was heard of before the read's answer. A removal or creation is heard as an event at the
node or above it (`dev.touched`). Hence, with `born` the event count when the device was last known to be
itself:

- the `state` is gone: GONE;
- it is Initialising, and ours is not, or the node was touched: REPLACED (made anew, or re-armed by hand).
  A touch can be innocent (SET_PERMS) while we are Initialising ourselves: then the driver attaches once more;
- touched, and the links to the peer are others: REPLACED;
- otherwise it is itself, and all touches up to now were innocent: TOLD_TO_CLOSE if somebody else (a toolstack
  that detaches it) wrote Closing, SAME if not.

Inside a transaction a removal after the read is a Conflict at its end, so no write of ours can reach another
device.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum

from xenbus.bus.device import XenbusDevice
from xenbus.bus.state import XenbusState
from xenbus.errors import NoEntry, PeerError

Reader = Callable[[str], Awaitable[bytes]]
_ARMED = str(int(XenbusState.INITIALISING)).encode()
_CLOSING = str(int(XenbusState.CLOSING)).encode()


class Verdict(Enum):
    SAME = "same"
    GONE = "gone"
    REPLACED = "replaced"
    TOLD_TO_CLOSE = "told to close"


async def look(dev: XenbusDevice, read: Reader) -> Verdict:
    """Under the device's lock. `read` may be a transaction's. Errors other than ENOENT are raised (B9)."""
    before = dev.bus.serial
    try:
        state = await read(f"{dev.node}/state")
    except NoEntry:
        return Verdict.GONE
    touched = dev.touched > dev.born
    if state == _ARMED and (touched or dev.state is not XenbusState.INITIALISING):
        return Verdict.REPLACED
    if touched:
        try:
            links = await read_links(dev.node, dev.bus.otherend_keys, read)
        except (NoEntry, PeerError):
            return Verdict.REPLACED
        if links != (dev.otherend_id, dev.otherend_path):
            return Verdict.REPLACED
    dev.born = before
    told = state == _CLOSING and dev.state is not XenbusState.CLOSING
    return Verdict.TOLD_TO_CLOSE if told else Verdict.SAME


async def read_links(node: str, keys: tuple[str, str], read: Reader) -> tuple[int, str]:
    """The peer's domain and path. NoEntry if one is missing, PeerError if one is nonsense."""
    id_key, path_key = keys
    domid, path = await read(f"{node}/{id_key}"), await read(f"{node}/{path_key}")
    if not (domid.isdigit() and len(domid) <= 5):
        raise PeerError(f"{node}/{id_key}: {domid!r} is no domain")
    text = path.decode("utf-8", "replace")
    if not text.startswith("/") or len(text) < 2:
        raise PeerError(f"{node}/{path_key}: {text!r} is no path of a peer")
    return int(domid), text
