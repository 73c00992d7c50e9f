"""The op around the backends: what it refuses, how it picks, and how it behaves towards torch."""

import inspect
from types import SimpleNamespace

import cases
import pytest
import torch

from reap_kernels import Saliency, backends, moe_saliency, moe_saliency_sums, ops, reference
from reap_kernels.activations import parse
from reap_kernels.contract import FLAGS, TENSORS, Call

BASE = cases.Case("", T=6, K=2, E=4, H=5, I=3)
T, K, E, H, I = BASE.T, BASE.K, BASE.E, BASE.H, BASE.I  # noqa: E741
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def inputs(case=BASE, dtype=F32, **changes):
    return cases.make(case, dtype) | changes


def zeros(*shape, dtype=F32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def ids(*shape, value=0, dtype=torch.int64):
    return torch.full(shape, value, dtype=dtype)


def test_a_call_has_the_arguments_of_the_op_in_the_order_of_its_schema():
    for name, function in (("", moe_saliency), ("_sums", moe_saliency_sums)):
        op = getattr(torch.ops.reap, f"moe_saliency{name}").default
        schema = [argument.name for argument in op._schema.arguments]
        fields = [field for field in Call._fields if name or field != "sum_weights"]
        assert list(Call._fields) == [*TENSORS, "activation", *FLAGS]
        assert schema == [*fields, "backend"]
        given = inspect.signature(function).parameters
        assert sorted(given) == sorted(schema)
        absent = inspect.Parameter.empty
        defaults = {n: p.default for n, p in given.items() if p.default is not absent}
        assert defaults.pop("backend") == "auto"
        parsed = defaults | {"activation": parse(defaults["activation"]), "sum_weights": None}
        assert Call._field_defaults == parsed


UNGATED = {"gated": False, "gate_up_proj": zeros(E, I, H)}
# what is changed in a good call -> all of the one-line message
REFUSED = {
    # ranks and sizes
    "hidden 3-D": (
        {"hidden_states": zeros(1, T, H)},
        "hidden_states has shape [1, 6, 5], must have 2 dimensions",
    ),
    "one expert's weights": (
        {"down_proj": zeros(H, I)},
        "down_proj has shape [5, 3], must have 3 dimensions",
    ),
    "ids 1-D": ({"top_k_index": ids(T)}, "top_k_index has shape [6], must have 2 dimensions"),
    "bias 1-D": ({"down_bias": zeros(H)}, "down_bias has shape [5], must have 2 dimensions"),
    "H = 0": ({"hidden_states": zeros(T, 0)}, "hidden_states has shape [6, 0], must not be empty"),
    "K = 0": ({"top_k_index": ids(T, 0)}, "top_k_index has shape [6, 0], must not be empty"),
    "E = 0": (
        {"gate_up_proj": zeros(0, 2 * I, H)},
        "gate_up_proj has shape [0, 6, 5], must not be empty",
    ),
    "I = 0": (
        {"gate_up_proj": zeros(E, 0, H)},
        "gate_up_proj has shape [4, 0, 5], must not be empty",
    ),
    "odd gate and up": (
        {"gate_up_proj": zeros(E, 7, H)},
        "gate_up_proj has shape [4, 7, 5], must have as many gate as up rows, not 7 in all: "
        "pass gated=False if the experts have no gate",
    ),
    "other H": (
        {"gate_up_proj": zeros(E, 2 * I, 9)},
        "gate_up_proj has shape [4, 6, 9], must be [4, 6, 5] = [E, 2I, H] "
        "(gated=True, transposed=False)",
    ),
    "transposed down": (
        {"down_proj": zeros(E, I, H)},
        "down_proj has shape [4, 3, 5], must be [4, 5, 3] = [E, H, I] "
        "(gated=True, transposed=False)",
    ),
    "transposed flag": (
        {"transposed": True},
        "gate_up_proj has shape [4, 6, 5], must have as many gate as up rows, not 5 in all: "
        "pass gated=False if the experts have no gate",
    ),
    "down of the gated": (
        {"gated": False},
        "down_proj has shape [4, 5, 3], must be [4, 5, 6] = [E, H, I] "
        "(gated=False, transposed=False)",
    ),
    "fewer experts in down": (
        {"down_proj": zeros(3, H, I)},
        "down_proj has shape [3, 5, 3], must be [4, 5, 3] = [E, H, I] "
        "(gated=True, transposed=False)",
    ),
    "other T": (
        {"top_k_index": ids(7, K)},
        "top_k_index has shape [7, 2], must be [6, 2] = [T, K] (gated=True, transposed=False)",
    ),
    "other K": (
        {"top_k_weights": zeros(T, 3)},
        "top_k_weights has shape [6, 3], must be [6, 2] = [T, K] (gated=True, transposed=False)",
    ),
    "bias of half the rows": (
        {"gate_up_bias": zeros(E, I)},
        "gate_up_bias has shape [4, 3], must be [4, 6] = [E, 2I] (gated=True, transposed=False)",
    ),
    "bias of a gate that is not there": (
        {**UNGATED, "gate_up_bias": zeros(E, 2 * I)},
        "gate_up_bias has shape [4, 6], must be [4, 3] = [E, I] (gated=False, transposed=False)",
    ),
    "down bias": (
        {"down_bias": zeros(E, I)},
        "down_bias has shape [4, 3], must be [4, 5] = [E, H] (gated=True, transposed=False)",
    ),
    # kinds
    "integer model": (
        {"hidden_states": ids(T, H)},
        "hidden_states has dtype int64, must be bfloat16 or float16 or float32 or float64",
    ),
    "mixed model": (
        {"down_proj": zeros(E, H, I, dtype=BF16)},
        "down_proj has dtype bfloat16, must be float32 as hidden_states",
    ),
    "bias of another dtype": (
        {"down_bias": zeros(E, H, dtype=BF16)},
        "down_bias has dtype bfloat16, must be float32 as hidden_states",
    ),
    "float ids": (
        {"top_k_index": zeros(T, K)},
        "top_k_index has dtype float32, must be int32 or int64",
    ),
    "fp64 gates": (
        {"top_k_weights": zeros(T, K, dtype=F64)},
        "top_k_weights has dtype float64, must be bfloat16 or float16 or float32",
    ),
    "another device": (
        {"down_proj": zeros(E, H, I, device="meta")},
        "down_proj is on device meta, must be on cpu as hidden_states",
    ),
    "sparse": (
        {"hidden_states": zeros(T, H).to_sparse()},
        "hidden_states has layout torch.sparse_coo, must be torch.strided",
    ),
    "no tensor": (
        {"top_k_weights": [[1.0]]},
        "top_k_weights is a list, must be a torch.Tensor",
    ),
    "missing tensor": (
        {"hidden_states": None},
        "hidden_states is a NoneType, must be a torch.Tensor",
    ),
    "bias that is no tensor": ({"down_bias": 0.0}, "down_bias is a float, must be a torch.Tensor"),
    # values and options
    "negative id": (
        {"top_k_index": ids(T, K, value=-1)},
        "top_k_index holds the id -1, must be >= 0 (an id >= E is a slot without expert)",
    ),
    "negative int32 id": (
        {"top_k_index": ids(T, K, value=-7, dtype=torch.int32)},
        "top_k_index holds the id -7, must be >= 0 (an id >= E is a slot without expert)",
    ),
    "unknown activation": (
        {"activation": "swish"},
        "activation is 'swish', must be one of silu, gelu, gelu_tanh, relu, relu2 or "
        "swiglu_clamped(alpha, limit, offset) with finite alpha and offset and limit > 0",
    ),
    "activation that is no string": (
        {"activation": torch.nn.functional.silu},
        f"activation is {torch.nn.functional.silu!r}, must be a string",
    ),
    "clamped without gate": (
        {**UNGATED, "activation": "swiglu_clamped(1, 7, 0)"},
        "activation is swiglu_clamped, must be an ungated one where gated=False",
    ),
    "interleaved without gate": (
        {**UNGATED, "interleaved": True},
        "interleaved is True, must be False where gated=False: there is no gate",
    ),
    "flag that is no bool": ({"transposed": 1}, "transposed is 1, must be True or False"),
    "backend that is no string": ({"backend": None}, "backend is None, must be a string"),
}


@pytest.fixture
def no_backend_runs(monkeypatch):
    def run(call):
        raise AssertionError("a backend ran")

    fakes = [SimpleNamespace(**vars(backend) | {"run": run}) for backend in ops.LADDER]
    monkeypatch.setattr(ops, "LADDER", tuple(fakes))


@pytest.mark.parametrize("why", REFUSED)
def test_refused_before_any_backend_runs(why, no_backend_runs):
    changes, message = REFUSED[why]
    with pytest.raises(ValueError) as error:
        moe_saliency(**inputs(**changes))
    assert str(error.value) == message


def test_the_call_that_they_change_is_good():
    assert moe_saliency(**inputs()).out.shape == (T, H)


@pytest.mark.parametrize(
    "name", [name for name, value in inputs(cases.Case("", bias=True)).items()
             if isinstance(value, torch.Tensor) and value.is_floating_point()]
)  # fmt: skip
def test_inputs_that_require_grad(name):
    arguments = inputs(cases.Case("", bias=True))
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name} requires grad in grad mode, must not"):
        moe_saliency(**arguments)
    with torch.no_grad():
        result = moe_saliency(**arguments)
    with torch.inference_mode():
        moe_saliency(**arguments)
    assert not result.out.requires_grad


