"""These tests run in the lab's dom0 (`make xen-test`), nowhere else: without a Xen they are not collected."""

from __future__ import annotations

from pathlib import Path

import pytest

IN_DOM0 = (
    Path("/proc/xen/capabilities").exists() and "control_d" in Path("/proc/xen/capabilities").read_text()
)
collect_ignore_glob = [] if IN_DOM0 else ["test_*.py"]

if IN_DOM0:
    pytest.register_assert_rewrite("tests.hypervisor.test_conformance", "tests.support")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test leaves a dump of the store in the results."""
    outcome = yield
    if IN_DOM0 and outcome.get_result().failed:
        from tests.support import evidence  # not before its asserts are to be rewritten

        evidence.note()
