"""Statistics by brute force: one slot at a time, in fp64, sharing no code with the package.

with brute_force(model) as truth: model(**inputs)
truth["model.layers.0.mlp.experts"]  # a `Truth` with every field of LayerStatistics
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Truth:
    """Slots of one layer: token number, expert, gate, norm and peak, in the order of the calls."""

    num_experts: int
    tokens: int = 0
    slots: list[tuple[int, int, float, float, float]] = field(default_factory=list)
    vectors: list[tuple[Tensor | None, Tensor]] = field(default_factory=list)  # h and f(x) of each
    output_error: float = 0.0  # of the module's output against the exact one, relative, the worst

    def fields(
        self, *, renormalized: bool = False, keep: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Every field of LayerStatistics over the tokens where `keep` [tokens] bool is True."""
        E = self.num_experts
        sums = {
            name: torch.zeros(E, dtype=torch.float64)
            for name in ("gate_sum", "norm_sum", "norm_sq_sum", "weighted_sum", "weighted_sq_sum")
        }
        result: dict[str, Any] = {
            **sums,
            "count": torch.zeros(E, dtype=torch.int64),
            "peak": torch.zeros(E, dtype=torch.float64),
            "coselected": torch.zeros(E, E, dtype=torch.int64),
            "coweighted": torch.zeros(E, E, dtype=torch.float64),
        }
        every = self.vectors or [(None, None)] * len(self.slots)
        for name, vector in zip(("channel", "output"), *every[:1], strict=True):
            for prefix in ("", "gated_") if vector is not None else ():
                shape = E, len(vector)
                result[f"{prefix}{name}_sum"] = torch.zeros(shape, dtype=torch.float64)
        rows: dict[int, list[tuple[int, float]]] = {}
        totals: dict[int, float] = {}
        for token, _, gate, _, _ in self.slots:
            totals[token] = totals.get(token, 0.0) + gate
        for (token, expert, gate, norm, peak), vectors in zip(self.slots, every, strict=True):
            if expert >= E or (keep is not None and not keep[token]):
                continue
            g = gate
            if renormalized:
                g = gate / totals[token] if totals[token] else 0.0
            for name, value in zip(
                sums, (g, norm, norm**2, g * norm, (g * norm) ** 2), strict=True
            ):
                result[name][expert] += value
            for name, vector in zip(("channel", "output"), vectors, strict=True):
                if vector is not None:
                    result[f"{name}_sum"][expert] += vector
                    result[f"gated_{name}_sum"][expert] += g * vector
            result["count"][expert] += 1
            result["peak"][expert] = max(result["peak"][expert], peak)
            rows.setdefault(token, []).append((expert, g * norm))
        for row in rows.values():
            for i, a in row:
                for j, b in row:
                    result["coselected"][i, j] += 1
                    result["coweighted"][i, j] += a * b
        return result


def slot_output(module: nn.Module, x: Tensor, expert: int) -> Tensor:
    """f(x) [H] of one expert for one token x [H], in x's dtype, through the module's own gate."""
    return slot_vectors(module, x, expert)[1]


