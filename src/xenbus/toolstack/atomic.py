"""Transactions of a toolstack that is not alone: operators and domain 0's monitor change the same nodes.

Knows the store's client alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from xenbus.errors import Conflict, NoEntry
from xenbus.xenstore.client import Client, Transaction

T = TypeVar("T")


async def atomically(store: Client, function: Callable[[Transaction], Awaitable[T]]) -> T:
    """`store.transaction`, for functions that ask whether a node is there before they use it.

    A transaction sees a node as it was when it first looked at it, so that one may go between two looks at
    two nodes: that is the conflict which the commit would have met, and `function` is run again.
    """

    async def run(tx: Transaction) -> T:
        try:
            return await function(tx)
        except NoEntry as error:
            raise Conflict("EAGAIN", error.op, error.path, error.tx_id, "it went meanwhile") from error

    return await store.transaction(run)