def test_the_bare_op_is_never_silently_without_gradient():
    arguments = inputs()
    arguments["down_proj"].requires_grad_()
    bare = torch.ops.reap.moe_saliency
    with pytest.raises(ValueError, match="^down_proj requires grad in grad mode, must not"):
        bare(*arguments.values(), False, "auto")
    with torch.no_grad():
        assert not bare(*arguments.values(), False, "auto")[0].requires_grad


def test_compilers_keep_out_of_backends():
    """Compiled code that falls back to Python compiles what it calls there, but no backend."""
    arguments, graphs = (*inputs().values(), False, "reference"), []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compiler.disable(recursive=False)
    def fallen_back():
        return torch.ops.reap.moe_saliency(*arguments)

    torch.compile(lambda: fallen_back(), backend=compiler)()
    assert not graphs


def fake_backend(name, *, available=None, unsupported=None):
    def run(call):
        return reference.run(call)._replace(out=torch.full((call.T, call.H), float(len(name))))

    return SimpleNamespace(
        NAME=name, available=lambda: available, unsupported=lambda call: unsupported, run=run
    )


def test_auto_takes_the_first_that_can(monkeypatch):
    ladder = (
        fake_backend("a", available="no such device"),
        fake_backend("bb", unsupported="no gelu"),
        fake_backend("ccc"),
        fake_backend("dddd"),
    )
    monkeypatch.setattr(ops, "LADDER", ladder)
    assert (moe_saliency(**inputs()).out == 3).all()
    assert (moe_saliency(**inputs(), backend="dddd").out == 4).all()
    assert list(backends().items()) == [
        ("a", "no such device"), ("bb", None), ("ccc", None), ("dddd", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("a", "backend is 'a', which cannot run this call: a: no such device"),
        ("bb", "backend is 'bb', which cannot run this call: bb: no gelu"),
        ("auto", "backend is 'auto', which cannot run this call: a: no such device; bb: no gelu"),
        ("Reference", "backend is 'Reference', must be auto or one of a, bb"),
        ("", "backend is '', must be auto or one of a, bb"),
    ],
)
def test_a_backend_that_cannot_says_why(monkeypatch, backend, message):
    ladder = (
        fake_backend("a", available="no such device", unsupported="no gelu"),
        fake_backend("bb", unsupported="no gelu"),
    )
    monkeypatch.setattr(ops, "LADDER", ladder)
    with pytest.raises(ValueError) as error:
        moe_saliency(**inputs(), backend=backend)
    assert str(error.value) == message