def slot_vectors(module: nn.Module, x: Tensor, expert: int) -> tuple[Tensor | None, Tensor]:
    """The same, and before it the inner activation h [I] that the down projection sees, where the
    module is on the interface."""
    cls = type(module).__name__
    if cls == "DbrxExperts":
        inner = (-1, module.ffn_hidden_size, module.hidden_size)
        w1, v1, w2 = (
            w.view(inner)[expert].to(x) for w in (module.mlp.w1, module.mlp.v1, module.mlp.w2)
        )
        return None, (module.mlp.activation_fn(w1 @ x) * (v1 @ x)) @ w2
    if cls == "LongcatFlashExperts" and expert >= module.num_routed_experts:
        return None, x
    has_gate, has_bias = getattr(module, "has_gate", True), getattr(module, "has_bias", False)
    up_name = "gate_up_proj" if has_gate else "up_proj"
    up, down = getattr(module, up_name)[expert], module.down_proj[expert]
    if getattr(module, "is_transposed", False):
        up, down = up.T, down.T
    y = up.to(x) @ x
    if has_bias:
        y = y + getattr(module, f"{up_name}_bias")[expert].to(x)
    if not has_gate:
        y = module.act_fn(y)
    elif hasattr(module, "_apply_gate"):
        y = module._apply_gate(y[None])[0].to(x)
    else:
        y = module.act_fn(y[: len(y) // 2]) * y[len(y) // 2 :]
    inner, y = y, down.to(x) @ y
    if has_bias:
        y = y + module.down_proj_bias[expert].to(x)
    if getattr(module, "has_post_expert_norm", False):
        y = copy.deepcopy(module.post_expert_norm).to(x.dtype)(y[None])[0].to(x)
    return inner, y


def count_call(
    truth: Truth,
    module: nn.Module,
    call: tuple[Tensor, ...],
    out: Tensor,
    skipped: Tensor | None = None,
) -> None:
    """Add one call of `module` with hidden states, ids and gates, which returned `out`. `skipped`:
    slots [T,K] in which the router chose no expert, whatever their id is."""
    hidden, ids, gates = call
    x = hidden.reshape(-1, hidden.shape[-1]).double()
    exact = torch.zeros_like(x)
    for t, (experts, weights) in enumerate(zip(ids.tolist(), gates.double().tolist(), strict=True)):
        for k, (expert, gate) in enumerate(zip(experts, weights, strict=True)):
            inner, y = slot_vectors(module, x[t], expert)
            exact[t] += gate * y
            slot = (truth.tokens + t, expert, gate, float(y.norm()), float(y.abs().max()))
            if skipped is None or not bool(skipped[t, k]):
                truth.slots.append(slot)
                truth.vectors.append((inner, y))
    truth.tokens += len(ids)
    error = (out.reshape(x.shape).double() - exact).norm() / exact.norm()
    truth.output_error = max(truth.output_error, float(error))


def follow_skips(model: nn.Module, name: str, skips: dict[str, Tensor]) -> Any:
    """ZAYA: its router gives "no expert" the id 0. A hook that keeps in `skips` where it is meant,
    from the router's scores in fp64; None for other routers."""
    router: Any = getattr(model.get_submodule(name.rpartition(".")[0]), "gate", None)
    if not hasattr(router, "num_router_classes"):
        return None

    def hook(_: nn.Module, args: Any, logits: Tensor) -> None:
        scores = logits.detach().double().flatten(0, -2).softmax(-1) + router.balancing_biases
        order = scores.argsort(dim=-1, descending=True)[:, : router.top_k]
        skips[name] = order == scores.shape[1] - 1

    return router.router_mlp.register_forward_hook(hook)


@contextmanager
def brute_force(model: nn.Module) -> Iterator[dict[str, Truth]]:
    """Collect a `Truth` for every module on the experts interface that the model calls."""
    truths: dict[str, Truth] = {}
    skips: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        experts = getattr(module, "num_routed_experts", getattr(module, "num_experts", None))
        if not name.endswith("experts") or not hasattr(module, "forward") or experts is None:
            continue

        def hook(
            module: nn.Module,
            args: Any,
            kwargs: Any,
            out: Tensor,
            name: str = name,
            E: int = experts,
        ) -> None:
            call = (*args, *kwargs.values())[:3]
            with torch.no_grad():
                truth = truths.setdefault(name, Truth(E))
                count_call(truth, module, call, out, skips.get(name))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
        handles.append(follow_skips(model, name, skips))
    try:
        yield truths
    finally:
        for handle in filter(None, handles):
            handle.remove()


def check(layer: Any, expected: dict[str, Tensor], *, rtol: float) -> None:
    """Counts bit-exact, everything else within `rtol` of the largest value of its field."""
    for name, value in expected.items():
        actual = getattr(layer, name)
        if actual is None:
            continue
        if value.dtype == torch.int64:
            assert torch.equal(actual, value), f"{name}: {actual} != {value}"
        else:
            error = (actual.double() - value).abs().max()
            assert error <= rtol * max(float(value.abs().max()), 1e-30), f"{name}: off by {error}"


def logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(model(**inputs)).float()


def eager_truth(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Truth]]:
    if (
        hasattr(model, "_can_set_experts_implementation")
        and model._can_set_experts_implementation()
    ):
        model.set_experts_implementation("eager")
    with brute_force(model) as truth:
        return run(model, inputs), truth
