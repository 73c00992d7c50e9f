"""Opt-in autotuning: measure every config of this GPU's family on a call, and record the fastest.

    from reap_kernels.triton import tune
    tune.measure("tuned.json", hidden_states, gate_up_proj, ..., activation="silu")   # once
    tune.use("tuned.json")                                       # in every process that wants it

A record is JSON that names the GPU and the triton it was measured with. It is used for calls of the
same dtype, layout and sizes with about as many slots per expert (the same power of two), and for
nothing else; without `use` nothing is looked up.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from reap_kernels.contract import Call, make_call
from reap_kernels.triton import configs
from reap_kernels.triton.configs import Config, Tile
from reap_kernels.triton.records import key, machine_of, read, use

__all__ = ["candidates", "measure", "use"]


def measure(path: str | Path, *tensors: Tensor, **options: Any) -> dict[str, float]:
    """Times each config on a call of moe_saliency and adds the fastest to the file at `path`.

    Takes moe_saliency's arguments, without `backend`. Returns milliseconds by config, the result of
    `repr`. ValueError if this machine cannot run the call, or if the file is another GPU's.
    """
    import triton

    from reap_kernels import triton as backend
    from reap_kernels.triton import launch

    call = make_call(*tensors, **options)
    if reason := backend.available() or backend.unsupported(call):
        raise ValueError(f"nothing to measure: {reason}")
    path, machine = Path(path), machine_of(call.hidden_states.device)
    known = read(path, machine) if path.exists() else {}
    times = {
        config: triton.testing.do_bench(lambda config=config: launch.run(call, config))
        for config in candidates(call)
    }
    best = min(times, key=lambda config: times[config])
    known[key(call)] = best
    records = {name: dataclasses.asdict(config) for name, config in known.items()}
    path.write_text(json.dumps(machine | {"configs": records}, indent=1) + "\n")
    return {repr(config): ms for config, ms in times.items()}


def candidates(call: Call) -> list[Config]:
    """Every config of the device's family that can run the call: what is shipped, and the same
    with one pipeline stage more or less."""
    device = call.hidden_states.device
    kind = configs.family(device)
    assert kind is not None
    limit, itemsize = configs.shared_limit(device, kind), call.hidden_states.element_size()
    shipped = [c.config for c in configs.CHOICES[kind] if c.bits == 8 * itemsize]
    varied = [_with_stages(config, by) for config in shipped for by in (0, -1, 1)]
    fitting = (c for c in varied if c.shared_bytes(call.gated, itemsize) <= limit)
    return list(dict.fromkeys(c for c in fitting if c.gate_up.stages > 0 and c.down.stages > 0))


def _with_stages(config: Config, by: int) -> Config:
    def change(tile: Tile) -> Tile:
        return dataclasses.replace(tile, stages=tile.stages + by)

    return Config(config.block_m, change(config.gate_up), change(config.down))
