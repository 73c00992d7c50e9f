"""What every backend must do to the bit: rounding, NaN, sentinels, numbers worked out by hand."""

import cases
import emulated
import pytest
import torch

from reap_kernels import Saliency, backends, moe_saliency, swiglu_clamped
from reap_kernels.activations import PLAIN
from reap_kernels.contract import TENSORS

EMULATED = "cuda on the emulator"


@pytest.fixture(params=[*backends(), EMULATED])
def run(request):
    """moe_saliency on one backend; skipped with its reason where that is not usable. The backends
    of 16-bit models get an fp32 model in bf16: few numbers here need more bits."""
    backend, short = request.param, request.param.startswith("cuda")
    if reason := emulated.missing() if backend == EMULATED else backends()[backend]:
        pytest.skip(f"{backend}: {reason}")
    if short and request.node.callspec.params.get("dtype") == torch.float32:
        pytest.skip(f"{backend}: 16-bit models only")
    on_gpu = torch.cuda.is_available() and backend not in ("cpu", "reference", EMULATED)

    def adapt(name, value):
        if not torch.is_tensor(value):
            return value
        if short and name != "top_k_weights" and value.dtype == torch.float32:
            value = value.bfloat16()
        return value.to("cuda") if on_gpu else value

    def run(*tensors, **options):
        given = dict(zip(TENSORS, tensors, strict=False)) | options
        given = {name: adapt(name, value) for name, value in given.items()}
        if backend == EMULATED:
            return emulated.run(given, deterministic=given.pop("deterministic", False))
        try:
            return Saliency(*(x.cpu() for x in moe_saliency(**given, backend=backend)))
        except ValueError as error:
            if backend == "cuda_sm90" and "cannot run this call" in str(error):
                pytest.skip(str(error))  # it takes aligned sizes only
            raise

    return run


def test_by_hand(run):
    """Two experts, relu, H = 2, I = 1: expert 0 maps x to relu(x0) * x1 * (3, 4), expert 1 to
    relu(x1) * x0 * (0, -2)."""
    result = run(
        torch.tensor([[1.0, 2.0], [-1.0, 3.0]]),
        torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]),
        torch.tensor([[[3.0], [4.0]], [[0.0], [-2.0]]]),
        torch.tensor([[0, 1], [0, 1]]),
        torch.tensor([[0.5, 0.25], [0.5, 2.0]]),
        activation="relu",
    )
    assert result.norms.tolist() == [[10.0, 4.0], [0.0, 6.0]]
    assert result.peaks.tolist() == [[8.0, 4.0], [0.0, 6.0]]
    assert result.out.tolist() == [[3.0, 3.0], [0.0, 12.0]]


def test_by_hand_clamped_ungated_and_biased(run):
    x, ids, gate = torch.tensor([[2.0]]), torch.tensor([[0]]), torch.tensor([[-3.0]])
    # relu2 of 2 * 3 - 2 is 16, times 0.5, minus 10 is -2
    up, down = torch.tensor([[[3.0]]]), torch.tensor([[[0.5]]])
    bias = {"gate_up_bias": torch.tensor([[-2.0]]), "down_bias": torch.tensor([[-10.0]])}
    result = run(x, up, down, ids, gate, activation="relu2", gated=False, **bias)
    assert [r.item() for r in result] == [6.0, 2.0, 2.0]
    # g = 20 -> 7, u = -20 -> -7; alpha 0 makes the sigmoid a half: 7 / 2 * (-7 + 1) = -21
    up, activation = torch.tensor([[[10.0], [-10.0]]]), "swiglu_clamped(0.0, 7.0, 1.0)"
    result = run(x, up, 2 * down, ids, gate, activation=activation)
    assert [r.item() for r in result] == [63.0, 21.0, 21.0]
    # only the upper side of the gate is clamped: g = -20, u = 20 -> 7: -20 / 2 * (7 + 1) = -80
    result = run(x, -up, 2 * down, ids, gate, activation=activation)
    assert [r.item() for r in result] == [240.0, 80.0, 80.0]


