"""The numbers of a report, against the functions that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from madeup import madeup

from reap.errors import ReapError
from reap.planning.agreement import overlap, rank_correlation
from reap.planning.criteria import (
    CRITERIA,
    cut_confidence,
    saliency,
    standard_errors,
    super_experts,
    under_sampled,
)
from reap.planning.plan import Plan, make_plan
from reap.report.evidence import ALL_TEXT, Evidence, gather
from reap.report.findings import findings
from reap.report.measured import costs_of
from reap.report.page import _super_experts
from reap.statistics.stats import Statistics


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


@pytest.mark.parametrize("criterion", ["reap", "frequency", "peak", "random"])
def test_a_cut_is_what_the_plan_does(criterion: str) -> None:
    stats = madeup(3, 12, seed=2)
    plan = make_plan(stats, criterion, ratio=0.25, seed=4)
    (cut,) = gather(stats, {"p": plan}).cuts
    scores, errors = saliency(stats, criterion, seed=4), standard_errors(stats, criterion)
    for at, name in enumerate(stats.layers):
        assert torch.equal(cut.scores[at], scores[name]) and same(cut.errors[at], errors[name])
        assert cut.dropped[at] == plan.dropped[name] and len(cut.dropped[at]) == 3
    if criterion != "random":  # of which cut_confidence does not know the seed
        expected = list(cut_confidence(stats, plan.kept, criterion).values())
        assert cut.gaps == pytest.approx(expected, nan_ok=True)
    assert cut.given and cut.notes == list(plan.notes)


def test_without_a_plan_it_is_the_one_that_would_be_made() -> None:
    stats = madeup(3, 12)
    for ratio in (0.5, "0.25"):
        seen = gather(stats, {}, criterion="ean", ratio=ratio)
        assert dict(seen.first.plan.kept) == dict(make_plan(stats, "ean", ratio=ratio).kept)
        assert not seen.first.given and seen.first.name == f"ean at {ratio}"


def test_criteria_agree_as_far_as_they_do() -> None:
    stats = madeup(3, 12)
    seen = gather(stats, {}, criterion="ean", ratio=0.25)
    of = seen.criteria
    assert of.names[0] == "ean" and sorted(of.names) == sorted(CRITERIA) and of.chance == 0.25
    for one, other in ((0, 0), (0, 1), (2, 5)):
        pairs = [saliency(stats, of.names[i]) for i in (one, other)]
        plans = [make_plan(stats, of.names[i], ratio=0.25).dropped for i in (one, other)]
        rho = [rank_correlation(pairs[0][name], pairs[1][name]) for name in stats.layers]
        common = [overlap(plans[0][name], plans[1][name]) for name in stats.layers]
        assert float(of.correlation[one, other]) == pytest.approx(sum(rho) / 3)
        assert float(of.shared[one, other]) == pytest.approx(sum(common) / 3)
        if one == 0:
            assert of.by_layer[other].tolist() == common


def test_domains_agree_as_far_as_they_do() -> None:
    stats = madeup(3, 12, domains=("b", "a"))
    with stats.domain("odd"):  # seen by one layer alone
        stats.update(stats.layers[0], torch.tensor([[0, 1]]), *[torch.ones(1, 2)] * 3)
    of = gather(stats, {}).domains
    assert of is not None and of.names == [ALL_TEXT, "a", "b", "odd"]
    for at, name in enumerate(stats.layers):
        whole, part = (
            make_plan(each, ratio=0.5).dropped[name] for each in (stats, stats.select("b"))
        )
        assert float(of.by_layer[2, at]) == overlap(whole, part)
    assert of.by_layer[3].isnan().tolist() == [False, True, True]
    assert not of.shared.isnan().any()
    assert gather(madeup(domains=("one",)), {}).domains is None


def test_experts_that_saw_little() -> None:
    stats = madeup(2, 16, tokens=120)
    seen = gather(stats, {})
    few = {seen.layers[at].info.name: tuple(ids) for at, ids in enumerate(seen.few) if ids}
    assert few == under_sampled(stats) and few
    assert all(set(none) <= set(some) for none, some in zip(seen.unrouted, seen.few, strict=True))
    named = [layer.info.name for layer in seen.layers if super_experts(stats).get(layer.info.name)]
    assert len(_super_experts(seen)) == len(named)


def test_plans_of_others_are_refused_or_noted() -> None:
    stats = madeup()
    with pytest.raises(ReapError, match="p is a plan of another model than the statistics: 4 MoE"):
        gather(stats, {"p": make_plan(madeup(layers=3), ratio=0.5)})
    made = make_plan(madeup(seed=1), ratio=0.5)
    (cut,) = gather(stats, {"p": made}).cuts
    assert cut.notes[-1] == "made from other statistics than these"
    foreign = Plan(stats.model, "theirs", 0, made.kept)
    (cut,) = gather(stats, {"p": foreign}, criterion="ean").cuts
    assert cut.criterion == "ean" and cut.notes[-1] == "says not from what"
    assert "criterion 'theirs' is not known here: shown by the scores of ean" in cut.notes[-2]


def test_nothing_to_report() -> None:
    model = madeup().model
    with pytest.raises(ReapError, match="are of 0 tokens: there is nothing to report; calibrate"):
        gather(Statistics(model), {})
    part = Statistics(model)
    part.update(model.layers[0].name, torch.tensor([[0, 1]]), *[torch.ones(1, 2)] * 3)
    with pytest.raises(ReapError, match="layer model.layers.4.mlp.experts saw no tokens"):
        gather(part, {})
    with pytest.raises(ReapError, match="criterion is 'best'"):
        gather(madeup(), {}, criterion="best")
    with pytest.raises(ReapError, match="the nearest that works is keep 2"):
        gather(madeup(), {}, ratio=0.9)


def told(seen: Evidence, costs: dict | None = None) -> str:
    return " ".join(findings(seen, None, costs_of(costs) if costs else []))


def test_findings_say_what_is_so() -> None:
    stats = madeup(4, 8, tokens=2000)
    seen = gather(stats, {"half": make_plan(stats, ratio=0.5)})
    said = told(seen)
    assert "4,000 tokens of 2 domains (code, prose) went through 4 MoE layers with 32 exp" in said
    assert "Plan A, half, drops 16 of 32 experts (50%) by reap" in said
    assert (f"in {len(seen.first.unsure)} of 4 layers" in said) == bool(seen.first.unsure)
    assert "drop too: frequency" in said and "would share 50%" in said
    assert "fewer than 100 tokens, 32 of them none" not in said
    assert "in every layer" not in told(gather(stats, {}, criterion="peak"))
    little = told(gather(madeup(2, 8, tokens=30), {}))
    assert "saw fewer than 100 tokens" in little
    costs = {
        name: {"total": {"tokens": 9, "loss": 2 + more, "teacher_loss": 2.0}}
        for name, more in (("a", 0.5), ("b", 0.25))
    }
    said = told(seen, costs)
    assert "b costs least, +0.25 nats per token; a most, +0.5" in said
    assert not math.isnan(seen.criteria.chance)


def test_a_plan_against_the_scores_is_told() -> None:
    """It keeps what these statistics would drop, which is not how sure it is."""
    stats = madeup(2, 8, tokens=20_000, domains=("code",))
    scores = gather(stats, {}).first.scores
    wrong = {
        layer.name: tuple(sorted(each.argsort().tolist()[:6]))
        for layer, each in zip(stats.model.layers, scores, strict=True)
    }
    said = told(gather(stats, {"wrong": Plan(stats.model, "reap", 0, wrong)}))
    assert "in 2 of 2 layers it keeps an expert that scores at least 2 standard errors less" in said
    assert "standard errors apart" not in said


def test_a_cut_drops_something() -> None:
    with pytest.raises(ReapError, match="ratio 1e-09 drops no expert: give a larger one"):
        gather(madeup(), {}, ratio=1e-9)
