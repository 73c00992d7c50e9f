"""Small calls of one backend, for a sanitizer: `python -m bench.gpu.small cuda_sm90 [cuda|cpu]`.

Inputs are made on the CPU and copied, ids and gates have the dtypes that kernels take, results are
compared on the CPU: next to no kernel of torch runs. A line per case, so that a run that is cut off
shows how far it came.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import reap_kernels
from bench.gate import cases

SIZES = {"T": 20, "K": 2, "E": 3, "H": 136, "I": 72}
ODD = {"T": 9, "K": 3, "E": 4, "H": 97, "I": 35}
BACKENDS = ("cuda", "cuda_sm90", "triton")


def calls() -> list[tuple[str, dict[str, Any], bool]]:
    """Name, inputs on the CPU, deterministic: each kernel in its forms, if not in each pair."""
    table = cases()
    plain = table.Case("plain", gates=torch.float32, **SIZES)
    forms = [
        plain,
        table.replace(plain, why="interleaved, transposed, biased, sentinels", interleaved=True,
                      transposed=True, bias=True, routing="some_sentinels"),
        table.replace(plain, why="ungated", gated=False),
        table.replace(plain, why="full tiles and more", T=260, K=1, E=1),
        table.replace(plain, why="odd sizes", **ODD),
    ]  # fmt: skip
    return [
        (f"{case.why}{', deterministic' * deterministic}", table.make(case, dtype), deterministic)
        for case, dtype in zip(forms, [torch.bfloat16, torch.float16] * 3, strict=False)
        for deterministic in (False, True)
    ]


def main(backend: str, device: str = "cuda") -> int:
    if reason := reap_kernels.backends()[backend]:
        print(f"{backend} is not available: {reason}")
        return 1
    for name, inputs, deterministic in calls():
        given = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        try:
            result = reap_kernels.moe_saliency(
                **given, backend=backend, deterministic=deterministic
            )
        except ValueError as error:  # a layout that this backend leaves to others
            if "cannot run this call" not in str(error):
                raise
            print(f"left out {name}: {error}", flush=True)
            continue
        cases().assert_accurate(reap_kernels.Saliency(*(x.cpu() for x in result)), inputs)
        print(f"done {name}", flush=True)
    print("all done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