def test_norms_are_taken_before_gate_and_before_rounding(run):
    """1 + 2**-9 is no bf16, so the norm shows whether the accumulator or the rounded output was
    used; a gate of 0 shows whether it was applied."""
    half = torch.full((1, 1, 1), 2.0**-9, dtype=torch.bfloat16)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    result = run(
        one,
        half,
        torch.ones_like(half),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 1),
        activation="relu",
        gated=False,
        down_bias=one,
    )
    assert result.norms.item() == result.peaks.item() == 1 + 2**-9
    assert result.out.item() == 0


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_inner_tensor_is_rounded_once(run, dtype):
    """(1 + eps)^2 = 1 + 2 eps + eps^2 is rounded to 1 + 2 eps between the projections."""
    eps = torch.finfo(dtype).eps
    x = torch.full((1, 1), 1 + eps, dtype=dtype)
    weight = torch.ones(1, 1, 1, dtype=dtype)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    result = run(x, weight, weight, ids, torch.ones(1, 1), activation="relu2", gated=False)
    assert result.norms.item() == 1 + 2 * eps


def test_the_output_is_rounded_once(run):
    """256 + 1 + 1 over three experts: bf16 has no 257, so rounding on the way would stay at 256."""
    result = run(
        torch.ones(1, 1, dtype=torch.bfloat16),
        torch.zeros(3, 1, 1, dtype=torch.bfloat16),
        torch.zeros(3, 1, 1, dtype=torch.bfloat16),
        torch.tensor([[0, 1, 2]]),
        torch.ones(1, 3),
        gated=False,
        down_bias=torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16),
    )
    assert result.out.item() == 258


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["gate_up_proj", "down_proj", "gate_up_bias", "down_bias"])
def test_a_bad_weight_shows_in_its_expert_and_nowhere_else(run, where, bad):
    """The up half of silu(g) * u, or any later place, carries a single NaN or Inf to the slot."""
    inputs = cases.make(cases.Case("", bias=True), torch.float32)
    inputs[where][2, -1] = bad
    result = run(**inputs)
    hit = inputs["top_k_index"] == 2
    assert hit.any() and not hit.all()
    assert not result.norms[hit].isfinite().any() and not result.peaks[hit].isfinite().any()
    assert result.norms[~hit].isfinite().all() and result.peaks[~hit].isfinite().all()
    assert torch.equal(result.out.isfinite().all(dim=1), ~hit.any(dim=1))


@pytest.mark.parametrize("activation", [*PLAIN, swiglu_clamped(1.702, 7.0, 1.0)])
def test_a_nan_token_shows_in_its_slots_and_nowhere_else(run, activation):
    """Comparisons are false for NaN, so a max, a clamp or a relu written with one would lose it."""
    case = cases.Case("", routing="some_sentinels", activation=activation)
    inputs = cases.make(case, torch.float32)
    inputs["hidden_states"][4, 0] = torch.nan
    result = run(**inputs)
    expected = torch.zeros_like(inputs["top_k_index"], dtype=torch.bool)
    expected[4] = inputs["top_k_index"][4] < 7
    assert expected.any()
    assert torch.equal(result.norms.isnan(), expected)
    assert torch.equal(result.peaks.isnan(), expected)


def test_sentinels_add_nothing_even_with_a_nan_gate(run):
    inputs = cases.make(cases.Case("", routing="some_sentinels"), torch.float32)
    away = inputs["top_k_index"] >= 7
    quiet = run(**inputs)
    inputs["top_k_weights"][away] = torch.nan
    result = run(**inputs)
    assert (result.norms[away] == 0).all() and (result.peaks[away] == 0).all()
    assert torch.equal(result.out, quiet.out)


@pytest.mark.parametrize("routing", ["top_k", "repeats"])
def test_same_bits_every_run(run, routing):
    inputs = cases.make(cases.Case("", T=65, routing=routing), torch.float32)
    first = run(**inputs, deterministic=True)
    for _ in range(3):
        again = run(**inputs, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
