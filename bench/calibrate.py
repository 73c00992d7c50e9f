"""A whole model: our calibration against forwards without saliency and against other observers.

The model has the layers of Qwen3-30B-A3B and random weights, a few of its 48 layers, and as many of
its 151,936 tokens of vocabulary per layer, so that the head weighs what it weighs in the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import reap
from bench import gate, inputs, memory, peers, theirs
from bench.layer import backends_here
from bench.measure import TORCH, Settings, interleave, rows
from bench.row import Row
from bench.shapes import REAL, TINY, Shape
from reap.text.batching import Batch

REAL_LAYERS, REAL_VOCABULARY = 48, 151_936
NO_HEAD, GROUPED_NO_HEAD = "eager without head", "grouped_mm without head"
FORWARDS = (NO_HEAD, GROUPED_NO_HEAD)  # beside those of the layer suite
# Observers sum in different orders, so that means of fp32 norms differ by a few fp32 epsilons.
LUCK = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Size:
    """`rows` rows of `length` tokens, `batch` of them per forward, through `layers` layers of
    `shape`."""

    shape: Shape
    layers: int
    length: int
    rows: int
    heads: int
    head_dim: int
    batch: int = 1

    @property
    def vocabulary(self) -> int:
        return REAL_VOCABULARY * self.layers // REAL_LAYERS

    @property
    def config(self) -> dict[str, Any]:
        """Of a Qwen3MoeConfig."""
        return {
            "hidden_size": self.shape.H,
            "moe_intermediate_size": self.shape.I,
            "num_experts": self.shape.E,
            "num_experts_per_tok": self.shape.K,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 8,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        }

    def __str__(self) -> str:
        rows = f"rows of {self.length}" if self.batch == 1 else f"{self.batch} x {self.length}"
        return f"{self.shape} L{self.layers} vocabulary {self.vocabulary}, {rows}"


def run(settings: Settings) -> Iterator[Row]:
    for dtype in settings.dtypes:
        size = fitted(dtype, settings)
        if size is None:
            settings.say(f"calibrate: skips {dtype}, one layer does not fit in memory")
            continue
        others = theirs.run(settings, size.config, dtype, size.length, size.rows)
        yield from _model(size, dtype, settings, others)


def fitted(dtype: str, settings: Settings) -> Size | None:
    """Four layers, or as many as fit beside the observer's tensor; twelve on a GPU."""
    if settings.smoke:
        return Size(TINY, layers=2, length=16, rows=4, heads=8, head_dim=8, batch=2)
    shape, length = REAL["qwen3-30b-a3b"], 2048
    if settings.device == "cuda":
        layers = min(12, int(0.5 * memory.available("cuda")) // (shape.weight_bytes(dtype)))
        batches = {"full": 10, "quick": 4}[settings.mode]
        made = Size(shape, layers, 4096, rows=8 * batches, heads=32, head_dim=128, batch=8)
        return made if layers else None
    observed = peers.Observer.bytes_needed(shape.E, length, shape.H)
    room = int(0.8 * memory.available()) - 2 * observed
    layers = min(4, room // (shape.weight_bytes(dtype) * 11 // 10))
    if layers < 1:
        return None
    rows_of = {"full": 2, "quick": 1}[settings.mode]
    return Size(shape, layers, length, rows_of, heads=32, head_dim=128)


@torch.inference_mode()
def _model(
    size: Size, dtype: str, settings: Settings, others: list[theirs.Result]
) -> Iterator[Row]:
    model = build(size, TORCH[dtype], settings.device)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocabulary, (size.rows, size.length), generator=g)
    batches = [Batch(rows, torch.ones_like(rows), "bench") for rows in ids.split(size.batch)]
    calls: dict[str, Callable[[], Any]] = {
        f"reap:{name}": partial(reap.calibrate, model, batches, backend=name)
        for name in backends_here(settings, dtype)
    }
    for implementation in ("eager", "grouped_mm"):
        calls[implementation] = partial(_forward, model, batches, implementation)
    calls[NO_HEAD] = partial(_forward, model.model, batches, "eager")
    calls[GROUPED_NO_HEAD] = partial(_forward, model.model, batches, "grouped_mm")
    for name, kind in (("hooks", peers.Hooks), ("observer", peers.Observer)):
        if settings.wants(name):
            calls[name] = partial(_replaced, model, batches, _peers(model, kind))
    calls = {name: call for name, call in calls.items() if settings.wants(name)}

    model(input_ids=ids[:1, :8].to(settings.device))  # what libraries set up is nobody's memory
    extra, found = {}, {}
    for name, call in calls.items():
        found[name], extra[name] = memory.peak_extra(call, settings.device)
    _check(found, dtype)
    samples = interleave(calls, None, settings, wall=True)
    for other in others:
        samples.ms |= other.ms
    shape = str(size)
    for row in rows("calibrate", (dtype, shape, size.rows * size.length), samples, extra=extra):
        for other in others:
            row = other.stamp(row)
        yield row


def build(size: Size, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**size.config), dtype=dtype)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter.fill_(1)
        else:
            start = 1_000_003 * index % inputs.POOL
            inputs.fill(parameter.data, parameter.shape[-1] ** -0.5, start)
    return model.eval()


def _forward(model: nn.Module, batches: list[Batch], implementation: str) -> None:
    model.set_experts_implementation(implementation)
    device = next(model.parameters()).device
    for batch in batches:  # none is padded, so that no mask is the same, as `calibrate` knows too
        model(input_ids=batch.input_ids.to(device), use_cache=False)


def _peers(model: nn.Module, kind: type) -> list[nn.Module]:
    """One peer per layer, on the model's own weights."""
    originals = [layer.mlp.experts for layer in model.model.layers]
    return [kind(experts.gate_up_proj, experts.down_proj) for experts in originals]


def _replaced(model: nn.Module, batches: list[Batch], experts: list[nn.Module]) -> list[nn.Module]:
    """A forward with `experts` in place of the layers' own; returns them with their sums."""
    blocks = [layer.mlp for layer in model.model.layers]
    originals = [block.experts for block in blocks]
    try:
        for block, module in zip(blocks, experts, strict=True):
            block.experts = module
        _forward(model, batches, "eager")
    finally:
        for block, module in zip(blocks, originals, strict=True):
            block.experts = module
    return experts


def _check(found: dict[str, Any], dtype: str) -> None:
    """All observers saw the same first layer: later ones see what rounding made of it.

    Counts are equal; mean saliencies differ by at most the model dtype's epsilon, and luck.
    """
    exact_count = exact_score = None
    for name, result in found.items():
        if result is None:
            continue
        first = result[0] if isinstance(result, list) else result[result.layers[0]]
        count, weighted = (
            torch.as_tensor(values, dtype=torch.float64).cpu()
            for values in (first.count, first.weighted_sum)
        )
        score: Tensor = weighted / count.clamp(min=1)
        if exact_count is None or exact_score is None:
            exact_count, exact_score = count, score
        tolerance = torch.finfo(TORCH[dtype]).eps + LUCK
        if not torch.equal(count, exact_count):
            raise gate.WrongResult(f"calibrate: {name} counts other slots in the first layer")
        if not torch.allclose(score, exact_score, rtol=tolerance, atol=0):
            worst = ((score - exact_score).abs() / exact_score).max().item()
            raise gate.WrongResult(f"calibrate: {name} is off by {worst:.2g} in the first layer")
