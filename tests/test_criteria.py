import math
import statistics

import pytest
import torch

from reap.errors import ReapError
from reap.model.info import LayerInfo, ModelInfo
from reap.planning.criteria import (
    CRITERIA,
    cut_confidence,
    random,
    rank,
    saliency,
    standard_errors,
    super_experts,
    under_sampled,
)
from reap.statistics.stats import LayerStatistics, Statistics


def observed(slots, experts=4, tokens=None, **options):
    """Statistics of one layer "l" from (expert, gate, norm, peak) slots, one token each."""
    model = ModelInfo("m", "n", "f", None, (LayerInfo("l", experts, 1),))
    stats = Statistics(model, **options)
    ids, gates, norms, peaks = (
        torch.tensor(column)[:, None] for column in zip(*slots, strict=True)
    )
    stats.update("l", ids, gates.float(), norms.float(), peaks.float())
    if tokens:  # more tokens, all routed outside
        idle = tokens - len(slots)
        stats.update("l", torch.full((idle, 1), experts), *[torch.ones(idle, 1)] * 3)
    return stats


SLOTS = [(0, 0.5, 2.0, 1.0), (0, 1.0, 4.0, 3.0), (1, 0.25, 8.0, 5.0), (2, 1.0, 1.0, 1.0)]

BY_HAND = {
    "reap": [(1 + 4) / 2, 2.0, 1.0, 0.0],
    "frequency": [2.0, 1.0, 1.0, 0.0],
    "ean": [6.0, 8.0, 1.0, 0.0],
    "ean_mean": [3.0, 8.0, 1.0, 0.0],
    "weighted_ean": [5.0, 2.0, 1.0, 0.0],
    "gate_mass": [1.5, 0.25, 1.0, 0.0],
    "reap_l2": [math.sqrt((1 + 16) / 2), 2.0, 1.0, 0.0],
    "peak": [3.0, 5.0, 1.0, 0.0],
}


@pytest.mark.parametrize("criterion", BY_HAND)
def test_by_hand(criterion):
    scores = saliency(observed(SLOTS), criterion)["l"]
    assert scores.dtype == torch.float64
    assert scores.tolist() == BY_HAND[criterion]


def test_the_table_is_complete_and_unrouted_experts_score_zero():
    assert set(CRITERIA) == {*BY_HAND, "random"}
    layer = observed(SLOTS)["l"]
    for criterion in CRITERIA.values():
        assert criterion(layer)[3] == 0


def test_random_is_the_same_everywhere():
    """Literal values: a plan by a seed must not change with a library's version."""
    layer = observed(SLOTS)["l"]
    want = [0.5768903935896628, 0.032357757728279424, 0.9238123299621837, 0.0]
    assert random(layer, seed=0).tolist() == want
    stats = observed(SLOTS)
    assert torch.equal(saliency(stats, "random")["l"], random(layer))
    assert torch.equal(saliency(stats, "random", seed=7)["l"], random(layer, seed=7))


def test_random_differs_by_seed_and_layer_and_is_uniform():
    def draw(name, seed, experts=2000):
        layer = LayerStatistics(experts, name=name)
        layer.update(torch.arange(experts)[:, None], *[torch.ones(experts, 1)] * 3)
        return random(layer, seed)

    one = draw("a", 0)
    for other in (draw("b", 0), draw("a", 1)):
        assert (one == other).sum() == 0
    assert 0 < one.min() and one.max() < 1
    assert abs(one.mean() - 0.5) < 4 / math.sqrt(12 * 2000)


def test_seed_changes_nothing_else():
    stats = observed(SLOTS)
    assert torch.equal(saliency(stats, "reap", seed=3)["l"], saliency(stats, "reap")["l"])


def test_standard_errors_against_the_sample():
    g = torch.Generator().manual_seed(0)
    tokens = 400
    ids = torch.randint(0, 3, (tokens,), generator=g)
    gates = torch.rand(tokens, generator=g)
    norms = 100 + torch.rand(tokens, generator=g)
    slots = list(zip(ids.tolist(), gates.tolist(), norms.tolist(), norms.tolist(), strict=True))
    stats = observed(slots, tokens=500)
    gates, norms = gates.double(), norms.double()
    for e in range(3):
        mine = ids == e
        samples = {"reap": (gates * norms)[mine], "ean_mean": norms[mine]}
        for criterion, values in samples.items():
            want = statistics.stdev(values.tolist()) / math.sqrt(len(values))
            assert standard_errors(stats, criterion)["l"][e].item() == pytest.approx(want, rel=1e-9)
        per_token = {
            "frequency": mine.double(),
            "ean": torch.where(mine, norms, 0.0),
            "weighted_ean": torch.where(mine, gates * norms, 0.0),
        }
        for criterion, values in per_token.items():
            values = values.tolist() + [0.0] * 100
            want = statistics.stdev(values) * math.sqrt(500)
            assert standard_errors(stats, criterion)["l"][e].item() == pytest.approx(want, rel=1e-9)
    n = int((ids == 0).sum())
    assert standard_errors(stats, "frequency")["l"][0].item() == pytest.approx(
        math.sqrt(500 / 499 * n * (1 - n / 500))
    )


