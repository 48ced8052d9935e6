"""tools/xen/table.py: what the lab's junit.xml becomes in Markdown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).parents[2] / "tools/xen/table.py"
CASE = """<testcase name="{name}"><properties><property name="pairing" value="{pairing}"/>{cells}</properties>
{outcome}</testcase>"""


def case(name: str, pairing: str, *cells: str, outcome: str = "") -> str:
    said = "".join(f'<property name="cell" value="{cell}"/>' for cell in cells)
    return CASE.format(name=name, pairing=pairing, cells=said, outcome=outcome)


def test_worst_of_a_cell_reasons_below_and_other_tests_left_out(tmp_path):
    junit = tmp_path / "junit.xml"
    cases = [
        case("1", "a on b", "flush: on", "rings: off"),
        case("2", "a on b", "rings: on", outcome='<skipped message="b has none"/>'),
        case("3", "c on d", "flush: on"),
        case("4", "c on d", "flush: on", outcome="<failure/>"),
        case("5", "c on d", "rings: on"),
        '<testcase name="other"/>',
    ]
    junit.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    done = subprocess.run(
        [sys.executable, str(TABLE), str(junit)], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines() == [
        "| | | a on b | c on d |",
        "|---|---|---|---|",
        "| flush | on | yes | **fails** |",
        "| rings | on | no (1) | yes |",
        "|  | off | yes |  |",
        "",
        "1. b has none",
    ]
