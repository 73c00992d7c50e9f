import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
import torch
from slots import NAME, E, K, slots

from reap.errors import ReapError
from reap.statistics.layerstats import SUMS, LayerStatistics


def counts_of_pairs(layer):
    assert layer.coselected is not None
    return layer.coselected


def of_pairs(layer):
    assert layer.coweighted is not None
    return layer.coweighted


def brute_force(ids, weights, norms, peaks, mask, gates):
    """Every field by one loop over slots, in fractions; squares and renormalised gates in fp64."""
    found: dict[str, list] = {field: [Fraction(0)] * E for field in SUMS}
    found |= {"count": [0] * E, "peak": [0.0] * E}
    co, cw = torch.zeros(E, E, dtype=torch.int64), [[Fraction(0)] * E for _ in range(E)]
    for t, token in enumerate(ids.tolist()):
        if not mask[t]:
            continue
        total = sum(weights[t].tolist())
        here = []
        for k, e in enumerate(token):
            g, n = weights[t, k].item(), norms[t, k].item()
            if gates == "renormalized":
                g = g / total if total else 0.0
            if e >= E:
                continue
            found["count"][e] += 1
            found["peak"][e] = max(found["peak"][e], peaks[t, k].item())
            for field, addend in zip(SUMS, (g, n, n * n, g * n, (g * n) ** 2), strict=True):
                found[field][e] += Fraction(addend)
            here.append((e, g * n))
        for (i, a), (j, b) in itertools.permutations(here, 2):
            if i != j:
                co[i, j] += 1
                cw[i][j] += Fraction(a * b)
    for e in range(E):
        co[e, e] = found["count"][e]
        cw[e][e] = found["weighted_sq_sum"][e]
    return found, co, [[float(x) for x in row] for row in cw]


