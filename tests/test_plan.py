import json
import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap.errors import ReapError
from reap.model.info import LayerInfo, ModelInfo
from reap.planning.criteria import CRITERIA, rank, saliency
from reap.planning.plan import Plan, make_plan, trial_plan
from reap.statistics.stats import Statistics


def stats_of(norms, *, peaks=None, layers=("a", "b"), **info):
    """Every layer sees expert e once, with gate 1 and norm norms[e]."""
    experts = len(norms)
    model = ModelInfo(
        "m", "tiny", "f" * 64, None,
        tuple(LayerInfo(name, experts, **{"top_k": 2, **info}) for name in layers),
    )  # fmt: skip
    stats = Statistics(model, data=[{"spec": "stdlib:code"}], versions={"torch": "2"})
    norms = torch.tensor(norms, dtype=torch.float32)[:, None]
    peaks = norms if peaks is None else torch.tensor(peaks, dtype=torch.float32)[:, None]
    with stats.domain("code"):
        for name in layers:
            stats.update(name, torch.arange(experts)[:, None], torch.ones(experts, 1), norms, peaks)
    return stats


@pytest.mark.parametrize("ratio", [0.5, "0.5", "1/2", Fraction(1, 2), Decimal("0.5"), 5e-1])
def test_keeps_the_best_ascending(ratio):
    plan = make_plan(stats_of([3, 9, 1, 7, 5, 2, 8, 4]), ratio=ratio)
    assert plan.kept == {"a": (1, 3, 4, 6), "b": (1, 3, 4, 6)}
    assert plan.dropped == {"a": (0, 2, 5, 7), "b": (0, 2, 5, 7)}
    assert (plan.criterion, plan.seed) == ("reap", 0)


def test_of_equals_the_lower_id_stays():
    assert make_plan(stats_of([5, 5, 5, 9, 5, 5]), keep=3).kept["a"] == (0, 1, 3)


@pytest.mark.parametrize(
    ("experts", "ratio", "dropped"),
    [
        (100, 0.29, 29),  # 100 * 0.29 is 28.999999999999996
        (100, 0.57, 57),
        (50, 0.58, 29),
        (128, 0.25, 32),
        (60, 0.33, 19),
        (10, 0.09, 0),
        (10, 0.0, 0),
        (1000, 1e-3, 1),
        (10, 5e-05, 0),
    ],
)
def test_count_without_float_surprise(experts, ratio, dropped):
    plan = make_plan(stats_of(range(experts), layers=("a",)), ratio=ratio)
    assert len(plan.dropped["a"]) == dropped


