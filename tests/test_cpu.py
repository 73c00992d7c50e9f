"""The native CPU backend: every instruction set that runs here, against the truth."""

import functools
import mmap
import multiprocessing
import threading
import warnings

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap_kernels import cpu, moe_saliency, native, swiglu_clamped
from reap_kernels.contract import make_call

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
ISAS = cpu.isas() if native.missing() is None else []
# More than a block, a slab, a piece of k and a group in every direction, and none of them whole.
LARGE = cases.Case("larger than every tile", T=300, K=2, E=3, H=1103, I=557, bias=True)
# All three paths of a block: few tokens, part of a block, several blocks.
SKEWED = cases.Case("few and many tokens", T=260, K=2, E=40, H=130, I=70)

# More slots than inner has rows for at up to 3 threads: blocks take the buffers of earlier ones.
LONG = cases.Case("more slots than are in the making", T=2000, K=4, E=70, H=34, I=18)


# As in csrc/cpu/job.h and layer.cpp; and piece_steps of numbers.h, with pairs of bf16 and without.
SLAB, GROUP, BLOCK_TOKENS, LINE, AHEAD = 96, 48, 160, 64, 8
PIECE_STEPS = {True: 512, False: 128}


def call_of(inputs):
    return make_call(**inputs)


def extra_bytes(call, isa=None, threads=None):
    """What `cpu.execute` says that it allocates, in full."""
    T, K, E, H, I = call.T, call.K, call.E, call.H, call.I  # noqa: E741
    S, dtype = T * K, call.hidden_states.dtype
    threads = torch.get_num_threads() if threads is None else threads
    fp32 = dtype == torch.float32
    pairs = dtype == torch.bfloat16 and (isa or ISAS[0]) == "avx512_bf16"
    slabs = -(-H // SLAB)
    steps = -(-H // 2) if pairs else H if fp32 else max(H, I)
    scratch = 4 * (steps * BLOCK_TOKENS + GROUP * PIECE_STEPS[pairs] + 2 * GROUP * BLOCK_TOKENS)
    blocks, buffers = S // BLOCK_TOKENS + min(S, E), 2 * AHEAD * threads
    all_fit = S <= buffers * BLOCK_TOKENS
    rows, gaps = (S, blocks) if all_fit else (buffers * BLOCK_TOKENS, buffers)
    pieces = (
        4 * S,  # order
        32 * blocks,
        8 * blocks,  # progress
        8 * (E + 1),  # offsets
        8 * slabs,  # next_block
        8 * rows * slabs,  # partials
        0 if fp32 else 4 * T * H,  # sums
        scratch * threads,
        rows * (I + I % 2) * dtype.itemsize + gaps * LINE,  # inner
    )
    return sum(-(-piece // LINE) * LINE for piece in pieces) + 2 * LINE


def skewed(dtype=torch.float32):
    """Half of all slots go to expert 7, a tenth to nobody, the others anywhere."""
    inputs = cases.make(SKEWED, dtype)
    g = torch.Generator().manual_seed(1)
    draw = torch.rand(SKEWED.T, SKEWED.K, generator=g)
    ids = inputs["top_k_index"]
    inputs["top_k_index"] = torch.where(draw < 0.5, 7, torch.where(draw < 0.6, SKEWED.E, ids))
    return inputs


def widened(inputs):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in inputs.items()}  # fmt: skip


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_accurate(case, dtype, isa):
    inputs = cases.make(case, dtype)
    result, _ = cpu.execute(call_of(inputs), isa=isa)
    cases.assert_accurate(result, inputs, cases.known(case, dtype))


@functools.lru_cache(maxsize=1)
def large(case, dtype):
    """The inputs, what `reference` makes of them in fp64, and what `plain` does."""
    inputs = cases.make(case, dtype)
    return inputs, moe_saliency(**widened(inputs), backend="reference"), cases.plain(inputs)


@pytest.mark.sweep
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("T", (9, 300))  # few tokens per expert, and many
def test_accurate_beyond_every_tile(dtype, isa, transposed, T):
    """The accuracy rule, with the truth from `reference` in fp64: slot by slot takes too long."""
    inputs, exact, plains = large(cases.replace(LARGE, transposed=transposed, T=T), dtype)
    result, _ = cpu.execute(call_of(inputs), isa=isa)
    for ours, truth, plain in zip(result, exact, plains, strict=True):
        scale = truth.abs().max()
        error, bound = ((x.double() - truth).abs().max() / scale for x in (ours, plain))
        assert error <= bound + cases.EPSILON[dtype]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_same_bits_at_any_number_of_threads(dtype, isa):
    for inputs in (skewed(dtype), cases.make(LONG, dtype)):
        call = call_of(inputs)
        first, _ = cpu.execute(call, isa=isa, threads=1)
        for threads in (1, 2, 3, 7):
            assert same_bits(first, cpu.execute(call, isa=isa, threads=threads)[0]), threads


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("threads", (1, 3))
def test_allocates_what_the_formula_says(dtype, isa, threads):
    for case in (SKEWED, LONG, cases.SHAPES[0]):
        inputs = cases.make(case, dtype)
        call = call_of(inputs)
        _, allocated = cpu.execute(call, isa=isa, threads=threads)
        assert allocated == extra_bytes(call, isa, threads)


def test_extra_memory_is_flat_in_the_experts():
    case = cases.Case("", T=64, K=2)
    few, many = (call_of(cases.make(cases.replace(case, E=E), torch.float32)) for E in (2, 64))
    assert extra_bytes(many) - extra_bytes(few) < 62 * 128


def test_extra_memory_has_a_bound_beside_the_output():
    """Twice the tokens cost their sums in fp32 and their routing, not what lies in between."""
    case = cases.replace(LONG, H=256, I=512)
    once, twice = (
        call_of(cases.make(cases.replace(case, T=T), torch.bfloat16)) for T in (2048, 4096)
    )
    tokens, slots = 2048, 2048 * case.K
    more = extra_bytes(twice, threads=2) - extra_bytes(once, threads=2)
    assert 0 < more < tokens * case.H * 4 + slots * 8


def test_norms_can_be_left_out():
    call = call_of(skewed())
    whole, bare = cpu.execute(call)[0], cpu.execute(call, norms=False)[0]
    assert torch.equal(whole.out, bare.out)
    assert whole.norms.any() and not bare.norms.any() and not bare.peaks.any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_nan_and_infinity_reach_norm_and_peak(dtype, isa, bad):
    """One bad weight of `down` is in the slots of its expert, and nowhere else."""
    inputs = skewed(dtype)
    inputs["down_proj"][7, 50, 3] = bad
    result, _ = cpu.execute(call_of(inputs), isa=isa)
    hit = inputs["top_k_index"] == 7
    for values in (result.norms, result.peaks):
        assert values[~hit].isfinite().all()
        if bad == torch.inf:  # zero times infinity is NaN
            assert (~values[hit].isfinite()).all()
        else:
            assert values[hit].isnan().all()
    assert result.out[~hit.any(dim=1)].isfinite().all()
    assert result.out[hit.any(dim=1), 50].isfinite().logical_not().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_unaligned_weights(dtype, isa):
    """Weights that begin an odd number of elements into their memory, as in a safetensors file."""
    inputs = skewed(dtype)
    expected, _ = cpu.execute(call_of(inputs), isa=isa)
    for name in ("gate_up_proj", "down_proj", "hidden_states"):
        tensor = inputs[name]
        memory = torch.empty(tensor.numel() + 64 + 1, dtype=dtype)
        start = 1 + (-memory.data_ptr() % 64) // dtype.itemsize
        inputs[name] = memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
        assert inputs[name].data_ptr() % 64 == dtype.itemsize
    assert same_bits(expected, cpu.execute(call_of(inputs), isa=isa)[0])


@pytest.mark.parametrize("isa", ISAS)
def test_weights_on_a_read_only_map(tmp_path, isa):
    """A write anywhere in the weights is a fault."""
    inputs = cases.make(cases.Case("", H=128, I=64, E=8), torch.bfloat16)
    expected, _ = cpu.execute(call_of(inputs), isa=isa)
    for name in ("gate_up_proj", "down_proj"):
        tensor, path = inputs[name], tmp_path / name
        assert tensor.nbytes % 4096 == 0
        path.write_bytes(tensor.view(torch.uint8).numpy().tobytes())
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it cannot keep a tensor from writing
            pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            inputs[name] = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
    assert same_bits(expected, cpu.execute(call_of(inputs), isa=isa)[0])


@pytest.mark.sweep
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 70),
    K=st.integers(1, 4),
    E=st.integers(1, 9),
    H=st.integers(1, 150),
    I=st.integers(1, 80),
    layout=st.sampled_from(cases.LAYOUTS),
    strides=st.sampled_from(("contiguous", "stepped", "permuted")),
    routing=st.sampled_from(("some_sentinels", "one_expert", "repeats")),
    activation=st.sampled_from(("silu", "gelu", "relu2", swiglu_clamped(1.702, 0.7, 1.0))),
    dtype=st.sampled_from(cases.DTYPES),
    isa=st.sampled_from(ISAS or ("",)),
    seed=st.integers(0, 99),
)
def test_sweep(T, K, E, H, I, layout, strides, routing, activation, dtype, isa, seed):  # noqa: E741
    if not layout.gated and activation.startswith("swiglu"):
        activation = "gelu_tanh"
    sizes = {"T": T, "K": min(K, E), "E": E, "H": H, "I": I}
    options = {"strides": strides, "routing": routing, "activation": activation}
    inputs = cases.make(cases.replace(layout, **sizes, **options), dtype, seed=seed)
    cases.assert_accurate(cpu.execute(call_of(inputs), isa=isa)[0], inputs, drawn=True)


def test_several_python_threads_at_once():
    call = call_of(skewed(torch.bfloat16))
    expected, _ = cpu.execute(call)
    wrong = []

    def work():
        for _ in range(5):
            if not same_bits(expected, cpu.execute(call, threads=2)[0]):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _in_child(call, expected, answer):
    torch.set_num_threads(1)  # torch itself waits for its lost threads in a child, ours must not
    answer.put(same_bits(expected, cpu.execute(call, threads=3)[0]))


def test_after_fork():
    """The parent has used its threads; the child has none of them and must not wait for them."""
    call = call_of(skewed())
    expected, _ = cpu.execute(call, threads=3)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_in_child, args=(call, expected, answer))
    child.start()
    try:
        assert answer.get(timeout=60)
    finally:
        child.kill()
        child.join()


def test_out_of_memory():
    call = call_of(skewed())
    with pytest.raises(MemoryError):
        cpu.execute(call, threads=2**31 - 1)  # scratch for each: more than there are addresses


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="isa is 'mmx', which this processor or build does not"):
        cpu.execute(call_of(skewed()), isa="mmx")


def test_auto_takes_it_and_fp64_is_refused():
    inputs = skewed()
    assert same_bits(moe_saliency(**inputs), moe_saliency(**inputs, backend="cpu"))
    with pytest.raises(ValueError, match="cpu: no kernels for torch.float64"):
        moe_saliency(**widened(inputs), backend="cpu")
