"""Clients as processes of their own: a load and a count in, microseconds an operation on standard output.

Knows how to build and run them; ours.py, pyxs_client.py and libxenstore.c are what runs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from bench.xenstore.daemons import Store

SOURCE = Path(__file__).with_name("libxenstore.c")
HEADER = Path("/usr/include/xenstore.h")
TEST_XENSTORE = Path("/usr/lib/xen-4.17/bin/test-xenstore")
_LINE = re.compile(r"^(\S.{9}): avg: (\d+) ns", re.MULTILINE)


def no_libxenstore() -> str:
    """Why a client on libxenstore cannot be built; "" if it can."""
    if shutil.which("cc") is None:
        return "cc is not installed"
    return "" if HEADER.is_file() else "libxenstore's header is not installed (Debian: libxen-dev)"


def no_test_xenstore() -> str:
    return "" if TEST_XENSTORE.is_file() else f"{TEST_XENSTORE} is not installed (Debian: xen-utils-4.17)"


def no_pyxs() -> str:
    return "" if importlib.util.find_spec("pyxs") else "pyxs is not installed (`make bench` does that)"


@cache
def build(folder: Path) -> Path:
    """The program of libxenstore.c."""
    program = folder / "libxenstore"
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", str(SOURCE), "-o", program, "-lxenstore"], check=True)
    return program


def _output(command: list[str], store: Store) -> str:
    environment = {**os.environ, "XENSTORED_RUNDIR": str(store.rundir)}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def libxenstore(program: Path, store: Store, load: str, count: int) -> float:
    return float(_output([str(program), load, str(count)], store))


def python(module: str, store: Store, load: str, count: int) -> float:
    """`module` of this package, with the Python that runs us."""
    command = [sys.executable, "-m", f"{__package__}.{module}", load, store.socket, str(count)]
    return float(_output(command, store))


def test_xenstore(store: Store, count: int) -> dict[str, float]:
    """Microseconds an iteration of each of its subtests, as it prints them."""
    output = _output([str(TEST_XENSTORE), "-i", str(count)], store)
    return {name.strip(): int(average) / 1e3 for name, average in _LINE.findall(output)}
