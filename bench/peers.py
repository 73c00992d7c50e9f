"""What others run today, written from the description of what they compute.

eager, grouped_mm   transformers' own experts: the layer alone, no saliency; on a GPU also what else
                    it has registered (OTHERS)
liger               Liger's fused kernels, where liger_kernel is installed: the layer alone
bmm                 no layer but a roof: both products of as many FLOPs by batched cuBLAS
hooks               a module per expert, a hook on each, its sums in Python (as llm-compressor does)
observer            every expert on every token in one fp32 [E, T, H], on top of the eager layer
                    (as the observer of the paper's authors does)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts


def transformers_experts(gate_up_proj: Tensor, down_proj: Tensor, implementation: str) -> nn.Module:
    """Qwen3-MoE's experts around these weights ([E,2I,H], [E,H,I]): `eager` or `grouped_mm`."""
    E, H, I = down_proj.shape  # noqa: E741
    config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=I)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(gate_up_proj, requires_grad=False)
    module.down_proj = nn.Parameter(down_proj, requires_grad=False)
    return module.eval()


def others() -> list[str]:
    """What the installed transformers has registered beside eager and grouped_mm."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return [name for name in ALL_EXPERTS_FUNCTIONS.keys() if name not in ("grouped_mm", "reap")]


class Liger(nn.Module):
    """The forward of Liger's fused mixture of experts; ImportError where it is not installed."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        super().__init__()
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        self.apply_, self.weights = LigerFusedMoEFunction.apply, (gate_up_proj, down_proj)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return self.apply_(x, *self.weights, ids.to(torch.int32), gates)


class Bmm(nn.Module):
    """Both products of a layer with S/E rows per expert, and nothing else: no routing, gather,
    activation, norms or combine."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        super().__init__()
        self.up, self.down = gate_up_proj.mT, down_proj.mT
        self.rows: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        E, H, _ = self.up.shape
        each = ids.numel() // E
        if self.rows is None or self.rows[0].shape[1] != each:
            made = (x.new_empty(E, each, width) for width in (H, self.down.shape[1]))
            self.rows = (next(made).normal_(), next(made).normal_())
        torch.bmm(self.rows[0], self.up)
        return torch.bmm(self.rows[1], self.down)


class _Expert(nn.Module):
    """One expert as a module of its own, on views of the stacked weights."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate, self.up, self.down = (_linear(weight) for weight in (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:  # [n, H] -> [n, H]
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _take_norms(norms: dict[int, Tensor], index: int) -> Any:
    """A hook that does not hold the model: gigabytes in a cycle would wait for a collector that
    counts objects."""

    def take(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        norms[index] = output.float().norm(dim=-1)

    return take


class Hooks(nn.Module):
    """Experts in a loop; a forward hook per expert takes the norms of its routed tokens."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        super().__init__()
        pairs = zip(gate_up_proj, down_proj, strict=True)
        self.experts = nn.ModuleList(_Expert(gate_up, down) for gate_up, down in pairs)
        self.count = [0] * len(self.experts)
        self.weighted_sum = [0.0] * len(self.experts)
        self._norms: dict[int, Tensor] = {}
        for index, expert in enumerate(self.experts):
            expert.register_forward_hook(_take_norms(self._norms, index))

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, k = torch.where(ids == index)
            if len(token) == 0:
                continue
            gate = gates[token, k]
            y = expert(x[token])
            out.index_add_(0, token, (y * gate[:, None]).to(x.dtype))
            weighted = gate.double() * self._norms.pop(index).double()
            self.weighted_sum[index] += weighted.sum().item()
            self.count[index] += len(token)
        return out


class Observer(nn.Module):
    """The eager layer, and every expert's output for every token beside it."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        super().__init__()
        self.layer = transformers_experts(gate_up_proj, down_proj, "eager")
        self.count = torch.zeros(len(down_proj), dtype=torch.int64)
        self.weighted_sum = torch.zeros_like(down_proj[:, 0, 0], dtype=torch.float64)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        up, down = self.layer.gate_up_proj, self.layer.down_proj
        outputs = x.new_zeros((len(down), *x.shape), dtype=torch.float32)  # [E, T, H]
        for index in range(len(down)):
            gate, linear = F.linear(x, up[index]).chunk(2, dim=-1)
            outputs[index] = F.linear(F.silu(gate) * linear, down[index])
        for index in range(len(down)):
            token, k = torch.where(ids == index)
            norms = outputs[index, token].norm(dim=-1)
            self.weighted_sum[index] += (gates[token, k].double() * norms.double()).sum()
            self.count[index] += len(token)
        return self.layer(x, ids, gates)

    @staticmethod
    def bytes_needed(E: int, T: int, H: int) -> int:
        return 4 * E * T * H
