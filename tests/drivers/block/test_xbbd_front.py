"""What a front published, in any shape: either it is understood, or a PeerError names the key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenbus.drivers.block import blkif
from xenbus.drivers.block.xbbd_front import HEAD, Parameters, QueueKeys, Shape
from xenbus.errors import PeerError

PATH = "/local/domain/7/device/vbd/51712"
QUEUES, ORDER = 4, 2


def read(nodes: dict[str, bytes]) -> Parameters:
    """As xbbd does: HEAD first, then the keys that follow from it."""
    shape = Shape.of(PATH, {key: nodes.get(key) for key in HEAD}, QUEUES, ORDER)
    wanted = shape.keys()
    return shape.parameters({key: nodes.get(key) for key in wanted})


def published(queues: list[QueueKeys], order: int, abi: blkif.Abi, persistent: bool) -> dict[str, bytes]:
    """As Linux's blkfront does: no more keys than needed."""
    nodes = {"protocol": abi.name.encode(), "feature-persistent": b"%d" % persistent}
    if order:
        nodes["ring-page-order"] = b"%d" % order
    if len(queues) > 1:
        nodes["multi-queue-num-queues"] = b"%d" % len(queues)
    for n, queue in enumerate(queues):
        folder = f"queue-{n}/" if len(queues) > 1 else ""
        nodes[f"{folder}event-channel"] = b"%d" % queue.port
        for k, ref in enumerate(queue.refs):
            nodes[f"{folder}ring-ref{k if order else ''}"] = b"%d" % ref
    return nodes


@st.composite
def fronts(draw):
    order = draw(st.integers(0, ORDER))
    count, pages = draw(st.integers(1, QUEUES)), 1 << order
    numbers = st.integers(0, 2**32 - 1)
    refs = draw(st.lists(numbers, min_size=count * pages, max_size=count * pages, unique=True))
    ports = draw(st.lists(numbers, min_size=count, max_size=count, unique=True))
    queues = [QueueKeys(tuple(refs[n * pages : (n + 1) * pages]), port) for n, port in enumerate(ports)]
    return queues, order, draw(st.sampled_from([blkif.X86_64, blkif.X86_32])), draw(st.booleans())


@given(fronts())
def test_what_a_good_front_says_is_understood(front):
    queues, _, abi, persistent = front
    assert read(published(*front)) == Parameters(tuple(queues), abi, persistent)


@given(fronts(), st.data())
def test_one_key_less(front, data):
    """A queue's key that is missing is named; the others have defaults."""
    nodes = published(*front)
    gone = data.draw(st.sampled_from(sorted(nodes)))
    del nodes[gone]
    if gone.endswith("event-channel") or "ring-ref" in gone:
        with pytest.raises(PeerError, match=f"{PATH}/{gone} is missing"):
            read(nodes)
    elif gone in ("ring-page-order", "multi-queue-num-queues"):
        with pytest.raises(PeerError, match=r"(ring-ref|event-channel) is missing"):
            read(nodes)  # then it is read as one of one, whose keys are not there
    else:
        read(nodes)


@given(fronts(), st.data())
def test_one_key_that_says_what_another_says(front, data):
    nodes = published(*front)
    kind = data.draw(st.sampled_from(["ring-ref", "event-channel"]))
    keys = [key for key in nodes if kind in key]
    if len(keys) < 2:
        return
    first, second = data.draw(st.lists(st.sampled_from(keys), min_size=2, max_size=2, unique=True))
    nodes[second] = nodes[first]
    with pytest.raises(PeerError, match=" is that of ") as caught:
        read(nodes)
    assert first in str(caught.value) and second in str(caught.value)


VALUES = st.one_of(
    st.binary(max_size=24),
    st.integers(-3, 20).map(lambda n: b"%d" % n),
    st.sampled_from([b"", b" 1", b"0x1", b"1\0", b"9" * 20, b"\xff", b"4294967296", b"x86_32-abi"]),
)


@given(fronts(), st.data())
def test_whatever_it_writes_it_is_parameters_or_a_word_on_the_key(front, data):
    nodes = published(*front)
    keys = [*HEAD, "queue-0", "queue-1/event-channel", "ring-ref", "ring-ref0", *nodes]
    nodes |= data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=6))
    try:
        found = read(nodes)
    except PeerError as error:
        assert str(error).startswith(PATH + "/")
        assert any(key in str(error) for key in (*HEAD, "ring-ref", "event-channel"))
    else:
        assert 1 <= len(found.queues) <= QUEUES
        assert len({len(queue.refs) for queue in found.queues}) == 1
        assert len(found.queues[0].refs) in (1, 2, 4)
        refs = [ref for queue in found.queues for ref in queue.refs]
        assert len(set(refs)) == len(refs) and all(0 <= ref < 2**32 for ref in refs)


@pytest.mark.parametrize(
    ("nodes", "refs"),
    [
        ({"ring-page-order": b"0", "ring-ref": b"8"}, (8,)),
        ({"ring-page-order": b"0", "ring-ref0": b"8"}, (8,)),  # what Linux's blkback asks for then
        ({"num-ring-pages": b"2", "ring-ref0": b"8", "ring-ref1": b"9"}, (8, 9)),  # the older scheme alone
        ({"num-ring-pages": b"1", "ring-ref": b"8"}, (8,)),
        ({"multi-queue-num-queues": b"1", "ring-ref": b"8"}, (8,)),  # netfronts write it so
    ],
)
def test_other_ways_to_say_it(nodes, refs):
    found = read({"event-channel": b"3", **nodes})
    assert found == Parameters((QueueKeys(refs, 3),), blkif.NATIVE, False)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ({"multi-queue-num-queues": b"0"}, "multi-queue-num-queues: 0, 1 to 4"),
        ({"multi-queue-num-queues": b"5"}, "multi-queue-num-queues: 5, 1 to 4"),
        ({"multi-queue-num-queues": b"4294967297"}, "4294967297, 1 to 4"),
        ({"multi-queue-num-queues": b"-1"}, "multi-queue-num-queues: b'-1' is not a number"),
        ({"ring-page-order": b"3"}, "ring-page-order: 3, at most 2"),
        ({"num-ring-pages": b"8"}, "num-ring-pages: 8, at most 4"),
        ({"num-ring-pages": b"3"}, "num-ring-pages: 3 is no power of two"),
        ({"num-ring-pages": b"0"}, "num-ring-pages: 0 is no power of two"),
        ({"protocol": b"\xff"}, "/protocol: "),
    ],
)
def test_numbers_out_of_range(nodes, words):
    with pytest.raises(PeerError) as caught:
        read({"event-channel": b"3", "ring-ref": b"8", **nodes})
    assert words in str(caught.value)
