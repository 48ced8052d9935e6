"""Feature negotiation: one value with its reasons, whatever the peer says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenbus.bus import Feature, Merge, negotiate
from xenbus.errors import UsageError

PERSISTENT = Feature("persistent", key="feature-persistent")
PAGES = Feature("pages", Merge.LEAST, default=1, peer_key="max-ring-pages", least=1, most=16)
FLUSH = Feature("flush", Merge.EITHER)
SIZE = Feature("size", Merge.PEER, default=512, least=512)
MODE = Feature("mode", Merge.PEER, default="r")


def test_both_ends_declare():
    agreed = negotiate(
        [PERSISTENT, PAGES, FLUSH, SIZE, MODE],
        {"persistent": 1, "pages": 8},
        {"feature-persistent": "1", "max-ring-pages": "4", "flush": "1", "size": "4096", "mode": "w"},
    )
    assert [agreed[name] for name in agreed] == [1, 4, 1, 4096, "w"]
    assert agreed.number("pages") == 4
    assert agreed.why("pages") == "least of ours 8 and the peer's 4"
    assert str(agreed) == "persistent=1 pages=4 flush=1 size=4096 mode=w"
    assert agreed.as_dict()["flush"] == {"value": 1, "reason": "either of ours 0 (default) and the peer's 1"}


def test_silence_is_the_default():
    agreed = negotiate(
        [PERSISTENT, PAGES, SIZE, MODE], {"persistent": 1, "pages": 8}, {"max-ring-pages": None}
    )
    assert [agreed[name] for name in agreed] == [0, 1, 512, "r"]
    assert agreed.why("pages") == "least of ours 8 and the peer's silence, so 1"


@pytest.mark.parametrize("said", ["", "-1", "x", "0", "17", "1e3", "٤", "9" * 40, " 4"])
def test_nonsense_and_numbers_out_of_range_are_silence_and_the_reason_says_so(said):
    agreed = negotiate([PAGES], {"pages": 8}, {"max-ring-pages": said})
    assert agreed["pages"] == 1 and said[:32] in agreed.why("pages")


@given(
    st.dictionaries(st.sampled_from(["feature-persistent", "max-ring-pages", "size"]), st.text(max_size=6))
)
def test_whatever_a_peer_says_the_result_is_in_range(theirs):
    agreed = negotiate([PERSISTENT, PAGES, SIZE], {"persistent": 1, "pages": 8}, theirs)
    assert agreed["persistent"] in (0, 1) and 1 <= agreed["pages"] <= 8 and agreed["size"] >= 512


def test_our_own_offer_must_be_in_range():
    with pytest.raises(UsageError):
        negotiate([PAGES], {"pages": 0}, {})


def test_equal_agreements_are_equal():
    one, other = negotiate([FLUSH], {"flush": 1}, {}), negotiate([FLUSH], {"flush": 1}, {})
    assert one == other and hash(one) == hash(other) and one != negotiate([FLUSH], {}, {})