def test_standard_errors_survive_cancellation():
    """A spread of 2**-20 on norms of 2**23: the difference of fp64 squares would be noise."""
    near, far = 2.0**23, 2.0**23 + 1
    slots = [(0, 2.0**-20, n, n) for n in [near, far] * 50]
    stats = observed(slots, experts=1)
    want = statistics.stdev([0.0, 1.0] * 50) * 2.0**-20 / 10
    assert standard_errors(stats, "reap")["l"].item() == pytest.approx(want, rel=1e-6)


def test_constant_norms_have_no_error_and_no_negative_variance():
    stats = observed([(e, 1 / (e + 3), 0.3, 1.0) for e in range(20)] * 7, experts=20)
    assert not standard_errors(stats, "ean_mean")["l"].any()
    errors = standard_errors(stats, "reap")["l"]  # squares of g*n are rounded, half of them down
    assert (errors == 0).any() and (errors > 0).any() and (errors < 1e-8).all()


def test_where_a_standard_error_does_not_exist_it_is_nan():
    stats = observed(SLOTS)
    assert standard_errors(stats, "reap")["l"].isnan().tolist() == [False, True, True, True]
    assert standard_errors(observed(SLOTS[:1]), "ean")["l"].isnan().all()
    for criterion in ("gate_mass", "reap_l2", "peak", "random"):
        assert standard_errors(stats, criterion)["l"].isnan().all()


def test_cut_confidence():
    slots = [(0, 1.0, n, n) for n in (9.0, 11.0)] + [(1, 1.0, n, n) for n in (4.0, 8.0)]
    slots += [(2, 1.0, n, n) for n in (1.0, 1.0)] + [(3, 1.0, n, n) for n in (1.0, 1.0)]
    stats = observed(slots)
    # Means 10, 6, 1, 1; standard errors 1, 2, 0, 0.
    assert cut_confidence(stats, {"l": [0]})["l"] == pytest.approx(4 / math.sqrt(5))
    assert cut_confidence(stats, {"l": [0, 1]})["l"] == pytest.approx(5 / 2)
    assert cut_confidence(stats, {"l": [0, 2]})["l"] == pytest.approx(-5 / 2)
    assert cut_confidence(stats, {"l": [0, 1, 2]})["l"] == 0.0
    assert math.isnan(cut_confidence(stats, {"l": [0, 1, 2, 3]})["l"])
    assert math.isnan(cut_confidence(stats, {"l": [0]}, "peak")["l"])


def test_a_sure_cut_between_constants_is_infinite():
    stats = observed([(0, 1.0, 4.0, 1.0)] * 3 + [(1, 1.0, 2.0, 1.0)] * 3, experts=2)
    assert cut_confidence(stats, {"l": [0]})["l"] == math.inf
    assert cut_confidence(stats, {"l": [1]})["l"] == -math.inf


def test_under_sampled():
    stats = observed(SLOTS)
    assert under_sampled(stats, 2) == {"l": (1, 2, 3)}
    assert under_sampled(stats, 1) == {"l": (3,)}
    assert under_sampled(stats, 0) == {}


def test_super_experts():
    quiet = [(e, 1.0, 1.0, 1.0) for e in range(400)]
    # With 400 experts the 99.5th percentile lies between the second and the third largest peak.
    assert super_experts(observed(quiet, experts=400)) == {}
    loud = quiet + [(7, 1.0, 1.0, 50.0), (300, 1.0, 1.0, 40.0)]
    assert super_experts(observed(loud, experts=400)) == {"l": (7, 300)}
    # A tenth of the largest, strictly.
    loud[-1] = (300, 1.0, 1.0, 5.0)
    assert super_experts(observed(loud, experts=400)) == {"l": (7,)}
    # numpy's default percentile of 0..9 at 99.5 is 8.955: only the largest is above it.
    steps = [(e, 1.0, 1.0, float(e)) for e in range(10)]
    assert super_experts(observed(steps, experts=10)) == {"l": (9,)}


def test_rank_keeps_the_lower_id_of_equals():
    assert rank(torch.tensor([1.0, 3.0, 1.0, 3.0, -0.0, 0.0])) == [1, 3, 0, 2, 4, 5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rank_refuses_what_cannot_be_compared(bad):
    with pytest.raises(ReapError, match=f"expert 2 has the score {bad}"):
        rank(torch.tensor([1.0, 0.0, bad]))


def test_unknown_criterion():
    for function in (saliency, standard_errors):
        with pytest.raises(ReapError, match="criterion is 'magic': it must be one of reap, freq"):
            function(observed(SLOTS), "magic")


def test_nothing_observed():
    model = ModelInfo("m", "n", "f", None, (LayerInfo("a", 2, 1), LayerInfo("b", 2, 1)))
    stats = Statistics(model)
    one = torch.zeros(1, 1, dtype=torch.int64)
    stats.update("a", one, *[torch.ones(1, 1)] * 3)
    for function in (saliency, standard_errors):
        with pytest.raises(ReapError, match="layer b saw no tokens"):
            function(stats)
    with pytest.raises(ReapError, match="has no MoE layers"):
        saliency(Statistics(ModelInfo("m", "dense", "f", None, ())))
