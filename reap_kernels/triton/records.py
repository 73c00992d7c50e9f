"""Configs that were measured on this GPU, and the calls that they are for. `tune` makes them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from reap_kernels.contract import Call
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


def use(path: str | Path) -> None:
    """From now on, calls of this process take their configs from the file where it has one.

    ValueError if it was not measured on this GPU with this triton.
    """
    machine = machine_of(torch.device("cuda", torch.cuda.current_device()))
    _records.update(read(Path(path), machine))


def machine_of(device: torch.device) -> dict[str, str]:
    import triton

    return {"gpu": torch.cuda.get_device_name(device), "triton": triton.__version__}


def read(path: Path, machine: dict[str, str]) -> dict[str, Config]:
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
