"""Debian's xenstore-* programs: what they print and how they end is the same on ours and on the C daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.xenstored import DEADLINE, Xenstored
from tests.xenstore.peers.conftest import Both

# The real one first: Debian's wrapper of xenstore-control refuses to run without a hypervisor.
PLACES = ("/usr/lib/xen-4.17/bin", *os.environ.get("PATH", "").split(":"))


def tool(name: str) -> str:
    for place in PLACES:
        if (path := shutil.which(name, path=place)) is not None:
            return path
    pytest.skip(f"{name} is not installed (Debian: xenstore-utils, xen-utils-4.17)")


def environment(daemon: Xenstored) -> dict[str, str]:
    return {**os.environ, "XENSTORED_RUNDIR": str(daemon.folder / "run"), "LC_ALL": "C"}


@dataclass(frozen=True)
class Said:
    code: int
    out: bytes
    err: bytes


def run(daemon: Xenstored, *words: str | bytes, stdin: bytes = b"") -> Said:
    name, *rest = words
    done = subprocess.run(
        [tool(os.fsdecode(name)), *rest],
        env=environment(daemon),
        input=stdin,
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


def same(both: Both, *commands: Sequence[str | bytes]) -> list[Said]:
    """What each command said, one after the other; AssertionError where the daemons differ."""
    result = []
    for words in commands:
        theirs, ours = run(both.theirs, *words), run(both.ours, *words)
        assert ours == theirs, words
        result.append(ours)
    return result


def line(text: str) -> list[str]:
    return text.split(" ")


def test_write_and_read(both: Both) -> None:
    said = same(
        both,
        line("xenstore-write /w/a value"),
        line("xenstore-write /w/b 1 /w/c 2"),
        line("xenstore-write -s /w/d 3"),
        line("xenstore-read /w/a"),
        line("xenstore-read -p /w/a /w/b /w/c"),
        line("xenstore-read -s /w/d"),
        ["xenstore-write", "/w/e", ""],
        line("xenstore-read /w/e"),
        line("xenstore-read /w/none"),
        line("xenstore-read /w/a /w/none /w/b"),
        line("xenstore-read w/relative"),
        line("xenstore-read /w//a"),
        line("xenstore-read /w/"),
        line("xenstore-read @releaseDomain"),
        ["xenstore-read", ""],
        line("xenstore-write /w/odd"),
        line("xenstore-write"),
        line("xenstore-write /w//a 1"),
        line("xenstore-write / root"),
        line("xenstore-read /"),
        line("xenstore-write relative 1"),
        line("xenstore-read /local/domain/0/relative"),
        ["xenstore-write", "/w/long", "x" * 4000],
        line("xenstore-read /w/long"),
        ["xenstore-write", "/w/longer", "x" * 5000],
        ["xenstore-write", "/w/" + "p" * 3000, "1"],
        ["xenstore-read", "/w/" + "p" * 4100],
        line("xenstore-rm /w"),
        line("xenstore-rm /local"),
    )
    assert [one.code for one in said[:6]] == [0] * 6
    assert said[4].out == b"/w/a: value\n/w/b: 1\n/w/c: 2\n"
    assert said[8].code == 1


def test_values_that_are_no_text(both: Both) -> None:
    odd = bytes(byte for byte in range(1, 256) if byte != ord("\\"))
    said = same(
        both,
        [b"xenstore-write", b"/bin/a", odd],
        line("xenstore-read /bin/a"),
        line("xenstore-read -R /bin/a"),
        line("xenstore-ls /bin"),
        line("xenstore-ls -f /bin"),
        ["xenstore-write", "/bin/b", r"\x00\x01\n\t\\end\007"],
        line("xenstore-read /bin/b"),
        line("xenstore-read -R /bin/b"),
        ["xenstore-write", "-R", "/bin/c", r"raw \x41"],
        line("xenstore-read /bin/c"),
        ["xenstore-write", "/bin/d", "bad \\"],
        line("xenstore-rm /bin"),
    )
    assert said[2].out == odd, "and nothing after it"


def test_list_and_ls(both: Both) -> None:
    many = [word for number in range(600) for word in (f"/l/many/child-{number:04d}", str(number))]
    said = same(
        both,
        line("xenstore-write /l/a/b 1 /l/c two /l/a/d/e/f 3"),
        line("xenstore-list /l"),
        line("xenstore-list -p /l /l/a"),
        line("xenstore-list -s /l"),
        line("xenstore-list /l/none"),
        line("xenstore-list /l/c"),
        line("xenstore-list"),
        line("xenstore-ls /l"),
        line("xenstore-ls -f /l"),
        line("xenstore-ls -p /l"),
        line("xenstore-ls -f -p /l"),
        line("xenstore-ls -s /l"),
        line("xenstore-ls /l/none"),
        line("xenstore-ls /l/c"),
        line("xenstore-ls /l/"),
        ["xenstore-write", *many],
        line("xenstore-list /l/many"),
        line("xenstore-ls -f /l/many"),
        line("xenstore-rm /l/many"),
        ["xenstore-write", "/l" + "/d" * 500, "bottom"],
        line("xenstore-ls -f /l/d"),
        line("xenstore-rm /l"),
        line("xenstore-ls"),
        line("xenstore-ls -f -p"),
    )
    assert said[1].out == b"a\nc\n"
    if both.profile == "xenstored":
        assert said[16].out.count(b"\n") == 600
    else:
        assert said[16].code == 1, "oxenstored sends such a list as it is, and libxenstore takes none"


def test_exists(both: Both) -> None:
    said = same(
        both,
        line("xenstore-write /e/a 1"),
        line("xenstore-exists /e/a"),
        line("xenstore-exists /e/none"),
        line("xenstore-exists -p /e/a"),
        line("xenstore-exists -s /e /e/a"),
        line("xenstore-exists /e/none /e/a"),
        line("xenstore-exists /e//a"),
        line("xenstore-exists"),
        line("xenstore-rm /e"),
    )
    assert [one.code for one in said[:3]] == [0, 0, 1]


def test_rm(both: Both) -> None:
    said = same(
        both,
        line("xenstore-write /r/a/b/c 1 /r/x 2 /r/y 3 /r/t/u/v 4 /r/t/w 5"),
        line("xenstore-rm /r/a/b"),
        line("xenstore-exists /r/a"),
        line("xenstore-rm /r/x /r/y"),
        line("xenstore-rm /r/none"),
        line("xenstore-rm /none/none"),
        line("xenstore-rm -t /r/t/u/v"),
        line("xenstore-exists /r/t/u"),
        line("xenstore-exists /r/t"),
        line("xenstore-rm -t /r/t/w"),
        line("xenstore-ls -f /r"),
        line("xenstore-rm /"),
        line("xenstore-rm"),
        line("xenstore-rm -s /r"),
        line("xenstore-rm @releaseDomain"),
    )
    assert [one.code for one in said[6:10]] == [0, 1, 0, 0]


def test_chmod(both: Both) -> None:
    said = same(
        both,
        line("xenstore-write /m/a/b 1"),
        line("xenstore-chmod /m n0"),
        line("xenstore-ls -p /m"),
        line("xenstore-chmod -r /m b0"),
        line("xenstore-ls -p /m"),
        line("xenstore-chmod -u /m/a/b r0"),
        line("xenstore-ls -f -p /m"),
        line("xenstore-chmod -r -u /m n0"),
        line("xenstore-ls -f -p /m"),
        line("xenstore-chmod /m x0"),
        line("xenstore-chmod /m n0 r5 w6"),
        line("xenstore-ls -f -p"),
        line("xenstore-chmod /m n5"),
        line("xenstore-chmod /m"),
        line("xenstore-chmod"),
        line("xenstore-chmod /m/none n0"),
        line("xenstore-chmod @releaseDomain n0"),
        ["xenstore-chmod", "/m", *["n0"] * 20],
        line("xenstore-rm /m"),
    )
    assert said[1].code == 0
    assert b"(b0)" in said[4].out


def test_the_xenstore_program(both: Both) -> None:
    """All of them in one, by its first word."""
    same(
        both,
        line("xenstore write /x/a 1"),
        line("xenstore read /x/a"),
        line("xenstore list /x"),
        line("xenstore ls /x"),
        line("xenstore exists /x/b"),
        line("xenstore rm /x"),
        line("xenstore read /x/a"),
        line("xenstore"),
    )


# What the current daemon has and 4.17 has not, and the number that must be one here.
NEWER = {"log", "log +io", "log -io", "quota max -r", "quota x"}


def test_control(both: Both) -> None:
    """Texts are each daemon's own; what is done and what is refused is not."""
    commands = [
        *("check", "check x", "help", "none", ""),
        *("log", "log on", "log off", "log +io", "log -io", "log maybe", "log on off"),
        *("print text", "print"),
        *("quota", "quota 0", "quota 99", "quota x", "quota max -r", "quota max -x"),
        *("quota set nodes 2000", "quota set nodes", "quota set none 5", "quota set nodes x"),
        *("quota-soft", "quota-soft set memory 1000000", "quota-soft set none 5"),
    ]
    differ = set()
    for command in commands:
        words = ["xenstore-control", *command.split()]
        theirs, ours = run(both.theirs, *words), run(both.ours, *words)
        if ours.code != theirs.code:
            differ.add(command)
    assert differ <= NEWER


