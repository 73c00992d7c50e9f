import itertools
import json
import math
import struct
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reap.errors import ReapError
from reap.info import LayerInfo, ModelInfo
from reap.layerstats import SUMS
from reap.stats import LayerStatistics, Statistics

E, K = 6, 3
NAME = "model.layers.1.mlp.experts"
MODEL = ModelInfo("qwen3_moe", "tiny", "f" * 64, None, (LayerInfo(NAME, E, K),))
TWO_LAYERS = ModelInfo(
    "qwen3_moe", "tiny", "f" * 64, None, (LayerInfo("first", E, K), LayerInfo("second", 9, 2))
)


def slots(tokens: int, seed: int = 0, experts: int = E, k: int = K):
    """ids [T,K] distinct per token, weights, norms, peaks [T,K] fp32 of many magnitudes."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=g).topk(k, dim=1).indices
    weights = torch.rand(tokens, k, generator=g)
    norms = torch.randn(tokens, k, generator=g).mul(9).exp()
    return ids, weights, norms, norms * torch.rand(tokens, k, generator=g)


def brute_force(ids, weights, norms, peaks, mask, gates):
    """Every field by one loop over slots, in fractions; squares and renormalised gates in fp64."""
    found = {field: [Fraction(0)] * E for field in SUMS}
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
            if e >= E or g == 0:
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
    weights[::5, 0] = 0  # phantom slots
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
    assert layer.coweighted.tolist() == coweighted


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
    assert layer.coselected.tolist() == [[3, 2, 0], [2, 2, 0], [0, 0, 0]]
    assert layer.coweighted.tolist() == [[11, 1 + 18, 0], [19, 37, 0], [0, 0, 0]]


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
    assert layer.count.tolist() == [1, 1, 0] and layer.tokens == 2


def test_pairs_of_the_same_expert_are_no_pair():
    layer = LayerStatistics(2, pairs=True)
    layer.update(torch.tensor([[1, 1]]), torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    assert layer.coselected.tolist() == [[0, 0], [0, 2]]


def test_a_single_expert_has_no_pairs():
    layer = LayerStatistics(1, pairs=True)
    layer.update(torch.zeros(4, 1, dtype=torch.int64), *[torch.ones(4, 1)] * 3)
    assert layer.coselected.tolist() == [[4]] and layer.coweighted.tolist() == [[4.0]]


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


def test_merged_files_are_identical_bytes(tmp_path):
    parts = []
    for seed in range(3):
        part = Statistics(MODEL, data=[{"spec": f"file{seed}"}, {"spec": "shared"}])
        with part.domain("ab"[seed % 2]):
            part.update(NAME, *slots(20, seed))
        parts.append(part)
    a, b, c = parts
    ((a + b) + c).save(tmp_path / "one")
    (c + (b + a)).save(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert Statistics.load(tmp_path / "one").data == [
        {"spec": "file0"}, {"spec": "file1"}, {"spec": "file2"}, {"spec": "shared"}
    ]  # fmt: skip
    assert (a + b).digest() == (b + a).digest() != (a + c).digest()


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


def test_save_and_load(tmp_path):
    stats = Statistics(TWO_LAYERS, gates="renormalized", pairs=True, data=[{"spec": "x", "n": 1}])
    with stats.domain("a/b"):
        stats.update("first", *slots(30))
    stats.update("second", *slots(30, 1, experts=9, k=2))
    stats.save(tmp_path / "s")
    back = Statistics.load(tmp_path / "s")
    assert back == stats
    assert (back.model, back.data, back.versions) == (stats.model, stats.data, stats.versions)
    assert back.digest() == stats.digest()
    back.update("first", *slots(4))  # loaded sums go on exactly
    stats.update("first", *slots(4))
    assert back == stats
    with pytest.raises(ReapError, match="s exists"):
        stats.save(tmp_path / "s")
    Statistics(MODEL).save(tmp_path / "empty")
    assert Statistics.load(tmp_path / "empty") == Statistics(MODEL)


def test_versions_are_recorded_and_joined():
    a = Statistics(MODEL, versions={"torch": "2.12"})
    b = Statistics(MODEL, versions={"torch": "2.13", "transformers": "5.23"})
    assert (a + b).versions == {"torch": "2.12, 2.13", "transformers": "5.23"} == (b + a).versions
    assert Statistics(MODEL).versions["torch"] == torch.__version__


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
    with pytest.raises(ReapError, match="weights a against b"):
        of("a") + of(None) + of("b")


def test_layers_of_another_kind_do_not_add():
    with pytest.raises(ReapError, match="num_experts 4 against 5"):
        LayerStatistics(4) + LayerStatistics(5)
    assert LayerStatistics(4) != LayerStatistics(5)


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
    ways_out = [partial(getattr, layer, field) for field in fields]
    for way_out in (
        *ways_out,
        layer.tensors,
        lambda: layer + layer,
        lambda: layer.exact("gate_sum"),
    ):
        with pytest.raises(ReapError, match="1 slots have a negative expert id"):
            way_out()


def test_negative_ids():
    ids, weights, norms, peaks = slots(8)
    ids[2, 2] = -1
    with pytest.raises(ReapError, match=f"layer {NAME}: 1 slots have a negative expert id"):
        LayerStatistics(E, name=NAME).update(ids, weights, norms, peaks)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (0, torch.zeros(8, dtype=torch.int64), r"top_k_index is \[8\] int64"),
        (0, torch.zeros(8, K), r"top_k_index is \[8, 3\] float32"),
        (1, torch.zeros(7, K), r"top_k_weights is \[7, 3\] float32"),
        (2, torch.zeros(8, K, dtype=torch.int64), r"norms is \[8, 3\] int64"),
        (3, torch.zeros(8, K + 1), r"peaks is \[8, 4\] float32"),
        (4, torch.ones(8), r"mask is \[8\] float32: it must be \[8\] bool"),
        (4, torch.ones(7, dtype=torch.bool), r"mask is \[7\] bool"),
    ],
)
def test_bad_arguments(argument, value, message):
    arguments = [*slots(8), None]
    arguments[argument] = value
    with pytest.raises(ReapError, match=message):
        LayerStatistics(E).update(*arguments)


def test_more_slots_than_top_k_and_unknown_gates():
    with pytest.raises(ReapError, match="4 slots per token, but the model's top_k is 3"):
        Statistics(MODEL).update(NAME, *slots(2, k=4))
    with pytest.raises(ReapError, match="gates is 'softmax': it must be one of applied"):
        Statistics(MODEL, gates="softmax")
    with pytest.raises(ReapError, match="gates is 'softmax'"):
        LayerStatistics(2, gates="softmax")


def rewrite(path, change):
    """Change a statistics file's metadata object and raw tensors, keeping the container valid."""
    from safetensors.torch import load_file, save_file

    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    about = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["reap"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(about, tensors)
    save_file(tensors, path, {"reap": json.dumps(about)})


def changes(field, value):
    return lambda about, tensors: about.__setitem__(field, value)


def fills(field, index, value):
    return lambda about, tensors: tensors[f"0/{NAME}/{field}"].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changes("format", "gguf"), "holds no statistics: its format is 'gguf'"),
        (changes("version", 2), "has format version 2: this program reads version 1"),
        (changes("model", None), "field 'model' must be a JSON dict"),
        (changes("model", {}), "model description lacks"),
        (changes("gates", "softmax"), "gates is 'softmax'"),
        (changes("data", [1]), "'data' must be a list of objects"),
        (changes("versions", {"torch": 2}), "'versions' must map names to strings"),
        (changes("parts", {"default": "x"}), "'parts' must map 'default' to layer names"),
        (changes("parts", {"default": []}), "domain 'default' has no layers"),
        (changes("parts", {"default": ["other"]}), "no MoE layer called 'other'"),
        (changes("parts", {}), "is I64 .*, its metadata asks for absent"),
        (changes("pairs", False), "pair_count.* its metadata asks for absent"),
        (lambda about, tensors: tensors.popitem(), "is absent, its metadata asks for"),
        (fills("count", 0, -1), "a count is negative"),
        (fills("tokens", 0, -1), "a count is negative"),
        (fills("tokens", 0, 3), "slots from 3 tokens with top_k 3"),
        (fills("count", 0, 2**62), "slots from 20 tokens"),
        (fills("peak", 0, math.nan), "a peak is negative, infinite or NaN"),
        (fills("peak", 0, -1.0), "a peak is negative, infinite or NaN"),
        (fills("peak", E - 1, 1.0), "peak is not zero for an expert without tokens"),
        (fills("gate_sum", (E - 1, 3), 1), "gate_sum is not zero for an expert without tokens"),
        (fills("norm_sq_sum", (0, -1), -1), "norm_sq_sum is negative"),
        (fills("pair_count", 0, -1), "impossible counts of pairs"),
        (fills("pair_count", 0, 61), "impossible counts of pairs"),
        (fills("pair_sums", (-1, 0), 1), "a pair without tokens has a sum"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, change, message):
    stats = Statistics(MODEL, pairs=True)
    stats.update(NAME, *slots(20, experts=E - 1))  # the last expert is never routed to
    path = tmp_path / "s"
    stats.save(path)
    rewrite(path, change)
    with pytest.raises(ReapError, match=message) as error:
        Statistics.load(path)
    assert "\n" not in str(error.value)


