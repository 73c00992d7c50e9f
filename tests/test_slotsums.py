"""Sums of outputs and inner channels in statistics: kept, added, stored, and of whole models."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from brute import brute_force, run
from safetensors.torch import load_file, save_file
from slots import MODEL, NAME, E, slots
from test_layers import Dense, RemoteMoE, Sorted, remote_model
from tiny import tiny_inputs, tiny_model
from torch import Tensor

from reap.errors import ReapError
from reap.files.safefile import read_header
from reap.observation.patch import observe
from reap.statistics.layerstats import LayerStatistics
from reap.statistics.stats import Statistics

H, I = 7, 4  # noqa: E741
SUMS = ("output_sum", "gated_output_sum", "channel_sum", "gated_channel_sum")


def sums(seed: int = 0, experts: int = E) -> dict[str, Tensor]:
    """Of experts 0 to E - 2, which slots(..., experts=E - 1) have."""
    g = torch.Generator().manual_seed(seed)
    drawn = {
        "output_sums": torch.randn(2, experts, H, generator=g),
        "channel_sums": torch.randn(2, experts, I, generator=g),
    }
    for each in drawn.values():
        each[:, -1] = 0
    return drawn


def updated(*seeds: int, channels: bool = True) -> Statistics:
    stats = Statistics(MODEL, outputs=True)
    for seed in seeds:
        given = sums(seed)
        if not channels:
            del given["channel_sums"]
        stats.update(NAME, *slots(20, seed, experts=E - 1), **given)
    return stats


def test_sums_add_up() -> None:
    layer = updated(0, 1, 2)[NAME]
    given = [sums(seed) for seed in (0, 1, 2)]
    for name in SUMS:
        gated, kind = name.startswith("gated"), name.removeprefix("gated_") + "s"
        expected = sum(each[kind][int(gated)].double() for each in given)
        actual = getattr(layer, name)
        assert actual.dtype == torch.float64 and actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=1e-15, atol=1e-15)


def test_without_outputs_there_are_none() -> None:
    layer = LayerStatistics(E, name=NAME)
    layer.update(*slots(5))
    assert [getattr(layer, name) for name in SUMS] == [None] * 4 and not layer.outputs
    empty = Statistics(MODEL, outputs=True)
    assert [getattr(empty[NAME], name) for name in SUMS] == [None] * 4
    with pytest.raises(ReapError, match="outputs are recorded: update needs output_sums"):
        empty.update(NAME, *slots(5))


def test_any_partition_gives_the_same_bits() -> None:
    whole = updated(0, 1, 2, 3)
    parts = [updated(2), updated(), updated(3, 1), updated(0)]
    assert Statistics.total(parts) == whole == parts[3] + parts[2] + parts[0]
    assert Statistics.total(parts).digest() == whole.digest() != updated(0, 1, 2).digest()


def test_channels_that_one_call_hides_are_unknown() -> None:
    for mixed in (updated(0) + updated(1, channels=False), updated(1, channels=False) + updated(0)):
        layer = mixed[NAME]
        assert layer.channel_sum is None and layer.gated_channel_sum is None
        assert layer.output_sum is not None
    stats = updated(1, channels=False)
    stats.update(NAME, *slots(20, 0, experts=E - 1), **sums(0))
    assert stats == mixed


@pytest.mark.parametrize("channels", [True, False])
def test_the_file_has_them(tmp_path: Any, channels: bool) -> None:
    stats = updated(0, 1, channels=channels)
    path = tmp_path / "s"
    stats.save(path)
    back = Statistics.load(path)
    assert back == stats and back.digest() == stats.digest() and back.outputs
    for other in (back + Statistics(MODEL, outputs=True), back + updated(2, channels=channels)):
        widths = {"output_sums": H, "channel_sums": I} if channels else {"output_sums": H}
        assert other.layer(NAME).widths == widths
    back.update(NAME, *slots(20, 2, experts=E - 1), **sums(2))
    stats.update(NAME, *slots(20, 2, experts=E - 1), **sums(2))
    assert back == stats
    with pytest.raises(ReapError, match="outputs True against False"):
        back + Statistics(MODEL)


def test_statistics_without_outputs_are_written_as_before(tmp_path: Any) -> None:
    stats = Statistics(MODEL)
    stats.update(NAME, *slots(5))
    stats.save(tmp_path / "s")
    about = json.loads(read_header(tmp_path / "s").metadata["reap"])
    assert about["version"] == 2 and "outputs" not in about
    assert not Statistics.load(tmp_path / "s").outputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, x: about.update(outputs=3), "'outputs' must be a JSON bool"),
        (lambda about, x: about.update(outputs=False), "its metadata asks for absent"),
        (lambda about, x: x.pop("output_sums"), "it has tokens, and no sums of outputs"),
        (lambda about, x: x["channel_sums"][0, 1].fill_(-1), "channel_sums has a fraction beyond"),
        (lambda about, x: x["output_sums"][-1, 0, 0, 0].fill_(1), "output_sums is not zero for an"),
        (
            lambda about, x: x.update(output_sums=x["output_sums"][:, :1].contiguous()),
            r"is I64 \[6, 1, 2, 7\], its metadata asks for I64 \[6, 2, 2, 7\]",
        ),
    ],
)
def test_files_that_contradict_themselves(tmp_path: Any, change: Any, message: str) -> None:
    path = tmp_path / "s"
    updated(0).save(path)
    about = json.loads(read_header(path).metadata["reap"])
    tensors = {name.rpartition("/")[2]: x for name, x in load_file(path).items()}
    change(about, tensors)
    named = {f"0/{NAME}/{name}": x for name, x in tensors.items()}
    save_file(named, path, {"reap": json.dumps(about)})
    with pytest.raises(ReapError, match=message):
        Statistics.load(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -(2.0**44)])
def test_sums_that_cannot_be_are_named(value: float) -> None:
    stats, given = updated(0), sums(1)
    given["channel_sums"][1, 2, 3] = value
    with pytest.raises(ReapError, match=f"layer {NAME}, expert 2: a sum of its outputs or inner"):
        stats.update(NAME, *slots(20, 1, experts=E - 1), **given)
    with pytest.raises(ReapError, match="expert 2: a sum of its outputs"):
        stats.check()


def test_experts_of_two_sizes_are_refused() -> None:
    stats, given = updated(0), sums(1)
    given["output_sums"] = given["output_sums"][..., 1:]
    with pytest.raises(ReapError, match=f"layer {NAME}: output_sums of 6 columns against 7"):
        stats.update(NAME, *slots(20, 1, experts=E - 1), **given)


def assert_exact(stats: Statistics, truth: Any, keep: Tensor | None, **options: Any) -> None:
    for name in stats.layers:
        fields = truth[name].fields(keep=keep, **options)
        for field in SUMS:
            actual = getattr(stats[name], field)
            if actual is not None:
                scale = fields[field].abs().max()
                assert (actual - fields[field]).abs().max() <= 1e-5 * scale, (name, field)


@pytest.mark.parametrize("gates", ["applied", "renormalized"])
def test_only_tokens_that_count_are_in_them(gates: str) -> None:
    model = tiny_model("qwen3_moe")
    inputs = tiny_inputs(model, lengths=[9, 5])
    counted = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    with observe(model, gates=gates, outputs=True) as stats, brute_force(model) as truth:
        with stats.counting(counted):
            run(model, inputs)
    keep = (counted & inputs["attention_mask"].bool()).flatten()
    assert 0 < keep.sum() < 14
    assert_exact(stats, truth, keep, renormalized=gates == "renormalized")
    layer = stats[stats.layers[0]]
    assert layer.channel_sum is not None and layer.output_sum is not None
    # The down projection is linear: both are sums of the same slots.
    experts = model.get_submodule(layer.name)
    mapped = torch.einsum("ehi,ei->eh", experts.down_proj.double(), layer.channel_sum)
    torch.testing.assert_close(mapped, layer.output_sum, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["zaya", "longcat_flash", "muse_spark"])
def test_layers_that_run_as_they_are_have_outputs_alone(model_type: str, caplog: Any) -> None:
    model = tiny_model(model_type)
    inputs = tiny_inputs(model)
    keep = inputs["attention_mask"].flatten().bool()
    with observe(model, outputs=True) as stats, brute_force(model) as truth:
        run(model, inputs)
    own = any("runs as it is" in record.message for record in caplog.records)
    for name in stats.layers:
        assert stats[name].output_sum is not None
        if own:
            assert stats[name].channel_sum is None
    assert_exact(stats, truth, keep)


def test_experts_whose_input_is_scaled() -> None:
    """Llama 4: f(g x) is 0 where the gate is, so that gated sums are those of all it returns."""
    model = tiny_model("llama4_text")
    with observe(model, outputs=True) as stats:
        experts: Any = model.get_submodule(stats.layers[0])
        seen: list[Tensor] = []
        undo = experts.register_forward_hook(lambda _, args, out: seen.append(out))
        run(model, tiny_inputs(model))
        undo.remove()
    layer = stats[stats.layers[0]]
    expected = seen[0].double().unflatten(0, (layer.num_experts, -1)).sum(1)
    torch.testing.assert_close(layer.gated_output_sum, expected, rtol=1e-5, atol=1e-6)
    assert layer.output_sum is not None and layer.output_sum.isfinite().all()
    assert layer.channel_sum is None


@pytest.mark.parametrize("block", [RemoteMoE, Sorted, Dense])
def test_lists_of_experts(block: type[RemoteMoE], caplog: Any) -> None:
    """Of code that comes with a checkpoint, against what its experts return."""
    caplog.set_level(logging.ERROR, logger="reap")
    model = remote_model(block)
    inputs = tiny_inputs(model)
    with observe(model, outputs=True) as stats:
        run(model, inputs)
    name = stats.layers[-1]
    layer, moe = stats[name], model.get_submodule(name.rpartition(".")[0])
    assert layer.output_sum is not None and layer.gated_output_sum is not None
    assert layer.channel_sum is None
    seen: list[Tensor] = []
    handle = moe.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    run(model, inputs)
    handle.remove()
    with torch.no_grad():
        ids, gates = moe.route(seen[0])
        for number, expert in enumerate(moe.experts):
            token, slot = torch.where(ids == number)
            y = expert(seen[0][token]).double()
            for actual, w in (
                (layer.output_sum, 1),
                (layer.gated_output_sum, gates[token, slot, None]),
            ):
                torch.testing.assert_close(actual[number], (w * y).sum(0), rtol=1e-4, atol=1e-5)


def test_nothing_else_changes() -> None:
    model = tiny_model("mixtral")
    inputs = tiny_inputs(model)
    runs = []
    for outputs in (False, True):
        with observe(model, outputs=outputs, pairs=True) as stats:
            logits = run(model, inputs)
        runs.append((logits, [stats[name].tensors() for name in stats.layers]))
    (bare, without), (whole, both) = runs
    assert torch.equal(bare, whole)
    for few, many in zip(without, both, strict=True):
        assert many.keys() - few.keys() == {"output_sums", "channel_sums"}
        assert all(torch.equal(few[field], many[field]) for field in few)
