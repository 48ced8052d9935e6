"""Descriptors are counted here: what earlier modules left to the garbage collector goes first."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _collected() -> None:
    gc.collect()
