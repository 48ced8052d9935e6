"""Daemons for everybody else's clients: ours, and Debian's C xenstored beside it where it can run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.xenstored import Xenstored, missing, start


@dataclass(frozen=True)
class Both:
    """The two daemons that must not be told apart."""

    theirs: Xenstored
    ours: Xenstored
    profile: str = "xenstored"


@contextlib.contextmanager
def served(kind: str) -> Iterator[Xenstored]:
    with (
        tempfile.TemporaryDirectory(prefix="xb-") as folder,
        start(kind, Path(folder) / "d", hurry=1000) as daemon,
    ):
        yield daemon


@pytest.fixture(scope="module")
def ours() -> Iterator[Xenstored]:
    with served("ours") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def both(ours: Xenstored) -> Iterator[Both]:
    if missing("c"):
        pytest.skip(missing("c"))
    with served("c") as theirs:
        yield Both(theirs, ours)


@pytest.fixture(scope="module")
def both_oxenstored() -> Iterator[Both]:
    """Debian's oxenstored, and ours with that profile."""
    if missing("o"):
        pytest.skip(missing("o"))
    with served("o") as theirs, served("ours-o") as ours:
        yield Both(theirs, ours, "oxenstored")