@pytest.mark.parametrize("gates", ["applied", "renormalized"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_field_against_a_loop(gates, masked):
    ids, weights, norms, peaks = slots(200)
    ids[::7, 1] = E  # expert parallelism's sentinel
    ids[::11, 2] = E + 3
    weights[::5, 0] = 0  # rounded to zero
    weights[3] = 0  # a token without any gate
    mask = torch.ones(200, dtype=torch.bool)
    if masked:
        mask[50:90] = False
        norms[60] = math.nan  # padding may hold anything
    layer = LayerStatistics(E, name=NAME, gates=gates, pairs=True)
    layer.update(ids, weights, norms, peaks, mask if masked else None)
    want, coselected, coweighted = brute_force(ids, weights, norms, peaks, mask, gates)
    assert layer.tokens == int(mask.sum())
    assert layer.count.dtype == torch.int64 and layer.count.tolist() == want["count"]
    assert layer.peak.dtype == torch.float32 and layer.peak.tolist() == want["peak"]
    for field in SUMS:
        value = getattr(layer, field)
        assert value.dtype == torch.float64
        assert value.tolist() == [float(total) for total in want[field]], field
        assert layer.exact(field) == [math.floor(total * 2**320) for total in want[field]], field
    assert torch.equal(layer.coselected, coselected)
    assert of_pairs(layer).tolist() == coweighted


def test_by_hand():
    layer = LayerStatistics(3, pairs=True)
    layer.update(
        torch.tensor([[0, 1], [1, 0], [0, 3]]),
        torch.tensor([[0.5, 0.25], [0.75, 0.5], [1.0, 1.0]]),
        torch.tensor([[2.0, 4.0], [8.0, 6.0], [1.0, 100.0]]),
        torch.tensor([[1.5, 3.0], [7.0, 2.0], [0.5, 99.0]]),
    )
    assert layer.tokens == 3
    assert layer.count.tolist() == [3, 2, 0]
    assert layer.gate_sum.tolist() == [2.0, 1.0, 0.0]
    assert layer.norm_sum.tolist() == [9.0, 12.0, 0.0]
    assert layer.norm_sq_sum.tolist() == [41.0, 80.0, 0.0]
    assert layer.weighted_sum.tolist() == [1 + 3 + 1, 1 + 6, 0]
    assert layer.weighted_sq_sum.tolist() == [1 + 9 + 1, 1 + 36, 0]
    assert layer.peak.tolist() == [2.0, 7.0, 0.0]
    assert counts_of_pairs(layer).tolist() == [[3, 2, 0], [2, 2, 0], [0, 0, 0]]
    assert of_pairs(layer).tolist() == [[11, 1 + 18, 0], [19, 37, 0], [0, 0, 0]]


def test_renormalized_by_hand():
    layer = LayerStatistics(3, gates="renormalized")
    layer.update(
        torch.tensor([[0, 1], [2, 1]]),
        torch.tensor([[1.0, 3.0], [0.0, 0.0]]),
        torch.tensor([[2.0, 4.0], [5.0, 5.0]]),
        torch.ones(2, 2),
    )
    assert layer.gate_sum.tolist() == [0.25, 0.75, 0.0]
    assert layer.weighted_sum.tolist() == [0.5, 3.0, 0.0]
    assert layer.count.tolist() == [1, 2, 1] and layer.tokens == 2


@pytest.mark.parametrize("gates", ["applied", "renormalized"])
def test_a_gate_that_is_rounded_to_zero_counts(gates):
    """What the router chose, and how large the expert's output was, does not depend on its gate."""
    ids, _, norms, peaks = slots(50)
    layers = []
    for smallest in (2.0**-140, 0.0, -0.0):
        weights = torch.ones(50, K)
        weights[:, 1] = smallest
        layer = LayerStatistics(E, name=NAME, gates=gates, pairs=True)
        layer.update(ids, weights, norms, peaks)
        layers.append(layer)
    tiny, zero, negative = layers
    assert zero == negative and int(zero.count.sum()) == 50 * K
    for field in ("count", "norm_sum", "norm_sq_sum", "peak", "coselected"):
        assert torch.equal(getattr(zero, field), getattr(tiny, field)), field
    torch.testing.assert_close(zero.weighted_sum, tiny.weighted_sum, rtol=1e-12, atol=1e-30)


def test_a_slot_with_a_zero_gate_is_checked_like_any():
    layer = LayerStatistics(2, name=NAME)
    with pytest.raises(ReapError, match=rf"{NAME}, expert 1: norm, peak or gate is NaN"):
        layer.update(
            torch.tensor([[1]]), torch.zeros(1, 1), torch.full((1, 1), math.nan), torch.ones(1, 1)
        )


def test_pairs_of_the_same_expert_are_no_pair():
    layer = LayerStatistics(2, pairs=True)
    layer.update(torch.tensor([[1, 1]]), torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    assert counts_of_pairs(layer).tolist() == [[0, 0], [0, 2]]


def test_a_single_expert_has_no_pairs():
    layer = LayerStatistics(1, pairs=True)
    layer.update(torch.zeros(4, 1, dtype=torch.int64), *[torch.ones(4, 1)] * 3)
    assert counts_of_pairs(layer).tolist() == [[4]] and of_pairs(layer).tolist() == [[4.0]]


def test_no_tokens():
    layer = LayerStatistics(E, pairs=True)
    layer.update(*slots(0))
    assert layer.tokens == 0 and not layer.count.any() and layer == LayerStatistics(E, pairs=True)
    assert LayerStatistics(E).coselected is None and LayerStatistics(E).coweighted is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype_are_taken_as_they_are(dtype):
    ids, weights, norms, peaks = slots(9)
    weights = weights.to(dtype)
    one, other = LayerStatistics(E), LayerStatistics(E)
    one.update(ids.int(), weights, norms, peaks)
    other.update(ids, weights.double(), norms, peaks)
    assert one == other


def test_negative_gates_are_summed():
    layer = LayerStatistics(1)
    layer.update(
        torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[0.5], [-2.0]]), *[torch.ones(2, 1)] * 2
    )
    assert layer.gate_sum.tolist() == [-1.5] and layer.weighted_sum.tolist() == [-1.5]
    assert layer.weighted_sq_sum.tolist() == [4.25]


def test_layers_of_another_kind_do_not_add():
    with pytest.raises(ReapError, match="num_experts 4 against 5"):
        LayerStatistics(4) + LayerStatistics(5)
    assert LayerStatistics(4) != LayerStatistics(5)


@pytest.mark.parametrize("gates", ["applied", "renormalized"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_bad_gates_are_an_error(gates, poison):
    ids, weights, norms, peaks = slots(8)
    weights[5, 1] = poison
    with pytest.raises(ReapError, match="norm, peak or gate is NaN"):
        LayerStatistics(E, name=NAME, gates=gates).update(ids, weights, norms, peaks)


def test_too_large_is_an_error_and_the_largest_is_not():
    def one(gate, norm):
        layer = LayerStatistics(1, name="l")
        layer.update(torch.tensor([[0]]), torch.tensor([[gate]]), *[torch.tensor([[norm]])] * 2)
        return layer

    largest = torch.finfo(torch.float32).max
    assert one(1.0, largest).norm_sq_sum.item() == largest**2
    with pytest.raises(ReapError, match="layer l, expert 0"):
        one(2.0**17, largest)


def test_a_device_is_not_stopped_but_its_results_are_refused(monkeypatch):
    """What a GPU does, on the CPU: the fault is only noted, and every way out is closed."""
    layer = LayerStatistics(E, name=NAME, pairs=True)
    monkeypatch.setattr(LayerStatistics, "check", lambda self: None)
    ids, weights, norms, peaks = slots(8)
    norms[2, 0] = math.nan
    ids[3, 0] = -1
    layer.update(ids, weights, norms, peaks)
    clean = layer.norm_sum
    assert clean.isfinite().all()
    monkeypatch.undo()
    fields = (*SUMS, "count", "peak", "tokens", "coselected", "coweighted")
    ways_out: list[Callable[[], object]] = [partial(getattr, layer, field) for field in fields]
    ways_out += [layer.tensors, lambda: layer + layer, lambda: layer.exact("gate_sum")]
    for way_out in ways_out:
        with pytest.raises(ReapError, match="1 slots have a negative expert id"):
            way_out()


def test_negative_ids():
    ids, weights, norms, peaks = slots(8)
    ids[2, 2] = -1
    with pytest.raises(ReapError, match=f"layer {NAME}: 1 slots have a negative expert id"):
        LayerStatistics(E, name=NAME).update(ids, weights, norms, peaks)
