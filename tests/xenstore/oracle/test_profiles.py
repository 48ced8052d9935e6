"""What the two profiles answer to the same requests, said line by line, and held against Debian's daemons.

The table in docs/xenstore.md is made of these. `requests -> answer` as in tests/support/probe.py; where the
two differ, xenstored's is before the bar and oxenstored's after it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.probe import Probe
from tests.support.xenstored import KINDS, needs, start

SCRIPTS = """
# missing nodes
A WRITE /secret s -> OK
1 READ /secret -> EACCES
1 READ /secret/none -> EACCES | ENOENT
1 WRITE /secret/none x -> EACCES
1 RM /nothing/none -> EACCES | ENOENT
# who owns a new node
A WRITE /shared -> OK
A SET_PERMS /shared b0 r2 -> OK
1 WRITE /shared/a/b 1 -> OK
A GET_PERMS /shared/a/b -> b1 r2 | b0 r2
# permissions
1 WRITE x -> OK
1 SET_PERMS x n2 -> EPERM | EACCES
1 SET_PERMS x n1 r9 -> OK
1 GET_PERMS x -> n1 r9
A SET_PERMS /local/domain/1/x n9 -> ENOENT | OK
A SET_PERMS /local/domain/1/x n1 r2 r2 r2 r2 r2 -> OK
1 SET_PERMS x n1 r2 r2 r2 r2 r2 -> ENOSPC | OK
A SET_PERMS /none n0 -> ENOENT
# order of events
A WATCH /a t -> OK, event /a t
A WATCH / u -> OK, event / u
A WATCH /a v -> OK, event /a v
A WRITE /a/b 1 -> event /a/b t, event /a/b u, event /a/b v, OK | OK, event /a/b u, event /a/b v, event /a/b t
A RM /a -> event /a t, event /a u, event /a v, OK | OK, event /a u, event /a v, event /a t
# events of what is removed
A WATCH /d/x t -> OK, event /d/x t
A WATCH /d t -> OK, event /d t
A WATCH /d/none t -> OK, event /d/none t
A WATCH /d/x/y/none t -> OK, event /d/x/y/none t
A WRITE /d/x 1 -> event /d/x t, OK | OK, event /d/x t, event /d/x t
A RM /d -> event /d/x t, event /d t, OK | OK, event /d t, event /d/none t, event /d/x t
# order of events of what is removed
A WATCH /d/b t -> OK, event /d/b t
A WATCH /d/a/y t -> OK, event /d/a/y t
A WATCH /d/a/x t -> OK, event /d/a/x t
A WATCH /d/a t -> OK, event /d/a t
A MKDIR /d/b -> event /d/b t, OK | OK, event /d/b t
A MKDIR /d/a/y -> event /d/a/y t, OK | OK, event /d/a/y t, event /d/a/y t
A RM /d/a/y -> event /d/a/y t, OK | OK, event /d/a/y t, event /d/a/y t
A RM /d -> event /d/b t, event /d/a t, OK | OK, event /d/a t, event /d/a/x t, event /d/a/y t, event /d/b t
# who may read it no more
A WRITE /x 1 -> OK
A SET_PERMS /x r0 -> OK
1 WATCH /x t -> OK, event /x t
A SET_PERMS /x n0 -> OK, 1: event /x t
A WRITE /x 2 -> OK
A SET_PERMS /x r0 -> OK, 1: event /x t
A RM /x -> OK, 1: event /x t
# events of a transaction
A WATCH /a t -> OK, event /a t
A START t -> a transaction
A@t WRITE /a/x 1 -> OK
A@t WRITE /a/y 1 -> OK
A@t WRITE /a/x 2 -> OK
A@t RM /a/y -> OK
A@t END T -> event /a/x t, OK | event /a/x t, event /a/y t, event /a/x t, OK
# snapshot
A WRITE /a old -> OK
A START t -> a transaction
B WRITE /a new -> OK
A@t READ /a -> new | old
A@t END T -> OK
# a transaction that reads
A WRITE /a 0 -> OK
A START t -> a transaction
A@t READ /a -> 0
B WRITE /a 1 -> OK
A@t END T -> EAGAIN | OK
# blind writes
A WRITE /a 0 -> OK
A START t -> a transaction
A@t WRITE /a 1 -> OK
B WRITE /a 2 -> OK
A@t END T -> EAGAIN | OK
A READ /a -> 2 | 1
# the same value again
A WRITE /a 0 -> OK
A START t -> a transaction
A@t READ /none -> ENOENT
A@t WRITE /a 1 -> OK
B WRITE /a 0 -> OK
B MKDIR /none -> OK
A@t END T -> EAGAIN | OK
A RM /none -> OK
A START t -> a transaction
A@t READ /none -> ENOENT
A@t WRITE /a 2 -> OK
B WRITE /a 3 -> OK
B MKDIR /none -> OK
A@t END T -> EAGAIN
# siblings
A WRITE /a 0 -> OK
A START t -> a transaction
A@t WRITE /a/x 1 -> OK
B WRITE /a/y 2 -> OK
A@t END T -> EAGAIN | OK
A DIRECTORY /a -> y | x y
# read and conflict
A WRITE /a 0 -> OK
A START t -> a transaction
A@t READ /a -> 0
A@t WRITE /b 1 -> OK
B WRITE /a 1 -> OK
A@t END T -> EAGAIN
A START t -> a transaction
A@t READ /a -> 1
A@t WRITE /b 1 -> OK
B WRITE /a 2 -> OK
B WRITE /a 1 -> OK
A@t END T -> EAGAIN | OK
# what an operation makes before it fails
A START t -> a transaction
A@t MKDIR /a -> OK
A@t WRITE /b/c v*3000 -> OK | E2BIG
A@t END T -> OK
A READ /b -> nothing
A RM /a -> OK
A RM /b -> OK
A START t -> a transaction
A@t MKDIR /a -> OK
A@t WRITE /b/c v*3000 -> OK | E2BIG
B MKDIR /a -> OK
A@t END T -> EAGAIN | OK
A READ /b -> ENOENT
# transaction ids
A@77 READ / -> ENOENT | EIO
A@77 WATCH /w t -> OK, event /w t | OK (tx 0), event /w t
A@77 UNWATCH /w t -> OK | OK (tx 0)
A@77 99 x -> ENOSYS | EIO
A START t -> a transaction
A@t START u -> EBUSY
A@t END =T -> EINVAL | OK
A END T -> ENOENT
A@t END T -> OK | EIO
# the root
A MKDIR / -> OK
A WRITE / x -> OK
A READ / -> x
A RM / -> EINVAL | OK
A DIRECTORY / -> tool local | nothing
# special paths
A DIRECTORY / -> tool local | @introduceDomain @releaseDomain local tool
A READ @releaseDomain -> EINVAL | nothing
A WRITE @releaseDomain x -> EINVAL | OK
A WRITE @other x -> EINVAL | OK
A READ @other -> EINVAL | x
A WATCH @releaseDomain t -> OK, event @releaseDomain t
A WATCH @other t -> OK, event @other t
1 WATCH @releaseDomain t -> OK, event @releaseDomain t
A RELEASE 2 -> event @releaseDomain t, OK
A UNWATCH @x t -> ENOENT
# numbers
A INTRODUCED 99 -> F
A RELEASE 99 -> ENOENT | EINVAL
A RESUME 99 -> ENOENT | EINVAL
A SET_TARGET 1 99 -> ENOENT | OK
A SET_TARGET 99 1 -> ENOENT
A INTRODUCE 1 2 1 -> OK | EINVAL
1 INTRODUCED 1 -> EACCES
# values and names
A WRITE /v v*2048 -> OK
A WRITE /v v*2049 -> OK | E2BIG
1 WRITE v v*2000 -> OK
1 WRITE v v*2048 -> ENOSPC | OK
1 WRITE v v*2049 -> ENOSPC | E2BIG
A WRITE /p*1024 x -> OK | EINVAL
A WRITE /p*1023 x -> OK
1 WRITE p*1025 x -> OK | EINVAL
A MKDIR /dir/z -> OK
A MKDIR /dir/a -> OK
A DIRECTORY /dir -> z a | a z
1 WATCH w*2100 t -> EINVAL | OK, event 2100 bytes t
# introduced again
1 WATCH x t -> OK, event x t
A INTRODUCE 1 1 1 -> OK
A WRITE /local/domain/1/x 1 -> OK | OK, 1: event x t
1 READ x -> 1
A INTRODUCE 1 7 1 -> OK | EINVAL
A RELEASE 2 -> OK
A INTRODUCE 2 7 1 -> OK
# operations
A 20 x -> ENOSYS
A 15 x -> ENOSYS
A CONTROL nonsense -> EINVAL | OK
1 CONTROL nonsense -> EACCES | OK
1 CONTROL print x -> EACCES | OK
A RESET -> OK
A UNWATCH // t -> ENOENT
A UNWATCH /none t -> ENOENT
A WATCH /a t -> OK, event /a t
A WATCH /a t -> EEXIST
A DIRECTORY /none -> ENOENT
# target
A WRITE /local/domain/2/x 1 -> OK
A SET_TARGET 1 2 -> OK
1 READ /local/domain/2/x -> 1
1 WRITE /local/domain/2/y 1 -> OK
A RELEASE 2 -> OK
1 WRITE /local/domain/1/y 1 -> OK
# death
A WATCH /local/domain t -> OK, event /local/domain t
A WATCH @releaseDomain t -> OK, event @releaseDomain t
1 WRITE x 1 -> OK, A: event /local/domain/1/x t
A RELEASE 1 -> event /local/domain/1 t, event @releaseDomain t, OK | event @releaseDomain t, OK
A READ /local/domain/1/x -> ENOENT
"""


def _scripts() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in filter(None, SCRIPTS.splitlines()):
        if line.startswith("# "):
            lines = found[line[2:]] = []
        else:
            lines.append(line)
    return found


def _expected(line: str, oxenstored: bool) -> tuple[str, str]:
    """The request, and its answer."""
    request, _, answers = line.partition(" -> ")
    return request, answers.split(" | ")[-1 if oxenstored else 0]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in KINDS])
@pytest.mark.parametrize("script", _scripts())
def test_both_profiles(kind: str, script: str, tmp_path: Path) -> None:
    with start(kind, tmp_path / "d") as daemon:
        probe = Probe(daemon)
        lines = [_expected(line, kind in ("o", "ours-o")) for line in _scripts()[script]]
        assert [(request, probe.ask(request)) for request, _ in lines] == lines


# Of quotas that are soon met. A full transaction of oxenstored's does not end, but by RESET_WATCHES.
LIMITS = {"nodes": 3, "watches": 1, "transactions": 1, "transaction-nodes": 6}
AT_THE_LIMIT = """
1 START t -> a transaction
1@t WRITE a 1 -> OK
1@t WRITE b 1 -> OK
1@t WRITE c 1 -> OK | EQUOTA
1@t RM b -> OK
1@t WRITE c 1 -> OK
1@t END T -> ENOSPC | OK
1 RESET -> OK
1 RM a -> OK
1 RM c -> OK
1 WRITE a 1 -> OK
1 WRITE b/c/d 1 -> ENOSPC | EQUOTA
1 READ b -> ENOENT | nothing
1 WRITE b 1 -> OK
1 WRITE c 1 -> ENOSPC | EQUOTA
A WRITE /local/domain/1/d 1 -> OK
1 WATCH a t -> OK, event a t
1 WATCH b t -> OK, event b t
1 WATCH c t -> E2BIG | EQUOTA
1 START t -> a transaction
1 START u -> a transaction
1 START v -> ENOSPC | EQUOTA
1@t READ a -> 1
1@t READ b -> 1
1@t READ d -> 1
1@t READ e -> ENOENT
1@t READ f -> ENOENT
1@t READ g -> ENOSPC | ENOENT
1@t READ h -> ENOSPC | EQUOTA
1@t END F -> OK | EQUOTA
1@t END F -> ENOENT | EQUOTA
1 RESET -> OK
1@t END F -> ENOENT | EIO
"""


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in KINDS])
def test_at_the_limit(kind: str, tmp_path: Path) -> None:
    with start(kind, tmp_path / "d", quotas=LIMITS) as daemon:
        probe = Probe(daemon)
        lines = [_expected(line, kind in ("o", "ours-o")) for line in AT_THE_LIMIT.split("\n")[1:-1]]
        assert [(request, probe.ask(request)) for request, _ in lines] == lines
