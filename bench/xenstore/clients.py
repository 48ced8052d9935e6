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
_AVERAGE = re.compile(r": avg: (\d+) ns")


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


def subtests() -> list[str]:
    """The names of test-xenstore's."""
    output = subprocess.run([TEST_XENSTORE, "-l"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return [line.partition(":")[0].strip() for line in output.splitlines()]


def test_xenstore(store: Store, name: str, count: int) -> float:
    """Microseconds an iteration of one of its subtests, on average, as it prints it."""
    output = _output([str(TEST_XENSTORE), "-t", name, "-i", str(count)], store)
    found = _AVERAGE.search(output)
    if found is None:
        raise RuntimeError(f"test-xenstore {name}: {output!r}")
    return int(found[1]) / 1e3