@given(st.integers(2, 300), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_count_is_the_decimal_floor(experts, percent):
    stats = stats_of(range(experts), layers=("a",), top_k=1)
    assert len(make_plan(stats, ratio=percent / 100).dropped["a"]) == experts * percent // 100


def test_multiple_of_rounds_the_kept_count_up():
    stats = stats_of(range(60))
    assert len(make_plan(stats, ratio=0.5, multiple_of=8).kept["a"]) == 32
    assert len(make_plan(stats, keep=32, multiple_of=8).kept["a"]) == 32
    with pytest.raises(
        ReapError,
        match=r"cannot keep 64 of 60 experts, 57 rounded up to a multiple of 8: there are not that "
        r"many; the nearest that works is keep 56 or ratio 0\.07$",
    ):
        make_plan(stats, ratio=0.05, multiple_of=8)


def test_at_least_top_k_stay():
    with pytest.raises(
        ReapError,
        match=r"layer a: cannot keep 1 of 8 experts: its router picks 2 per token; "
        r"the nearest that works is keep 2 or ratio 0\.8$",
    ):
        make_plan(stats_of(range(8)), ratio=0.9)
    assert make_plan(stats_of(range(8)), ratio=0.75).kept["a"] == (6, 7)


def test_groups_lose_the_same_number():
    # Two groups of four; the four best are all in the second.
    stats = stats_of([1, 2, 3, 4, 8, 7, 6, 5], n_group=2, topk_group=1)
    assert make_plan(stats, ratio=0.5).kept["a"] == (2, 3, 4, 5)
    plan = make_plan(stats, ratio=0.3)  # 2 of 8 go: one from each group
    assert plan.kept["a"] == (1, 2, 3, 4, 5, 6)
    plan = make_plan(stats, ratio=0.4)  # floor 3 would be uneven
    assert plan.kept["a"] == (1, 2, 3, 4, 5, 6)
    assert "drops 2 of 8 experts per layer, not 3: the number kept was rounded up" in plan.notes


@pytest.mark.parametrize(
    ("info", "keep", "message"),
    [
        (
            {"n_group": 2, "topk_group": 1},
            5,
            "its 2 router groups must keep equal numbers; the near",
        ),
        (
            {"n_group": 4, "topk_group": 2, "min_per_group": 2},
            4,
            "a router group needs 2 experts, it would keep 1; the nearest that works is keep 8",
        ),
        (
            {"n_group": 4, "topk_group": 1},
            4,
            "picks 2 from 1 groups, which would hold 1; the nearest that works is keep 8 or",
        ),
    ],
)
def test_groups_that_would_break_the_router(info, keep, message):
    with pytest.raises(ReapError, match=message) as error:
        make_plan(stats_of(range(16), **info), keep=keep)
    nearest = int(str(error.value).split("keep ")[-1].split()[0])
    ratio = str(error.value).split("ratio ")[-1]
    assert len(make_plan(stats_of(range(16), **info), keep=nearest).kept["a"]) == nearest
    assert len(make_plan(stats_of(range(16), **info), ratio=ratio).kept["a"]) == nearest


@given(
    experts=st.integers(2, 40), percent=st.integers(0, 99), top_k=st.integers(1, 8),
    groups=st.sampled_from([1, 2, 4, 8]), topk_group=st.integers(1, 4), least=st.integers(1, 2),
    multiple=st.sampled_from([1, 2, 3, 8]),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_a_plan_is_safe_or_names_one_that_is(
    experts, percent, top_k, groups, topk_group, least, multiple
):
    experts *= groups
    info = {
        "top_k": min(top_k, experts), "n_group": groups, "topk_group": min(topk_group, groups),
        "min_per_group": least,
    }  # fmt: skip
    stats = stats_of([(7 * e) % experts for e in range(experts)], layers=("a",), **info)
    ratio = str(Decimal(percent) / 100)
    try:
        plan = make_plan(stats, ratio=ratio, multiple_of=multiple)
    except ReapError as error:
        if "ratio" not in str(error):
            assert "no multiple of" in str(error)
            return
        plan = make_plan(stats, ratio=str(error).split("ratio ")[-1], multiple_of=multiple)
    kept = plan.kept["a"]
    per_group = len(kept) // groups
    size = experts // groups
    assert [sum(e // size == g for e in kept) for g in range(groups)] == [per_group] * groups
    assert per_group >= least and len(kept) % multiple == 0
    assert per_group * info["topk_group"] >= info["top_k"]
    assert Plan.from_json(plan.to_json()) == plan


def test_super_experts_are_never_dropped():
    norms = list(range(400))
    peaks = [1.0] * 400
    peaks[3] = 100.0  # the fourth weakest
    stats = stats_of(norms, peaks=peaks, layers=("a",))
    assert 3 not in make_plan(stats, ratio=0.5).kept["a"]
    plan = make_plan(stats, ratio=0.5, protect_super_experts=True)
    assert plan.kept["a"] == (3, *range(201, 400))
    assert plan.options["protected"] == {"a": [3]}


def test_more_protected_than_kept():
    peaks = [1.0] * 600
    peaks[:3] = [100.0] * 3
    stats = stats_of(range(600), peaks=peaks, layers=("a",), top_k=1)
    with pytest.raises(ReapError, match="protects 3 super experts and keeps 2 experts: keep at"):
        make_plan(stats, keep=2, protect_super_experts=True)
    assert make_plan(stats, keep=3, protect_super_experts=True).kept["a"] == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of ratio and keep"),
        ({"ratio": 0.5, "keep": 4}, "exactly one of ratio and keep"),
        ({"ratio": 1.0}, r"ratio is 1.0: it must be a number of at least 0 and less than 1"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"ratio": math.nan}, "ratio is nan"),
        ({"ratio": "half"}, "ratio is half"),
        ({"ratio": "1/0"}, "ratio is 1/0"),
        ({"ratio": "1e-999999999"}, "ratio is 1e-999999999"),
        ({"ratio": True}, "ratio is True"),
        ({"keep": 0}, "keep is 0: it must be a whole number of 1 or more"),
        ({"keep": 4.0}, "keep is 4.0"),
        ({"keep": 10**400}, "cannot keep 1000.* of 8 experts: there"),
        ({"keep": 4, "seed": 1.5}, "seed is 1.5"),  # what `Plan.load` would refuse
        (
            {"keep": 9},
            "cannot keep 9 of 8 experts: there are not that many; .* keep 7 or ratio 0.2$",
        ),
        ({"ratio": 0.5, "multiple_of": 0}, "multiple_of is 0"),
        ({"ratio": 0.5, "multiple_of": 16}, "no multiple of 16 works for 8 experts"),
        ({"ratio": 0.5, "criterion": "magic"}, "criterion is 'magic'"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(ReapError, match=message) as error:
        make_plan(stats_of(range(8)), **options)
    assert "\n" not in str(error.value)


def test_a_score_that_cannot_be_ranked_names_the_layer(monkeypatch):
    monkeypatch.setitem(CRITERIA, "reap", lambda layer: torch.full((8,), math.nan))
    with pytest.raises(ReapError, match="layer a: expert 0 has the score nan"):
        make_plan(stats_of(range(8)), ratio=0.5)


def test_nothing_observed():
    stats = Statistics(stats_of(range(8)).model)
    with pytest.raises(ReapError, match="layer a saw no tokens"):
        make_plan(stats, ratio=0.5)


def test_what_a_plan_remembers():
    stats = stats_of(range(8))
    plan = make_plan(stats, "frequency", ratio=0.25, seed=3)
    assert plan.model == stats.model and plan.seed == 3 and plan.criterion == "frequency"
    assert plan.options == {
        "ratio": "0.25", "keep": None, "multiple_of": 1,
        "protect_super_experts": False, "protected": {},
    }  # fmt: skip
    assert plan.calibration == {
        "tokens": 8, "domains": {"code": 8}, "gates": "applied", "data": [{"spec": "stdlib:code"}],
        "statistics": stats.digest(), "versions": {"torch": "2"},
    }  # fmt: skip


def test_random_seeds_give_different_plans():
    stats = stats_of(range(64))
    plans = [make_plan(stats, "random", keep=32, seed=seed).kept for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0]["a"] != plans[0]["b"]


def test_save_and_load(tmp_path):
    plan = make_plan(stats_of(range(8)), ratio=0.5)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(ReapError, match="plan.json exists"):
        plan.save(tmp_path / "plan.json")
    plan.save(tmp_path / "plan.json", overwrite=True)
    with pytest.raises(ReapError, match="cannot read"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_is_frozen():
    plan = make_plan(stats_of(range(8)), ratio=0.5)
    with pytest.raises(AttributeError):
        plan.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.kept["a"] = (0,)  # type: ignore[index]


def set_kept(ids):
    def change(data):
        data["layers"]["a"] = {"kept": ids, "dropped": [e for e in range(8) if e not in ids]}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="x"), "is no plan: its format is 'x'"),
        (lambda d: d.update(version=3), "has version 3: this program reads up to version 2"),
        (lambda d: d.pop("criterion"), "field 'criterion' must be a JSON str"),
        (lambda d: d.update(seed=True), "field 'seed' must be a JSON int"),
        (lambda d: d.update(calibration=[]), "field 'calibration' must be a JSON dict"),
        (lambda d: d.pop("model"), "model description is a NoneType"),
        (lambda d: d["options"].update(ratio="2"), "ratio is 2"),
        (lambda d: d["layers"].pop("b"), "'b' is in the model but not the plan"),
        (
            lambda d: d["layers"].update(c=d["layers"]["a"]),
            "'c' is in the plan but not the model",
        ),
        (lambda d: d["layers"].update(a=[0]), "'a' must have exactly kept and dropped"),
        (lambda d: d["layers"]["a"].update(kept=3), "kept must be a list of expert ids"),
        (set_kept([0, 1, 8]), "layer a: kept expert 8 must be an id from 0 to 7"),
        (set_kept([-1, 1, 2]), "kept expert -1 must be an id from 0 to 7"),
        (set_kept([0, 1.0, 2]), "kept expert 1.0 must be an id"),
        (set_kept([False, True]), "kept expert False must be an id"),
        (set_kept([1, 0, 2]), "layer a: kept experts must ascend without repeats"),
        (set_kept([1, 1, 2]), "layer a: kept experts must ascend without repeats"),
        (set_kept([1]), "layer a: cannot keep 1 experts: its router picks 2 per token"),
        (set_kept([]), "layer a: cannot keep 0 experts"),
        (lambda d: d["layers"]["a"]["dropped"].pop(), "dropped is not the rest of kept"),
        (lambda d: d["layers"]["a"]["dropped"].reverse(), "dropped is not the rest of kept"),
        (lambda d: d["layers"]["a"].update(dropped=4), "dropped is not the rest of kept"),
    ],
)
def test_damaged_plans(tmp_path, change, message):
    data = json.loads(make_plan(stats_of(range(8)), ratio=0.5).to_json())
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ReapError, match=message) as error:
        Plan.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"format": 1, "format": 2}', "\udcff"]
)
def test_no_plan_at_all(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ReapError):
        Plan.load(path)