def test_shapes_are_checked_before_anything_is_read(tmp_path):
    stats = Statistics(MODEL)
    stats.update(NAME, *slots(20))
    stats.save(tmp_path / "s")

    def many_experts(about, tensors):
        about["model"]["layers"][0]["num_experts"] = 10**15

    rewrite(tmp_path / "s", many_experts)
    with pytest.raises(
        ReapError, match=r"count' is I64 \[6\], its metadata asks for I64 \[1000000"
    ):
        Statistics.load(tmp_path / "s")


def test_every_truncation_is_an_error(tmp_path):
    stats = Statistics(MODEL)
    stats.update(NAME, *slots(20))
    stats.save(tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    for length in [0, 4, 8, 40, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "t").write_bytes(whole[:length])
        with pytest.raises(ReapError) as error:
            Statistics.load(tmp_path / "t")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"PK\x03\x04" + b"\0" * 60, "not a safetensors file|truncated or no safetensors"),
        (struct.pack("<Q", 2) + b"{}", "holds no statistics: it was not written by"),
        (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file"),
        (
            struct.pack("<Q", 100_039) + b'{"__metadata__":{"reap":"' + b"[" * 100_011 + b'"}}',
            "JSON|truncated",
        ),
    ],
)
def test_foreign_files(tmp_path, content, message):
    path = tmp_path / "s"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReapError, match=message) as error:
        Statistics.load(path)
    assert "\n" not in str(error.value)
