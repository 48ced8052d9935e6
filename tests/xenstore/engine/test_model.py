"""The engine against a model that is one dict: any sequence of operations, with and without transactions."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.support.engine_talk import Talk

from xenbus.xenstore.engine import Engine
from xenbus.xenstore.wire import Message, Op

PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(lambda names: "/" + "/".join(names))
VALUES = st.binary(max_size=8)
SYSTEM = {"/", "/tool", "/tool/xenstored"}


class Model(dict[str, bytes]):
    """Path -> value; the rules of xenstore.txt in as few words as they take."""

    def write(self, path: str, value: bytes) -> None:
        self.mkdir(path)
        self[path] = value

    def mkdir(self, path: str) -> None:
        names = path.split("/")[1:]
        for end in range(1, len(names) + 1):
            self.setdefault("/" + "/".join(names[:end]), b"")

    def rm(self, path: str) -> str:
        if path not in self:
            return "" if self.parent(path) in self else "ENOENT"
        for other in list(self):
            if other == path or other.startswith(path + "/"):
                del self[other]
        return ""

    def parent(self, path: str) -> str:
        return path[: path.rindex("/")] or "/"

    def children(self, path: str) -> set[str]:
        return {other.rpartition("/")[2] for other in self if other != "/" and self.parent(other) == path}


class EngineMachine(RuleBasedStateMachine):
    """Outside changes go to `model`; a transaction works on a copy and is dropped at any change outside of a
    node that it might have seen (here: any change at all makes either outcome right)."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine()
        self.talk = Talk(self.engine)
        self.inside = Talk(self.engine)
        self.model = Model(dict.fromkeys(SYSTEM, b""))
        self.copy: Model | None = None
        self.tx = 0
        self.disturbed = False

    def sides(self, use_tx: bool) -> tuple[Talk, Model, int]:
        if use_tx and self.copy is not None and not self.disturbed:
            return self.inside, self.copy, self.tx
        self.disturbed = self.copy is not None
        return self.talk, self.model, 0

    @rule(path=PATHS, value=VALUES, use_tx=st.booleans())
    def write(self, path: str, value: bytes, use_tx: bool) -> None:
        talk, model, tx = self.sides(use_tx)
        talk.ask(Op.WRITE, path, value, tx=tx)
        model.write(path, value)

    @rule(path=PATHS, use_tx=st.booleans())
    def mkdir(self, path: str, use_tx: bool) -> None:
        talk, model, tx = self.sides(use_tx)
        talk.ask(Op.MKDIR, path, tx=tx)
        model.mkdir(path)

    @rule(path=PATHS, use_tx=st.booleans())
    def rm(self, path: str, use_tx: bool) -> None:
        talk, model, tx = self.sides(use_tx)
        assert talk.error(Op.RM, path, tx=tx) == model.rm(path)

    @rule(path=PATHS)
    def look(self, path: str) -> None:
        if self.copy is not None and not self.disturbed:
            self.compare(self.inside, self.copy, path, self.tx)
        self.compare(self.talk, self.model, path, 0)

    def compare(self, talk: Talk, model: Model, path: str, tx: int) -> None:
        if path in model:
            assert talk.read(path, tx) == model[path]
            assert set(talk.ls(path, tx)) == model.children(path)
        else:
            assert talk.error(Op.READ, path, tx=tx) == "ENOENT"

    @precondition(lambda self: self.copy is None)
    @rule()
    def start(self) -> None:
        self.tx = self.inside.start()
        self.copy = Model(self.model)
        self.disturbed = False

    @precondition(lambda self: self.copy is not None)
    @rule(commit=st.booleans())
    def end(self, commit: bool) -> None:
        assert self.copy is not None
        error = self.inside.end(self.tx, commit)
        if commit and not self.disturbed:
            assert error == ""
            self.model = self.copy
        else:
            assert error in ("", "EAGAIN")
            if commit and error == "":
                # Nothing that it touched was changed: both sets of changes hold.
                self.model = Model(
                    {
                        path.decode(): node.value
                        for path, node in self.engine.nodes.items()
                        if path[:1] == b"/"
                    }
                )
        self.copy = None

    @invariant()
    def consistent(self) -> None:
        assert self.engine.check() == []
        paths = {path.decode() for path in self.engine.nodes if path[:1] == b"/"}
        assert paths == set(self.model)
        if self.copy is None:
            assert all(node.snaps == 0 for node in self.engine.nodes.values())


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


WORDS = st.sampled_from(
    [b"/a", b"a", b"/", b"@releaseDomain", b"t", b"1", b"5", b"n5", b"r0", b"T", b"F", b"nodes", b""]
)
PAYLOAD = st.one_of(
    st.binary(max_size=30), st.lists(WORDS, max_size=4).map(b"\0".join).map(lambda one: one + b"\0")
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 28), st.integers(0, 3), PAYLOAD), max_size=30))
def test_whatever_is_sent_gets_one_reply_and_harms_nothing(requests: list) -> None:
    engine = Engine()
    dom0 = Talk(engine)
    dom0.write("/local/domain/5")
    dom0.ask(Op.INTRODUCE, 5, 1, 1)
    talks = {True: Talk(engine), False: Talk(engine, 5)}
    for privileged, op, tx, payload in requests:
        talk = talks[privileged]
        if talk.conn.closed:
            continue
        replies = [one for one in talk.raw(op, payload, tx) if one.op != Op.WATCH_EVENT]
        if not talk.conn.closed:
            assert len(replies) == 1
            assert replies[0].op in (op, Op.ERROR)
    assert engine.check() == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["write", "rm", "take", "some"]), PATHS), max_size=40))
def test_the_queue_adds_up(steps: list[tuple[str, str]]) -> None:
    """However the queue is taken, counts agree and each change since a take is announced exactly once."""
    engine = Engine()
    dom0, watcher = Talk(engine), Talk(engine)
    watcher.watch("/")
    owed: list[str] = []
    got: list[str] = []
    for verb, path in steps:
        if verb == "write":
            dom0.write(path)
            if path not in owed:
                owed.append(path)
        elif verb == "rm":
            there = path.encode() in engine.nodes
            dom0.error(Op.RM, path)
            if there and path not in owed:
                owed.append(path)
        else:
            conn = watcher.conn
            data = conn.take(1) if verb == "some" else conn.take()
            events = _parse(data)
            assert events == owed[: len(events)]
            assert len(events) == (min(1, len(owed)) if verb == "some" else len(owed))
            del owed[: len(events)]
            got += events
        assert watcher.conn.queued == sum(map(len, watcher.conn.out))
        assert len(watcher.conn.events) == len(owed)


def _parse(data: bytes) -> list[str]:
    from xenbus.xenstore.wire import Parser, parse_event

    messages: list[Message] = Parser().feed(data)
    return [parse_event(one.payload)[0] for one in messages]
