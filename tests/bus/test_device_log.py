"""What a device says in the log is bounded in length and rate, whatever its peer does."""

from __future__ import annotations

import logging

from hypothesis import given
from hypothesis import strategies as st

from xenbus.bus.device_log import BURST, EVERY, TEXT_MAX, Allowance, DeviceLog


def made(name="toy0"):
    """A log with a clock of its own, and the lines it wrote."""
    lines: list[str] = []
    clock = [1000.0]

    class Keeper(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger = logging.Logger("test", logging.INFO)
    logger.addHandler(Keeper())
    return DeviceLog(logger, name, Allowance(), lambda: clock[0]), clock, lines


def test_a_flood_is_named_cut_and_counted():
    log, clock, lines = made()
    for n in range(1000):
        log.warning("lie %d", n)
    assert lines[: BURST - 1] == [f"toy0: lie {n}" for n in range(BURST - 1)]
    assert lines[BURST - 1].startswith(f"toy0: lie {BURST - 1} (the last of many")
    assert len(lines) == BURST
    clock[0] += EVERY
    log.warning("lie")
    log.warning("lie")
    assert lines[BURST:] == [f"toy0: lie ({1000 - BURST} more were left out)"]
    clock[0] += EVERY * BURST * 3
    del lines[:]
    for _ in range(1000):
        log.warning("again")
    assert len(lines) == BURST and lines[0] == "toy0: again (1 more were left out)"


def test_one_level_takes_nothing_from_another():
    log, _, lines = made()
    for _ in range(1000):
        log.info("flapping")
    log.error("closed")
    assert lines[-1] == "toy0: closed"


def test_a_level_that_is_off_costs_nothing():
    log, _, lines = made()
    for _ in range(1000):
        log.debug("detail")
    log.info("said")
    assert lines == ["toy0: said"]


@given(st.text(max_size=5000))
def test_a_line_has_a_length_whatever_a_peer_wrote(text):
    log, _, lines = made()
    log.error("%s", text)
    log.error(text)  # a percent sign in it is nothing
    assert len(lines) == 2 and all(len(line) < 10 * TEXT_MAX + 100 for line in lines)
    assert all(line.isprintable() for line in lines)
    assert lines[0] == lines[1]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200))
def test_never_more_than_the_burst_and_one_in_each_interval(pauses):
    log, clock, lines = made()
    began = clock[0]
    for pause in pauses:
        clock[0] += pause
        log.warning("lie")
        assert len(lines) <= BURST + (clock[0] - began) / EVERY
    assert len(lines) >= min(len(pauses), BURST)
