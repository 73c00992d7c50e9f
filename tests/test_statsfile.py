import copy
import json
import math
import pickle
import struct

import pytest
import torch
from slots import MODEL, NAME, TWO_LAYERS, E, slots

from reap.errors import ReapError
from reap.statistics.stats import Statistics


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


def test_bytes_are_those_of_the_library(tmp_path):
    """Tensors are written one at a time, but in its order: digests do not depend on who wrote."""
    from safetensors.torch import load_file, save

    stats = Statistics(TWO_LAYERS, pairs=True)
    for domain, seed in (("b", 1), ("a", 2)):
        with stats.domain(domain):
            stats.update("first", *slots(30, seed))
            stats.update("second", *slots(30, seed, experts=9, k=2))
    stats.save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert save(load_file(tmp_path / "s"), metadata) == raw


def test_pairs_stay_in_the_file_until_they_are_asked_for(tmp_path):
    stats = Statistics(MODEL, pairs=True)
    stats.update(NAME, *slots(30))
    stats.save(tmp_path / "s")
    back = Statistics.load(tmp_path / "s")
    for copied in (
        copy.deepcopy(back),
        pickle.loads(pickle.dumps(back)),
        back + Statistics(MODEL, pairs=True),
    ):
        assert copied == stats
    back.save(tmp_path / "s", overwrite=True)  # over what it is read from
    assert back == stats == Statistics.load(tmp_path / "s")
    late = Statistics.load(tmp_path / "s")
    with open(tmp_path / "s", "r+b") as file:
        file.truncate(1000)
    assert late[NAME].count.equal(stats[NAME].count)
    with pytest.raises(ReapError, match="changed while it was read"):
        late[NAME].coweighted  # noqa: B018
    with pytest.raises(ReapError, match="changed while it was read"):
        late.save(tmp_path / "t")
    assert not (tmp_path / "t").exists() and len(list(tmp_path.iterdir())) == 1


def everything(*seeds, **kinds):
    """Coalitions, cut off or not, and logits, those of one layer unknown."""
    stats = Statistics(TWO_LAYERS, **{"coalitions": 7, "logits": True} | kinds)
    for seed in seeds:
        logits = torch.randn(30, E, generator=torch.Generator().manual_seed(seed)) * 20
        with stats.domain("ab"[seed % 2]):
            stats.update("first", *slots(30, seed), logits=logits)
            stats.update("second", *slots(30, seed, experts=9, k=2))
    return stats


@pytest.mark.parametrize("coalitions", (7, 10_000))
def test_coalitions_and_logits_add_up_in_files(tmp_path, coalitions):
    whole = everything(*range(5), coalitions=coalitions)
    parts = []
    for number, seeds in enumerate(((3, 1), (0,), (4, 2))):
        everything(*seeds, coalitions=coalitions).save(tmp_path / f"{number}")
        parts.append(Statistics.load(tmp_path / f"{number}"))
    a, b, c = parts
    total = (c + a) + b
    total.save(tmp_path / "total")
    (a + (b + c)).save(tmp_path / "other")
    assert (tmp_path / "total").read_bytes() == (tmp_path / "other").read_bytes()
    whole.save(tmp_path / "whole")
    assert total.digest() == whole.digest() == Statistics.load(tmp_path / "whole").digest()
    assert total == whole == Statistics.load(tmp_path / "total")
    again = everything(3, 1, coalitions=coalitions)
    assert a == again
    for stats in (a, again):
        with stats.domain("a"):
            stats.update("first", *slots(4), logits=torch.ones(4, E))
    assert a == again != Statistics.load(tmp_path / "0")
    for copied in (copy.deepcopy(whole), pickle.loads(pickle.dumps(total)), total.select("a", "b")):
        assert copied == whole
    both = whole["first"].chosen
    assert (both.level > 0) == (coalitions == 7) and len(both.sets) <= coalitions
    assert both.tokens == 150 and (both.left_out == 0) == (both.level == 0)
    assert whole["second"].logit_sum is None and whole["first"].logit_products.shape == (E, E)


def test_bytes_with_all_kinds_are_those_of_the_library(tmp_path):
    from safetensors.torch import load_file, save

    everything(1, 2, pairs=True).save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["reap"])["version"] == 3
    assert save(load_file(tmp_path / "s"), metadata) == raw


@pytest.mark.parametrize("other", ({"coalitions": 8}, {"coalitions": 0}, {"logits": False}))
def test_what_differs_in_kind_does_not_add_up(other):
    (field,) = other
    with pytest.raises(ReapError, match=f"{field} .* against"):
        everything(1) + everything(2, **other)
    assert everything(1) != everything(1, **other)
    assert everything(1).digest() != everything(1, **other).digest()


@pytest.mark.parametrize("coalitions", (-1, 1.5, True, 1 << 25))
def test_no_number_of_coalitions(coalitions):
    with pytest.raises(ReapError, match="how many sets of experts to keep"):
        Statistics(MODEL, coalitions=coalitions)


def fills_first(field, index, value):
    return lambda about, tensors: tensors[f"0/first/{field}"].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changes("coalitions", True), "'coalitions' must be a JSON int"),
        (changes("coalitions", 1 << 30), "how many sets of experts to keep"),
        (changes("coalitions", 3), r"its metadata asks for I\d+ \[3"),
        (changes("coalitions", 0), "its metadata asks for absent"),
        (changes("logits", 1), "'logits' must be a JSON bool"),
        (changes("logits", False), "its metadata asks for absent"),
        (fills_first("coalition_count", 0, 0), "impossible counts of coalitions"),
        (fills_first("coalition_sets", (0, 0), 77), "a coalition with an id of no expert"),
        (fills_first("coalition_about", 1, 31), "impossible numbers of coalitions"),
        (fills_first("logit_products", (-1, 0), 31), "logit_products are of other than its tok"),
        (fills_first("logit_products", (0, 1), -1), "logit_products has a fraction beyond"),
        (lambda about, tensors: tensors.pop("0/first/coalition_about"), "is absent"),
    ],
)
def test_coalitions_and_logits_that_contradict_themselves(tmp_path, change, message):
    everything(2).save(tmp_path / "s")
    rewrite(tmp_path / "s", change)
    with pytest.raises(ReapError, match=message):
        Statistics.load(tmp_path / "s")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changes("format", "gguf"), "holds no statistics: its format is 'gguf'"),
        (changes("version", 4), "has format version 4: this program reads up to version 3"),
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
        about["model"]["layers"][0]["num_experts"] = 50_000

    rewrite(tmp_path / "s", many_experts)
    with pytest.raises(
        ReapError, match=r"count' is I64 \[6\], its metadata asks for I64 \[50000\]"
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