@pytest.mark.parametrize("which", ["theirs", "ours"])
def test_watch(both: Both, which: str) -> None:
    daemon: Xenstored = getattr(both, which)
    command = [tool("xenstore-watch"), "-n", "5", "/h", "/i"]
    with subprocess.Popen(command, env=environment(daemon), stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]  # both watches are set now
        daemon.toolstack.write("/h/a", "1")
        daemon.toolstack.rm("/h")
        daemon.toolstack.write("/i", "1")
        lines += process.stdout.readlines()
        assert process.wait(DEADLINE) == 0
    assert lines == [b"/h\n", b"/i\n", b"/h/a\n", b"/h\n", b"/i\n"]
    daemon.toolstack.rm("/i")


def test_watch_and_its_wrong_words(both: Both) -> None:
    same(both, line("xenstore-watch"), line("xenstore-watch -n 1 /h"), line("xenstore-watch -n 1 /h//x"))


@pytest.mark.slow
def test_xens_own_test_program(ours: Xenstored, tmp_path: Path) -> None:
    """test-xenstore: twelve loads, and random operations for a while; it compares what it reads itself."""
    done = run(ours, "test-xenstore", "-i", "1000")
    assert done.code == 0, done
    loads = [line.split(b":")[0].rstrip() for line in run(ours, "test-xenstore", "-l").out.splitlines()]
    assert len(loads) == 12
    assert [name for name in loads if name not in done.out] == []
    done = run(ours, "test-xenstore", "-r", "1")
    assert done.code == 0, done
    assert ours.toolstack.control("check") == "OK"
