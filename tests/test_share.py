"""Every batch is of one share, and shares are even."""

from __future__ import annotations

import pytest

from reap.errors import ReapError
from reap.text.share import Share


@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_every_batch_is_of_one_share(of: int) -> None:
    shares = [Share(number, of) for number in range(of)]
    taken = [[share.number for share in shares if share.has(batch)] for batch in range(5 * of)]
    assert all(len(takers) == 1 for takers in taken)
    for start in range(0, 5 * of, of):  # one each, in every round
        assert sorted(n for (n,) in taken[start : start + of]) == list(range(of))


def test_sources_that_take_turns_go_to_all() -> None:
    for of in (2, 3, 4):
        for number in range(of):
            assert {batch % of for batch in range(of * of) if Share(number, of).has(batch)} == {
                *range(of)
            }


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "a/b", "1/2/3", "-1/2", "1.0/2", "1 / 2"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ReapError, match="number/of"):
        Share.parse(text)


@pytest.mark.parametrize("text", ["2/2", "9/8", "0/0"])
def test_a_shard_that_there_is_not(text: str) -> None:
    with pytest.raises(ReapError, match=f"no shard {text}: .* first is 0/n, the last n-1/n"):
        Share.parse(text)


def test_of_all_batches_nothing_is_said() -> None:
    assert Share().describe() == {} == Share.parse("0/1").describe()
    assert Share.parse("3/8").describe() == {"shard": {"numbers": [3], "of": 8}}
