"""Intervals by groups of batches hold as often as they say; by tokens they do not."""

import math

import pytest
import torch
from torch import Tensor

from reap.errors import ReapError
from reap.planning.confidence import (
    FEW,
    RATIOS,
    check_ratio_criterion,
    most_ahead,
    ratios,
    standard_error,
    t_quantile,
)
from reap.planning.criteria import CRITERIA
from reap.statistics.layerstats import LayerStatistics


def texts(groups: int, runs: int, of_text: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sums and counts [G,R] of runs of one expert, and the error that each run would have if its
    tokens were independent [R]. A token gives a number of mean 1 and variance 1, of which a share
    `of_text` is its text's: a group has one text."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(20, 60, (groups, runs), generator=g).double()
    own = torch.randn(groups, runs, generator=g, dtype=torch.float64) * of_text**0.5
    noise = torch.randn(groups, runs, generator=g, dtype=torch.float64) * (1 - of_text) ** 0.5
    sums = counts * (1 + own) + counts.sqrt() * noise
    return sums, counts, 1 / counts.sum(0).sqrt()


@pytest.mark.parametrize("of_text", [0.0, 0.3])
@pytest.mark.parametrize("groups", [32, 56])
def test_coverage(groups: int, of_text: float) -> None:
    runs, tail = 20_000, 0.025
    sums, counts, by_token = texts(groups, runs, of_text)
    of = ratios(sums, counts)
    width = t_quantile(tail, of.groups - 1) * standard_error(of)
    for missed in ((of.score - width > 1), (of.score + width < 1)):
        share = float(missed.double().mean())
        assert abs(share - tail) < 4 * math.sqrt(tail * (1 - tail) / runs) + 0.002
    fooled = float(((of.score - 1).abs() < 1.96 * by_token).double().mean())
    assert abs(fooled - 0.95) < 0.01 if of_text == 0 else fooled < 0.5


def test_coverage_of_a_difference() -> None:
    """What two experts owe to the same text does not count."""
    runs, tail = 500, 0.02
    one, counts, _ = texts(40, runs, 0.0, seed=1)
    other, more, _ = texts(40, runs, 0.0, seed=2)
    shared = torch.randn(40, runs, generator=torch.Generator().manual_seed(3)).double()
    missed, narrow = 0, 0
    for run in range(runs):
        sums = torch.stack([one[:, run], other[:, run]], 1)
        both = torch.stack([counts[:, run], more[:, run]], 1)
        of = ratios(sums + both * shared[:, run, None], both)
        ahead = most_ahead(of, torch.tensor([0]), torch.tensor([1]), tail)
        missed += int(ahead < 0)
        apart = t_quantile(tail, of.groups - 1) @ standard_error(of)
        narrow += float(ahead - (of.score[0] - of.score[1])) < apart / 2
    assert abs(missed / runs - tail) < 4 * math.sqrt(tail / runs)
    assert narrow == runs


def test_by_hand() -> None:
    sums, counts = torch.tensor([[2.0], [6.0]] * 4).double(), torch.tensor([[1.0], [3.0]] * 4)
    of = ratios(sums, counts.double())
    assert of.score == 2 and not of.parts.any() and of.groups == 16**2 / 40
    assert math.isnan(standard_error(of))  # 6.4 groups
    sums[0] += 16
    of = ratios(torch.cat([sums, sums]), torch.cat([counts, counts]).double())
    residuals = [18 - 3, 6 - 9] + [2 - 3, 6 - 9] * 3
    spread = 2 * sum(r * r for r in residuals) / 32**2
    assert of.groups == 12.8 and of.score == 3
    assert standard_error(of).item() == pytest.approx(math.sqrt(12.8 / 11.8 * spread))


def test_an_expert_of_few_groups_is_not_sure() -> None:
    """All its tokens from one text: its residuals are zero, and say nothing."""
    counts = torch.ones(40, 3).double()
    counts[1:, 0] = 0
    counts[:, 2] = 0
    of = ratios(counts * torch.tensor([5.0, 1.0, 1.0]), counts)
    assert of.score.tolist() == [5, 1, 0]
    error = standard_error(of)
    assert error[1] == 0 and error[[0, 2]].isnan().all() and of.groups[0] == 1 < FEW
    ahead = most_ahead(of, torch.tensor([0, 1]), torch.tensor([1, 2]), 0.01)
    assert ahead.isinf().tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("freedom", [20.0, 31.0, 55.0, 1e9])
@pytest.mark.parametrize("tail", [0.25, 0.025, 1e-4, 1e-6])
def test_quantile(tail: float, freedom: float) -> None:
    """Beyond it lies `tail` of the density."""
    value = t_quantile(tail, torch.tensor([freedom], dtype=torch.float64)).item()
    x = torch.linspace(value, value + 40, 400_001, dtype=torch.float64)
    log = torch.tensor([(freedom + 1) / 2, freedom / 2], dtype=torch.float64).lgamma()
    scale = log[0] - log[1] - 0.5 * math.log(freedom * math.pi)
    density = (scale - (freedom + 1) / 2 * torch.log1p(x * x / freedom)).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(tail, rel=0.05)


def test_bits_depend_on_no_number_of_threads() -> None:
    sums, counts, _ = texts(48, 512, 0.3)
    first, second = torch.arange(256), torch.arange(256, 512)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(most_ahead(ratios(sums, counts), first, second, 1e-6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_ratio_has_the_order_of_its_criterion(stats_of_slots) -> None:
    layer: LayerStatistics = stats_of_slots
    columns = {"count": layer.count, "tokens": torch.full_like(layer.count, layer.tokens)}
    for criterion, (above, below) in RATIOS.items():
        top = columns[above] if above in columns else getattr(layer, above)
        score = ratios(top[None].double(), columns[below][None].double()).score
        assert torch.equal(score.argsort(), CRITERIA[criterion](layer).argsort()), criterion


@pytest.fixture
def stats_of_slots() -> LayerStatistics:
    from slots import slots

    layer = LayerStatistics(6)
    layer.update(*slots(200))
    return layer


@pytest.mark.parametrize("criterion", sorted({*CRITERIA} - {*RATIOS}))
def test_criteria_without_an_error(criterion: str) -> None:
    with pytest.raises(ReapError, match=f"criterion {criterion} has no standard error .*reap, "):
        check_ratio_criterion(criterion)


def test_an_unknown_criterion() -> None:
    with pytest.raises(ReapError, match="must be one of"):
        check_ratio_criterion("magic")
