"""No implementation is timed before its results pass the tests' accuracy rule."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reap_kernels import Saliency

CASES = Path(__file__).resolve().parent.parent / "tests" / "cases.py"


class WrongResult(AssertionError):
    """An implementation whose results are not those of the layer: there is no time to report."""


@cache
def cases() -> ModuleType:
    """The tests' own truth and rule, by path: the folder of tests is no package."""
    spec = importlib.util.spec_from_file_location("bench_cases", CASES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Gate:
    """Three tokens of a layer with their fp64 truth: rows of a layer are independent.

    `inputs` are the arguments of moe_saliency. The truth is computed once for all results.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.T, self.shape = len(inputs["hidden_states"]), list(inputs["gate_up_proj"].shape)
        device = inputs["hidden_states"].device.type
        self.tokens = torch.tensor(sorted({0, self.T // 2, self.T - 1}), device=device)
        per_token = ("hidden_states", "top_k_index", "top_k_weights")
        sample = inputs | {key: inputs[key][self.tokens] for key in per_token}
        if device != "cpu":
            sample = chosen_experts(sample)
        exact, plain = cases().truth(sample, device), cases().plain(sample)
        self.sample = _on_cpu(sample)
        self.known = tuple(Saliency(*(x.cpu() for x in result)) for result in (exact, plain))

    def check(self, name: str, result: Saliency | Tensor) -> None:
        """`result` is what moe_saliency returns, or `out` alone for an implementation without
        norms. Raises WrongResult that says what is off, and by how much."""
        if isinstance(result, Tensor):
            exact = self.known[0]
            taken = Saliency(self._taken(result), exact.norms.float(), exact.peaks.float())
        else:
            taken = Saliency(*map(self._taken, result))
        try:
            cases().assert_accurate(taken, self.sample, self.known)
        except AssertionError as error:
            where = f"{name} at T={self.T}, gate_up_proj {self.shape}"
            raise WrongResult(f"{where}: {error}") from error

    def _taken(self, tensor: Tensor) -> Tensor:
        return tensor[self.tokens.to(tensor.device)].cpu()


def check(name: str, result: Saliency | Tensor, inputs: dict[str, Any]) -> None:
    """A gate for one result."""
    Gate(inputs).check(name, result)


def chosen_experts(sample: dict[str, Any]) -> dict[str, Any]:
    """The same layer with only the experts that its tokens chose: to fetch all from a GPU for three
    tokens would take longer than the rest."""
    experts, ids = sample["top_k_index"].unique(return_inverse=True)
    stacked = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    picked = {key: sample[key][experts] for key in stacked if sample[key] is not None}
    return sample | picked | {"top_k_index": ids}


def _on_cpu(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: x.cpu() if isinstance(x, Tensor) else x for key, x in sample.items()}
