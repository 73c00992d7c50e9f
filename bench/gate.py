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


def check(name: str, result: Saliency | Tensor, inputs: dict[str, Any]) -> None:
    """Three tokens of a result against their fp64 truth: rows of a layer are independent.

    `inputs` are the arguments of moe_saliency, `result` is what it returns, or `out` alone for an
    implementation without norms. Raises WrongResult that says what is off, and by how much.
    """
    T = inputs["hidden_states"].shape[0]
    tokens = torch.tensor(sorted({0, T // 2, T - 1}))
    per_token = ("hidden_states", "top_k_index", "top_k_weights")
    sample = inputs | {key: inputs[key][tokens] for key in per_token}
    if sample["hidden_states"].device.type != "cpu":
        sample = chosen_experts(sample)
    if isinstance(result, Tensor):
        exact = cases().truth(sample)
        result = Saliency(result[tokens].cpu(), exact.norms.float(), exact.peaks.float())
    else:
        result = Saliency(*(tensor[tokens].cpu() for tensor in result))
    try:
        cases().assert_accurate(result, sample)
    except AssertionError as error:
        shape = list(inputs["gate_up_proj"].shape)
        raise WrongResult(f"{name} at T={T}, gate_up_proj {shape}: {error}") from error


def chosen_experts(sample: dict[str, Any]) -> dict[str, Any]:
    """The same layer on the CPU, with only the experts that its tokens chose: to fetch all from a
    GPU for three tokens would take longer than the rest."""
    experts, ids = sample["top_k_index"].unique(return_inverse=True)
    stacked = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    picked = {key: sample[key][experts] for key in stacked if sample[key] is not None}
    moved = sample | picked | {"top_k_index": ids}
    return {key: x.cpu() if isinstance(x, Tensor) else x for key, x in moved.items()}