def test_a_plan_made_by_hand_is_checked_too():
    model = stats_of(range(8), n_group=2, topk_group=1).model
    good = Plan(model, "mine", 0, {"a": (0, 1, 4, 5), "b": (2, 3, 6, 7)})
    assert good.notes == ()
    with pytest.raises(ReapError, match="router group 0 keeps 3 experts: all 2 groups must keep 2"):
        replace(good, kept={"a": (0, 1, 2, 5), "b": (2, 3, 6, 7)})


@pytest.mark.parametrize(
    ("experts", "kept", "note"),
    [
        (128, 103, "kept 103 per layer is prime: cannot be split over expert-parallel ranks; "
                   "try multiple_of=8, which keeps 104"),
        (128, 105, "kept 105 per layer is odd: cannot be split over 2 expert-parallel ranks; "
                   "try multiple_of=8, which keeps 112"),
        (128, 100, "kept 100 per layer splits over 4 expert-parallel ranks, 128 did over 8; "
                   "try multiple_of=8, which keeps 104"),
        (60, 30, "kept 30 per layer splits over 2 expert-parallel ranks, 60 did over 4; "
                 "try multiple_of=4, which keeps 32"),
        (128, 96, None),
        (128, 2, None),
        (128, 128, "drops no expert: a model pruned by it would be a copy"),
        (128, 127, "kept 127 per layer is prime: cannot be split over expert-parallel ranks; "
                   "try keep=120"),
        (8, 7, "kept 7 per layer is prime: cannot be split over expert-parallel ranks"),
        (45, 31, None),
    ],
)  # fmt: skip
def test_notes_on_serving(experts, kept, note):
    plan = make_plan(stats_of(range(experts)), keep=kept)
    assert plan.notes == (() if note is None else (note,))


