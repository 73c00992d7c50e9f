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
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap_kernels.contract import Call, make_call
from reap_kernels.triton import configs
from reap_kernels.triton.configs import Config, Tile

_records: dict[str, Config] = {}


def key(call: Call) -> str:
    """What a record is good for."""
    rows = max(0, round(math.log2(max(1, call.T * call.K / call.E))))
    layout = f"{'gated' if call.gated else 'plain'}{'-t' if call.transposed else ''}"
    dtype = str(call.hidden_states.dtype).removeprefix("torch.")
    return f"{dtype} {layout} E{call.E} H{call.H} I{call.I} rows{1 << rows}"


def recorded(call: Call) -> Config | None:
    return _records.get(key(call)) if _records else None


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
    path, machine = Path(path), _machine(call.hidden_states.device)
    known = _read(path, machine) if path.exists() else {}
    times = {
        config: triton.testing.do_bench(lambda config=config: launch.run(call, config))
        for config in candidates(call)
    }
    best = min(times, key=lambda config: times[config])
    known[key(call)] = best
    records = {name: dataclasses.asdict(config) for name, config in known.items()}
    path.write_text(json.dumps(machine | {"configs": records}, indent=1) + "\n")
    return {repr(config): ms for config, ms in times.items()}


def use(path: str | Path) -> None:
    """From now on, calls of this process take their configs from the file where it has one.

    ValueError if it was not measured on this GPU with this triton.
    """
    machine = _machine(torch.device("cuda", torch.cuda.current_device()))
    _records.update(_read(Path(path), machine))


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


def _machine(device: torch.device) -> dict[str, str]:
    import triton

    return {"gpu": torch.cuda.get_device_name(device), "triton": triton.__version__}


def _read(path: Path, machine: dict[str, str]) -> dict[str, Config]:
    try:
        data = json.loads(path.read_text())
        found = {name: data[name] for name in machine}
        records = {name: _config(fields) for name, fields in data["configs"].items()}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a record of tuned configs: {error!r}") from error
    if found != machine:
        raise ValueError(f"{path} was measured on {found}, this is {machine}: measure it again")
    return records


def _config(fields: dict[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`; ValueError for what is no size."""
    config = Config(fields["block_m"], Tile(**fields["gate_up"]), Tile(**fields["down"]))
    sizes = [config.block_m]
    for tile in (config.gate_up, config.down):
        sizes += dataclasses.astuple(tile)
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{fields} are not positive integers")
    return config
