"""The table of features by pairings, in Markdown, from what tests/xen/test_features.py left in junit.xml.

    python tools/xen/table.py xen-results/junit.xml

A case says by its properties which pairing it is of and which cells it fills ("feature: setting"), the rest
is its outcome. A cell that several cases fill says the worst. What cannot be is a number below the table.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """Of one cell, by one case. outcome: "yes", "**fails**", or why it cannot be"""

    pairing: str
    feature: str
    setting: str
    outcome: str


FAILS, YES = "**fails**", "yes"


def read(junit: Path) -> Iterator[Found]:
    for case in ET.parse(junit).getroot().iter("testcase"):
        values = [(each.get("name"), each.get("value", "")) for each in case.iter("property")]
        pairing = dict(values).get("pairing", "")
        skipped = case.find("skipped")
        outcome = YES if skipped is None else skipped.get("message", "")
        if any(case.find(kind) is not None for kind in ("failure", "error")):
            outcome = FAILS
        for name, value in values:
            if name == "cell":
                feature, _, setting = value.partition(": ")
                yield Found(pairing, feature, setting, outcome)


def worst(outcomes: list[str]) -> str:
    if FAILS in outcomes:
        return FAILS
    return YES if YES in outcomes else outcomes[0] if outcomes else ""


def markdown(found: list[Found]) -> str:
    pairings = list(dict.fromkeys(each.pairing for each in found))
    rows = sorted({(each.feature, each.setting) for each in found}, key=order(found))
    notes: list[str] = []

    def cell(feature: str, setting: str, pairing: str) -> str:
        where = (pairing, feature, setting)
        text = worst([e.outcome for e in found if (e.pairing, e.feature, e.setting) == where])
        if text in ("", YES, FAILS):
            return text
        if text not in notes:
            notes.append(text)
        return f"no ({notes.index(text) + 1})"

    lines = [f"| | | {' | '.join(pairings)} |", f"|---|---|{'---|' * len(pairings)}"]
    last = ""
    for feature, setting in rows:
        cells = " | ".join(cell(feature, setting, pairing) for pairing in pairings)
        lines.append(f"| {feature if feature != last else ''} | {setting} | {cells} |")
        last = feature
    if notes:
        lines += ["", *(f"{n}. {note}" for n, note in enumerate(notes, 1))]
    return "\n".join(lines)


def order(found: list[Found]):
    """Features as they came, "on" before "off"."""
    features = list(dict.fromkeys(each.feature for each in found))
    return lambda row: (features.index(row[0]), row[1] != "on", row[1])


if __name__ == "__main__":
    print(markdown(list(read(Path(sys.argv[1])))))  # noqa: T201