def test_reference_is_last_and_always_there():
    assert list(backends())[-1] == "reference"
    assert backends()["reference"] is None
    for reason in backends().values():
        assert reason is None or (reason and "\n" not in reason)


@pytest.mark.parametrize("case", [*cases.LAYOUTS, cases.SHAPES[3], cases.STRIDES[0]], ids=str)
def test_result_is_fresh_contiguous_memory_and_inputs_stay(case):
    arguments = inputs(case)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    result = moe_saliency(**arguments)
    assert isinstance(result, Saliency)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in result if tensor.numel()}
    assert len(addresses) == sum(tensor.numel() > 0 for tensor in result)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor), name
        assert arguments[name].untyped_storage().data_ptr() not in addresses
    assert all(tensor.is_contiguous() for tensor in result)


@pytest.mark.parametrize("backend", backends())
def test_autocast_changes_nothing(backend):
    if reason := backends()[backend]:
        pytest.skip(f"{backend}: {reason}")
    arguments = inputs(cases.Case("")) | {"backend": backend}
    with torch.autocast("cpu", dtype=BF16):
        inside = moe_saliency(**arguments)
    for a, b in zip(inside, moe_saliency(**arguments), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [*cases.DTYPES, F64], ids=str)
@pytest.mark.parametrize("case", [BASE, cases.SHAPES[3], cases.STRIDES[3]], ids=str)
def test_meta_tensors_give_shapes_dtypes_and_strides(case, dtype):
    arguments = inputs(case, dtype)
    real = moe_saliency(**arguments)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for a, b in zip(moe_saliency(**meta), real, strict=True):
        assert a.is_meta
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("why", [w for w in REFUSED if w not in ("sparse", "another device")])
def test_the_fake_kernel_refuses_the_same(why):
    changes, message = REFUSED[why]
    arguments = inputs(**changes)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    message = message.replace("cpu", "meta")
    if "holds the id" in message:  # a value, which meta tensors do not have
        assert moe_saliency(**meta).out.shape == (T, H)
        return
    with pytest.raises(ValueError) as error:
        moe_saliency(**meta)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "case",
    [BASE, cases.LAYOUTS[7], cases.LAYOUTS[9], cases.SHAPES[3], cases.STRIDES[0]],
    ids=str,
)
def test_opcheck(case):
    arguments = inputs(case)
    assert list(arguments) == [name for name in Call._fields[:-1] if name != "sum_weights"]
    positional = (*arguments.values(), False, "auto")
    torch.library.opcheck(torch.ops.reap.moe_saliency.default, positional)