def test_notes_on_what_was_rounded_up_to_nothing_and_on_protection():
    stats = stats_of(range(16))
    plan = make_plan(stats, keep=12, multiple_of=8)
    assert plan.notes[0].startswith("drops no expert")
    assert "keeps 16 of 16 experts per layer, not 12: rounded up to a multiple of 8" in plan.notes
    assert make_plan(stats, ratio=0.01).notes[0].startswith("drops no expert")
    peaks = [1.0] * 16
    peaks[3] = 1e6
    stats = stats_of(range(16), peaks=peaks, layers=("a",))
    plan = make_plan(stats, ratio=0.5, protect_super_experts=True)
    assert plan.notes[-1] == "protected super experts: a: 3"
    assert Plan.from_json(plan.to_json()).notes == plan.notes
    oddities: list[Any] = [None, [], {"a": None}, {"a": [["x"]]}]
    for odd in oddities:
        strange = replace(plan, options={**plan.options, "protected": odd})
        assert "super experts" in strange.notes[-1]


def test_half_a_surrogate_pair_is_no_plan():
    with pytest.raises(ReapError, match="not valid JSON"):
        Plan.from_json('{"format": "\ud800"}')


def two_layers(first, second):
    """Statistics in which the layers a and b have different norms."""
    stats = stats_of([1] * len(first))
    for name, norms in (("a", first), ("b", second)):
        experts, column = torch.arange(len(norms))[:, None], torch.tensor(norms)[:, None].float()
        stats.update(name, experts, torch.ones(len(norms), 1), column, column)
    return stats


def test_one_budget_for_all_layers(tmp_path):
    stats = two_layers([3, 9, 1, 7, 5, 2, 8, 4], [100, 200, 900, 100, 100, 100, 100, 100])
    plan = make_plan(stats, scope="global", ratio=0.5, min_per_layer=2)
    counts = [len(kept) for kept in plan.kept.values()]
    assert sum(counts) == 8 and counts[0] > counts[1] >= 2
    assert not plan.uniform and "reap.load_model" in plan.notes[-1]
    assert plan.options["scope"] == "global" and plan.options["normalize"] == "mean"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    for name, score in saliency(stats).items():  # of every layer the best stay
        assert plan.kept[name] == tuple(sorted(rank(score)[: len(plan.kept[name])]))
    raw = make_plan(stats, scope="global", total=9, normalize="raw")
    assert [len(kept) for kept in raw.kept.values()] == [2, 7]
    assert make_plan(stats, ratio=0.5).uniform
    with pytest.raises(ReapError, match="min_per_layer is of one budget"):
        make_plan(stats, ratio=0.5, min_per_layer=3)
    with pytest.raises(ReapError, match="at least 4: the nearest that works is total 4"):
        make_plan(stats, scope="global", total=3)


def test_protected_experts_of_one_budget():
    stats = stats_of([9, 9, 9, 9, 9, 9, 9, 1])
    one = torch.ones(1, 1)
    stats.update("a", torch.tensor([[7]]), one, one, 1000 * one)
    options: dict[str, Any] = {"scope": "global", "keep": 2}
    assert 7 not in make_plan(stats, **options).kept["a"]
    assert 7 in make_plan(stats, **options, protect_super_experts=True).kept["a"]


def test_trial_plans_of_one_budget():
    model = stats_of(range(8)).model
    plan = trial_plan(model, scope="global", ratio=0.5)
    assert not plan.uniform and sum(map(len, plan.kept.values())) == 8
    with pytest.raises(ReapError, match="no expert would be dropped"):
        trial_plan(model, scope="global", ratio=0)
