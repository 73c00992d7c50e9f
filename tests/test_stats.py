import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slots import MODEL, NAME, TWO_LAYERS, slots

from reap.errors import ReapError
from reap.model.info import ModelInfo
from reap.statistics.layerstats import LayerStatistics
from reap.statistics.stats import Statistics


@pytest.mark.sweep
@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**16), random=st.randoms(use_true_random=False))
@pytest.mark.parametrize("gates", ["applied", "renormalized"])
def test_any_partition_order_and_merge_gives_the_same_bits(tmp_path, gates, seed, random):
    """Tokens dealt to shards in any order and batch size, merged in any tree, also by file."""
    tokens = 40
    data = slots(tokens, seed)
    want = Statistics(MODEL, gates=gates, pairs=True)
    want.update(NAME, *data)

    shards = [Statistics(MODEL, gates=gates, pairs=True) for _ in range(3)]
    order = random.sample(range(tokens), tokens)
    while order:
        n = random.randint(1, len(order))
        batch, order = order[:n], order[n:]
        shard = random.choice(shards)
        with shard.domain(random.choice("ab")):
            shard.update(NAME, *(x[batch] for x in data))
    while len(shards) > 1:
        random.shuffle(shards)
        merged = shards.pop() + shards.pop()
        if random.random() < 0.5:
            merged.save(tmp_path / "merged", overwrite=True)
            merged = Statistics.load(tmp_path / "merged")
        shards.append(merged)
    assert shards[0][NAME] == want[NAME]
    for field, tensor in want[NAME].tensors().items():
        assert torch.equal(shards[0][NAME].tensors()[field], tensor), field


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_counting_restricts_what_counts(shape):
    """Whatever the mask of padding leaves, in any shape of as many values."""
    data, g = slots(12), torch.Generator().manual_seed(0)
    counted, real = (torch.rand(12, generator=g) < 0.6 for _ in range(2))
    for mask in (None, real):
        stats, want = Statistics(MODEL, pairs=True), Statistics(MODEL, pairs=True)
        with stats.counting(counted.view(shape).to(torch.int64) * 3):
            assert stats.counted is not None and stats.counted.shape == shape
            stats.update(NAME, *data, *[mask])
            with stats.counting(None):
                assert stats.counted is None
                stats.update(NAME, *data, *[mask])
        stats.update(NAME, *data, *[mask])
        want.update(NAME, *data, *[counted if mask is None else counted & mask])
        for _ in range(2):
            want.update(NAME, *data, *[mask])
        assert stats == want


def test_counting_of_other_tokens_is_an_error():
    stats = Statistics(MODEL)
    with stats.counting(torch.ones(11)):
        with pytest.raises(ReapError, match="given 11 values, and a layer was called with 12"):
            stats.update(NAME, *slots(12))
    assert stats.tokens == 0
    given: Any = [1, 0]
    with pytest.raises(ReapError, match="given a list: it must be a tensor"), stats.counting(given):
        pass


def test_domains():
    stats = Statistics(TWO_LAYERS)
    with stats.domain("code"):
        stats.update("first", *slots(10, 0))
        with stats.domain("prose"):
            stats.update("first", *slots(7, 1))
        stats.update("second", *slots(10, 2, experts=9, k=2))
    stats.update("first", *slots(5, 3))
    assert stats.domains == ("code", "default", "prose")
    assert stats.layers == ("first", "second")
    assert stats.tokens == 22
    assert stats.domain_tokens == {"code": 10, "default": 5, "prose": 7}
    assert stats.layer("first", "code").tokens == 10
    assert stats.layer("second", "prose").tokens == 0
    assert stats["first"] == stats.layer("first")
    assert stats["first"].tokens == 22
    chosen = stats.select("code", "prose")
    assert chosen.domains == ("code", "prose") and chosen["first"].tokens == 17
    assert stats != chosen
    chosen.update("first", *slots(5, 3))
    assert stats == chosen
    with pytest.raises(ReapError, match="no domain 'poems' was observed: there is code, default"):
        stats.select("poems")
    with pytest.raises(ReapError, match="no MoE layer called 'third'"):
        stats["third"]
    with pytest.raises(ReapError, match="a domain needs a name"), stats.domain(""):
        pass


def test_a_selection_and_a_sum_are_copies():
    stats = Statistics(MODEL)
    stats.update(NAME, *slots(3))
    copies = [stats.select("default"), stats + Statistics(MODEL)]
    stats.update(NAME, *slots(3))
    assert [copy.tokens for copy in copies] == [3, 3] and stats.tokens == 6


def test_versions_are_recorded_and_joined():
    a = Statistics(MODEL, versions={"torch": "2.12"})
    b = Statistics(MODEL, versions={"torch": "2.13", "transformers": "5.23"})
    assert (a + b).versions == {"torch": "2.12, 2.13", "transformers": "5.23"} == (b + a).versions
    assert torch.__version__.startswith(Statistics(MODEL).versions["torch"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Statistics(TWO_LAYERS),
            "cannot combine statistics of tiny and tiny: 1 MoE layers against 2",
        ),
        (Statistics(MODEL, gates="renormalized"), "gates applied against renormalized"),
        (Statistics(MODEL, pairs=True), "pairs False against True"),
    ],
)
def test_statistics_that_do_not_belong_together(other, message):
    with pytest.raises(ReapError, match=message):
        Statistics(MODEL) + other


def test_two_models_never_meet_through_one_of_unknown_weights():
    def of(weights):
        return Statistics(ModelInfo("m", "n", "f", weights, MODEL.layers))

    assert (of(None) + of("a")).model.weights == "a" == (of("a") + of(None)).model.weights
    with pytest.raises(ReapError, match="other weights"):
        of("a") + of(None) + of("b")


@pytest.mark.parametrize("poison", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("which", ["norms", "peaks"])
def test_bad_norms_name_layer_and_expert(which, poison):
    ids, weights, norms, peaks = slots(8)
    {"norms": norms, "peaks": peaks}[which][5, 1] = poison
    stats = Statistics(MODEL)
    with pytest.raises(
        ReapError, match=f"layer {NAME}, expert {ids[5, 1]}: .* in 1 slots"
    ) as error:
        stats.update(NAME, ids, weights, norms, peaks)
    assert "\n" not in str(error.value)
    with pytest.raises(ReapError, match=f"expert {ids[5, 1]}"):
        stats[NAME].weighted_sum  # noqa: B018  what has missed slots is not read as if it were whole


def test_more_slots_than_top_k_and_unknown_gates():
    with pytest.raises(ReapError, match="4 slots per token, but the model's top_k is 3"):
        Statistics(MODEL).update(NAME, *slots(2, k=4))
    with pytest.raises(ReapError, match="gates is 'softmax': it must be one of applied"):
        Statistics(MODEL, gates="softmax")
    with pytest.raises(ReapError, match="gates is 'softmax'"):
        LayerStatistics(2, gates="softmax")


def test_faults_of_all_layers_are_read_at_once(monkeypatch):
    stats = Statistics(TWO_LAYERS)
    for name in stats.layers:
        stats.update(name, *slots(5, 1, k=2))
    with monkeypatch.context() as patch:
        patch.setattr(LayerStatistics, "check", None)  # nobody asks each
        stats.check()
    last = stats._parts["default", stats.layers[-1]]
    last._faults[1] = 2
    with pytest.raises(ReapError, match=f"layer {last.name}, expert 1: .* in 2 slots"):
        stats.check()
