"""Runs one layer through the CPU extension alone and compares it with numpy. Needs no torch, so it
tries a wheel on any Python and, under an emulator, on another processor.

    python tools/one_layer.py FOLDER     # with reap_kernels and numpy in it

Letters: T tokens, K experts per token, E experts, H hidden size, I inner size.
"""

from __future__ import annotations

import importlib.util
import platform
import struct
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

T, K, E, H, I = 37, 2, 5, 131, 57  # noqa: E741 -- no multiple of any vector
MOST = 1e-5  # of the largest number, in fp32


class Arrays(NamedTuple):
    hidden: np.ndarray  # [T, H] fp32, like all but ids
    gate_up: np.ndarray  # [E, 2I, H]
    down: np.ndarray  # [E, H, I]
    ids: np.ndarray  # [T, K] int64
    gates: np.ndarray  # [T, K]


class Results(NamedTuple):
    out: np.ndarray  # [T, H]
    norms: np.ndarray  # [T, K], of each expert's output
    peaks: np.ndarray  # [T, K], its largest magnitude


def drawn(seed: int = 0) -> Arrays:
    """A random layer of gated experts with silu."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    ids = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    return Arrays(normal(T, H), normal(E, 2 * I, H), normal(E, H, I), ids, np.abs(normal(T, K)))


def truth(layer: Arrays) -> Results:
    """In fp64, slot by slot."""
    hidden, gate_up, down, _, gates = (each.astype(np.float64) for each in layer)
    outputs = np.empty((T, K, H))
    for t, k in np.ndindex(T, K):
        expert = layer.ids[t, k]
        gate, up = np.split(gate_up[expert] @ hidden[t], 2)
        outputs[t, k] = down[expert] @ (gate / (1 + np.exp(-gate)) * up)
    mixed = (gates[..., None] * outputs).sum(1)
    return Results(mixed, np.linalg.norm(outputs, axis=2), np.abs(outputs).max(2))


def packed(extension: Any, layer: Arrays, results: Results, threads: int) -> bytes:
    """What `reap_kernels.native.layer` makes of the same call."""

    def weights(array: np.ndarray) -> tuple[int, ...]:
        return (address(array), *(stride // 4 for stride in array.strides), 0, 0, 0)  # no bias

    fp32 = extension.dtypes["f32"]
    return struct.pack(
        "=43q3d",
        *(T, K, E, H, I, fp32, extension.activations["silu"], True, False),
        *(address(layer.hidden), H, *weights(layer.gate_up), *weights(layer.down)),
        *(address(layer.ids), True, address(layer.gates), fp32),
        *map(address, results),
        *(0, 0, 0),  # no sums
        *(threads, False, False, 0),
        *(0, 0, 0, 0),  # no GPU
        *(1.0, np.inf, 0.0),  # of other activations
    )


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def computed(extension: Any, isa: str, threads: int = 2) -> Results:
    """The layer `drawn` by one instruction set, in memory full of NaN."""
    layer = drawn()
    results = Results(*(np.full(n, np.nan, np.float32) for n in ((T, H), (T, K), (T, K))))
    extension.run_layer(packed(extension, layer, results, threads), isa)
    return results


def error(results: Results) -> float:
    """The largest against the truth, relative to the largest number; NaN where one is."""
    pairs = zip(results, truth(drawn()), strict=True)
    return float(
        np.max([np.abs(found - right).max() / np.abs(right).max() for found, right in pairs])
    )


def load(folder: Path) -> ModuleType:
    """The extension in there without its package, which imports torch."""
    spec = PathFinder.find_spec("_native", [str(folder / "reap_kernels")])
    if spec is None or spec.loader is None:
        sys.exit(f"{folder}: no extension for this Python ({platform.python_version()})")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def main(folder: Path) -> None:
    extension = load(folder)
    for isa in extension.available_isas():
        found = error(computed(extension, isa))
        about = f"Python {platform.python_version()}, {platform.machine()}, {isa}"
        if not found <= MOST:
            sys.exit(f"{about}: error {found:.1e}, more than {MOST:.0e}")
        print(f"{about}: error {found:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
