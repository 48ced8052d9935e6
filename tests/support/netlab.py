"""Tests with real kernels' network stacks: a coroutine that runs as root of a user namespace of its own.

`run(coroutine_function)` starts it in another process and returns what it returned (as JSON). Where that is
not possible, the test is skipped, and says why.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

_SECONDS = 50.0
_TRY = """
import fcntl, os, struct
fcntl.ioctl(os.open("/dev/net/tun", os.O_RDWR), 0x400454CA, struct.pack("16sH22x", b"t%d", 2))
"""


@functools.cache
def missing() -> str:
    """Why no TAP device can be made in a user namespace here; "" if it can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    for what, words in (
        ("no user namespaces here", ["true"]),
        ("no TAP devices here", [sys.executable, "-c", _TRY]),
    ):
        done = subprocess.run(["unshare", "-Urn", *words], capture_output=True, text=True, timeout=20)
        if done.returncode:
            return f"{what}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return ""


def run(test: Callable[..., Coroutine[Any, Any, Any]], *words: str, namespaces: str = "-Urn") -> Any:
    """A module's coroutine function, called there with `words`. AssertionError with its traceback."""
    program = ["unshare", namespaces, sys.executable, "-m", "tests.support.netlab"]
    done = subprocess.run(
        [*program, test.__module__, test.__qualname__, *words],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    module, name, *words = sys.argv[1:]
    test = getattr(importlib.import_module(module), name)
    print(json.dumps(asyncio.run(test(*words))))


if __name__ == "__main__":
    main()