def test_compiles_without_graph_breaks_for_any_number_of_tokens():
    compiled = torch.compile(moe_saliency, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 2):
        arguments = inputs(cases.Case("", T=tokens, bias=True, routing="some_sentinels"))
        result = compiled(**arguments)
        assert isinstance(result, Saliency)
        for a, b in zip(result, moe_saliency(**arguments), strict=True):
            assert torch.equal(a, b)


def test_negative_ids_are_found_in_compiled_code_too():
    compiled = torch.compile(moe_saliency, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="holds the id -1"):
        compiled(**inputs(top_k_index=ids(T, K, value=-1)))


def test_memory_that_runs_out_is_one_line_and_the_next_call_runs(monkeypatch):
    inputs = cases.make(cases.SHAPES[4], torch.float32)

    def full(call):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore\nlines")

    with monkeypatch.context() as patch:
        patch.setattr(ops.cpu, "available", lambda: None)
        patch.setattr(ops.cpu, "unsupported", lambda call: None)
        patch.setattr(ops.cpu, "run", full)
        with pytest.raises(torch.OutOfMemoryError) as found:
            moe_saliency(**inputs)
    assert str(found.value) == (
        "no memory for 3 slots on cpu: pass fewer tokens at a time "
        "(CUDA out of memory. Tried to allocate 2 GiB.)"
    )
    cases.assert_accurate(moe_saliency(**inputs), inputs)
