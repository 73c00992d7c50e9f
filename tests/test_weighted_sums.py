"""Weighted sums over an expert's slots: `moe_saliency_sums` on every backend."""

import cases
import pytest
import slotsums
import torch

from reap_kernels import Saliency, Summed, backends, cpu, moe_saliency, moe_saliency_sums, native
from reap_kernels.contract import make_call

ISAS = cpu.isas() if native.missing() is None else []
RUNNING = [name for name, reason in backends().items() if reason is None]
# Every path of the CPU's blocks, sums over several of them, and odd sizes of everything.
LONG = cases.Case("several blocks of one expert", T=420, K=2, E=3, H=101, I=53, bias=True)
CASES = [case for case in cases.CASES if case.T]


def run(inputs, weights, **options):
    return moe_saliency_sums(**inputs, sum_weights=weights, **options)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accurate(case, dtype):
    inputs = cases.make(case, dtype)
    weights = slotsums.weights_of(inputs)
    for backend in ("reference", "cpu") if ISAS else ("reference",):
        result = run(inputs, weights, backend=backend)
        slotsums.assert_accurate(result, inputs, weights)
        alone = moe_saliency(**inputs, backend=backend)
        assert all(map(torch.equal, result, alone)), "the rest keeps its bits"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", (cases.LAYOUTS[1], cases.LAYOUTS[7], cases.LAYOUTS[9]), ids=str)
def test_accurate_on_every_instruction_set(layout, dtype, isa):
    sizes = {"T": LONG.T, "K": LONG.K, "E": LONG.E, "H": LONG.H, "I": LONG.I}
    for case in (layout, cases.replace(layout, **sizes)):
        inputs = cases.make(case, dtype)
        weights = slotsums.weights_of(inputs)
        call = make_call(**inputs, sum_weights=weights)
        result, _ = cpu.execute(call, isa=isa, threads=2)
        slotsums.assert_accurate(result, inputs, weights)
        for threads in (1, 3):
            again, _ = cpu.execute(call, isa=isa, threads=threads)
            assert all(map(torch.equal, result, again)), threads


def test_fp64_is_the_truth():
    inputs = cases.make(cases.replace(LONG, T=33), torch.float64)
    weights = slotsums.weights_of(inputs).double()
    result = run(inputs, weights)
    for ours, exact in zip(result[3:], slotsums.truth(inputs, weights), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", RUNNING)
def test_by_hand(backend):
    """Two experts, relu, H = 2, I = 1, as in test_contract: h is 2, 2 and 0, 3 where it counts."""
    x = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [5.0, 1.0]])
    up = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    down = torch.tensor([[[3.0], [4.0]], [[0.0], [-2.0]]])
    ids, gates = torch.tensor([[0, 1], [0, 1], [1, 2]]), torch.tensor([[0.5, 0.25]] * 3)
    weights = torch.stack([torch.ones_like(gates), gates])
    result = run(
        *({"hidden_states": x, "gate_up_proj": up, "down_proj": down, "top_k_index": ids,
           "top_k_weights": gates},),
        weights, activation="relu", backend=backend,
    )  # fmt: skip
    # expert 0: relu(1) 2 and relu(-1) 3; expert 1: relu(2) 1, relu(3) (-1) and relu(1) 5
    assert result.channel_sums.tolist() == [[[2.0], [4.0]], [[1.0], [0.25 * -1 + 0.5 * 5]]]
    assert result.output_sums.tolist() == [
        [[6.0, 8.0], [0.0, -8.0]],
        [[3.0, 4.0], [0.0, -2 * 2.25]],
    ]


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_what_weighs_nothing_is_left_out(backend, dtype):
    """Rows of NaN and infinity, of tokens that do not count, and experts that nobody has."""
    inputs = cases.make(cases.replace(LONG, T=200, E=9, routing="half_the_experts"), dtype)
    weights = slotsums.weights_of(inputs)
    expected = run(inputs, weights, backend=backend)
    left_out = weights[0, :, 0] == 0
    assert left_out.any() and not left_out.all()
    inputs["hidden_states"][left_out] = torch.nan
    inputs["hidden_states"][left_out.nonzero()[0]] = torch.inf
    result = run(inputs, weights, backend=backend)
    assert torch.equal(result.channel_sums, expected.channel_sums)
    assert torch.equal(result.output_sums, expected.output_sums)
    assert not result.channel_sums[:, 1::2].any() and not result.output_sums[:, 1::2].any()
    nothing = run(inputs, torch.zeros_like(weights), backend=backend)
    assert not nothing.channel_sums.any() and not nothing.output_sums.any()


def test_the_op_and_its_shapes():
    inputs = cases.make(cases.CASES[0], torch.float32)
    weights = slotsums.weights_of(inputs)
    arguments = (
        *(inputs[name] for name in ("hidden_states", "gate_up_proj", "down_proj", "top_k_index")),
        *(inputs["top_k_weights"], None, None, weights, "silu", True, False, False, False, "auto"),
    )
    torch.library.opcheck(torch.ops.reap.moe_saliency_sums.default, arguments)
    meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in inputs.items()}
    result, real = run(meta, weights.to("meta")), run(inputs, weights)
    assert isinstance(real, Summed) and Summed._fields[:3] == Saliency._fields
    assert [(x.shape, x.dtype) for x in result] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "sum_weights is a NoneType, must be a torch.Tensor"),
        (torch.ones(33, 3), "sum_weights has shape [33, 3], must have 3 dimensions"),
        (
            torch.ones(2, 33, 4),
            "sum_weights has shape [2, 33, 4], must be [2, 33, 3] = [2, T, K] "
            "(gated=True, transposed=False)",
        ),
        (torch.ones(2, 33, 3).bfloat16(), "sum_weights has dtype bfloat16, must be float32"),
        (torch.ones(2, 33, 3).requires_grad_(), "sum_weights requires grad in grad mode, must not"),
    ],
)
def test_refused(weights, message):
    with pytest.raises(ValueError) as error:
        run(cases.make(cases.CASES[0], torch.float32), weights)
    assert str(error.value).startswith(message)


@pytest.mark.skipif(not ISAS, reason=str(native.missing()))
def test_memory_is_that_of_the_blocks():
    """As `cpu.execute` says: sums of the blocks at work and of one expert, nothing per slot."""
    inputs = cases.make(cases.Case("", T=2000, K=4, E=70, H=34, I=18), torch.float32)
    call = make_call(**inputs)
    summed = call._replace(sum_weights=slotsums.weights_of(inputs))
    bare, whole = (cpu.execute(each, threads=2)[1] for each in (call, summed))
    assert whole - bare == 2 * 8 * 2 * 2 * 18 * 4 + 64 * -(-(2 * (18 + 34) * 8) // 64)
