"""A roofline of the Triton kernels on GPUs: a model, not a measurement.

    python -m bench.gpu_roofline --tokens 16384 --out out/bench

FLOPs and the bytes that programs load and store follow from the tiles; a test counts them in
Triton's interpreter and finds the same numbers. What reaches memory past the L2 cache is modelled:

- programs run in waves of one per multiprocessor, in the kernels' own order; a panel of an operand
  is fetched once per wave, and not again while it is among the last panels that fill the cache;
- x and the fp32 output are fetched again for every slot unless they fit half of the cache: their
  rows come in the order of the experts, which is no order of theirs.

The floor of a layer is the time of its slower roof: needed FLOPs at the chip's dense bf16 rate, or
modelled bytes at its memory bandwidth.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.shapes import REAL, Shape
from reap_kernels.triton.configs import CHOICES, Config, Tile


@dataclass(frozen=True)
class Gpu:
    """From the makers' data sheets: dense bf16 rate, memory bandwidth, last-level cache."""

    name: str
    family: str  # of tile configs
    flops: float  # [FLOP/s]
    bandwidth: float  # [bytes/s]
    cache: float  # [bytes]
    processors: int


GPUS = (
    Gpu("A100", "sm_80", 312e12, 2.04e12, 40e6, 108),
    Gpu("H100", "sm_90", 989e12, 3.35e12, 50e6, 132),
    Gpu("H200", "sm_90", 989e12, 4.8e12, 50e6, 132),
    Gpu("B200", "sm_100", 2250e12, 8.0e12, 126e6, 148),
    Gpu("MI300X", "gfx942", 1307e12, 5.3e12, 256e6, 304),
)
LABEL = "model, not measurement"
BF16, FP32, INT32 = 2, 4, 4


@dataclass(frozen=True)
class Work:
    """One gated layer in bf16 with the slots that each expert got."""

    shape: Shape
    T: int
    counts: tuple[int, ...]  # per expert
    config: Config

    @property
    def S(self) -> int:
        return sum(self.counts)

    def row_tiles(self) -> int:
        return sum(ceil(n / self.config.block_m) for n in self.counts)

    def program_bytes(self) -> dict[tuple[str, str, str], int]:
        """(kernel, argument, direction) -> bytes that programs ask for: all but index tables.

        An operand tile is asked for by every program that multiplies it, from the L2 cache.
        """
        H, I, S, T = self.shape.H, self.shape.I, self.S, self.T  # noqa: E741
        tiles = self.row_tiles()
        up_columns = ceil(I / self.config.gate_up.block_n)
        columns = ceil(H / self.config.down.block_n)
        partials = S * columns * FP32
        return {
            ("gate_up_kernel", "hidden_states", "load"): S * H * up_columns * BF16,
            ("gate_up_kernel", "gate_up_proj", "load"): tiles * 2 * I * H * BF16,
            ("gate_up_kernel", "inner", "store"): S * I * BF16,
            ("down_kernel", "inner", "load"): S * I * columns * BF16,
            ("down_kernel", "down_proj", "load"): tiles * H * I * BF16,
            ("down_kernel", "combined", "atomic"): S * H * FP32,
            ("down_kernel", "squares", "store"): partials,
            ("down_kernel", "peaks", "store"): partials,
            ("finish_kernel", "squares", "load"): partials,
            ("finish_kernel", "partial_peaks", "load"): partials,
            ("finish_kernel", "norms", "store"): S * FP32,
            ("finish_kernel", "peaks", "store"): S * FP32,
            ("finish_kernel", "combined", "load"): T * H * FP32,
            ("finish_kernel", "out", "store"): T * H * BF16,
        }

    def minimum(self) -> int:
        """Memory bytes that no order of these two kernels avoids: x and weights once, the inner
        tensor out and in, each slot's fp32 row added to the output, its zeroing and its cast."""
        H, I, S, T = self.shape.H, self.shape.I, self.S, self.T  # noqa: E741
        weights = sum(n > 0 for n in self.counts) * 3 * H * I * BF16
        out = 2 * S * H * FP32 + T * H * (2 * FP32 + BF16)
        return weights + T * H * BF16 + 2 * S * I * BF16 + out

    def memory_bytes(self, gpu: Gpu) -> dict[str, int]:
        """Tensor -> modelled bytes between the L2 cache and memory, reads and writes."""
        H, I, S, T = self.shape.H, self.shape.I, self.S, self.T  # noqa: E741
        x = T if T * H * BF16 <= gpu.cache / 2 else S
        added = T if T * H * FP32 <= gpu.cache / 2 else S
        rows, up = self._panels(self.config.gate_up, I, 2 * H, H, gpu)
        inner, down = self._panels(self.config.down, H, I, I, gpu)
        partials = 4 * S * ceil(H / self.config.down.block_n) * FP32
        return {
            "x": max(x, rows // (H * BF16) if x == S else 0) * H * BF16,
            "gate_up_proj": up,
            "inner": S * I * BF16 + inner,
            "down_proj": down,
            "out": 2 * added * H * FP32 + T * H * (2 * FP32 + BF16),
            "norms": partials + 2 * S * FP32,
        }

    def _panels(self, tile: Tile, N: int, weight: int, depth: int, gpu: Gpu) -> tuple[int, int]:
        """Bytes of row panels and of weight panels that a grouped GEMM fetches from memory.

        weight: elements of the weights per column of the result; depth: elements of a row.
        """
        recent: OrderedDict[tuple, int] = OrderedDict()  # panel -> bytes, oldest first
        held, fetched = 0, {"rows": 0, "weights": 0}
        for wave in _waves(self._programs(tile, N), gpu.processors):
            panels: dict[tuple, int] = {}
            for expert, row_tile, rows, column in wave:
                panels["rows", expert, row_tile] = rows * depth * BF16
                width = min(tile.block_n, N - column * tile.block_n)
                panels["weights", expert, column] = width * weight * BF16
            for panel, size in panels.items():
                if panel in recent:
                    held -= recent.pop(panel)
                else:
                    fetched[panel[0]] += size
            for panel, size in panels.items():
                recent[panel] = size
                held += size
            while held > gpu.cache:
                held -= recent.popitem(last=False)[1]
        return fetched["rows"], fetched["weights"]

    def _programs(self, tile: Tile, N: int) -> Iterator[tuple[int, int, int, int]]:
        """Expert, row tile, rows and column tile of each program, in the kernels' order."""
        block = self.config.block_m
        for expert, count in enumerate(self.counts):
            tiles = ceil(count / block)
            for group in range(0, tiles, tile.group_m):
                for column in range(ceil(N / tile.block_n)):
                    for row in range(group, min(group + tile.group_m, tiles)):
                        yield expert, row, min(block, count - row * block), column


def _waves(programs: Iterator[tuple], size: int) -> Iterator[list[tuple]]:
    wave: list[tuple] = []
    for program in programs:
        wave.append(program)
        if len(wave) == size:
            yield wave
            wave = []
    if wave:
        yield wave


def large_config(gpu: Gpu, shape: Shape) -> Config:
    """What the engine runs with many aligned rows per expert."""
    choices = [c for c in CHOICES[gpu.family] if c.bits == 16 and not c.unaligned]
    return choices[-1].config.grouped((shape.H * BF16, shape.I * BF16), int(gpu.cache))


def uniform_counts(shape: Shape, T: int, seed: int = 0) -> tuple[int, ...]:
    """Slots per expert when every token picks K different experts at random."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(T, shape.E, generator=g).topk(shape.K, dim=1).indices
    return tuple(torch.bincount(ids.flatten(), minlength=shape.E).tolist())


@dataclass(frozen=True)
class Roof:
    """One layer on one GPU."""

    gpu: Gpu
    work: Work

    @property
    def compute_ms(self) -> float:
        return 1e3 * self.work.shape.flops(self.work.T) / self.gpu.flops

    @property
    def bytes(self) -> int:
        return sum(self.work.memory_bytes(self.gpu).values())

    @property
    def memory_ms(self) -> float:
        return 1e3 * self.bytes / self.gpu.bandwidth

    @property
    def floor_ms(self) -> float:
        return max(self.compute_ms, self.memory_ms)

    @property
    def full(self) -> float:
        """Part of the rows of all row tiles that holds a slot."""
        return self.work.S / (self.work.row_tiles() * self.work.config.block_m)


def roofs(shapes: tuple[Shape, ...], T: int) -> list[Roof]:
    counts = {shape: uniform_counts(shape, T) for shape in shapes}
    return [
        Roof(gpu, Work(shape, T, counts[shape], large_config(gpu, shape)))
        for shape in shapes
        for gpu in GPUS
    ]


def table(found: list[Roof], shape: Shape) -> Table:
    own = [roof for roof in found if roof.work.shape == shape]
    tensors = list(own[0].work.memory_bytes(own[0].gpu))
    title = f"{shape}, T={own[0].work.T:,}, bf16, {shape.flops(own[0].work.T) / 1e12:.2f} TFLOP"
    made = Table(title=f"{title} ({LABEL})", title_justify="left")
    made.add_column("GPU")
    for name in (*(f"{t} GB" for t in tensors), "GB", "of minimum", "tiles full"):
        made.add_column(name, justify="right")
    for name in ("compute ms", "memory ms", "floor ms", "bound by"):
        made.add_column(name, justify="right")
    for roof in own:
        moved = roof.work.memory_bytes(roof.gpu)
        made.add_row(
            roof.gpu.name,
            *(f"{moved[tensor] / 1e9:.2f}" for tensor in tensors),
            f"{roof.bytes / 1e9:.2f}",
            f"{roof.bytes / roof.work.minimum():.2f}x",
            f"{roof.full:.0%}",
            f"{roof.compute_ms:.2f}",
            f"{roof.memory_ms:.2f}",
            f"{roof.floor_ms:.2f}",
            "compute" if roof.compute_ms >= roof.memory_ms else "memory",
        )
    return made


def plot(found: list[Roof], path: Path) -> Path:
    """Attainable TFLOP/s against FLOP per modelled byte, under each chip's roofs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, gpu in enumerate(GPUS):
        own = [roof for roof in found if roof.gpu == gpu]
        color = f"C{number}"
        ridge = gpu.flops / gpu.bandwidth
        xs = [10, ridge, 1e4]
        axes.plot(xs, [min(x * gpu.bandwidth, gpu.flops) / 1e12 for x in xs], color=color)
        points = [
            (
                roof.work.shape.flops(roof.work.T) / roof.bytes,
                roof.work.shape.flops(roof.work.T) / roof.floor_ms / 1e9,
            )
            for roof in own
        ]
        intensities, rates = zip(*points, strict=True)
        axes.scatter(intensities, rates, color=color, s=18, label=gpu.name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of memory traffic")
    axes.set_ylabel("attainable TFLOP/s, bf16")
    axes.set_title(f"MoE layers at T={found[0].work.T:,} ({LABEL})")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(
    tokens: Annotated[int, typer.Option(min=1, help="T of the layer")] = 16384,
    shapes: Annotated[str, typer.Option(help="names of bench/shapes.py, by comma")] = ",".join(
        REAL
    ),
    out: Annotated[Path, typer.Option(help="folder of the plot")] = Path("out/bench"),
) -> None:
    """Print the table of every layer and draw the plot."""
    names = shapes.split(",")
    for name in names:
        if name not in REAL:
            raise typer.BadParameter(f"--shapes {name!r}: it must be one of {', '.join(REAL)}")
    chosen = tuple(REAL[name] for name in names)
    found = roofs(chosen, tokens)
    console = Console(width=200)
    for shape in chosen:
        console.print(table(found, shape))
    console.print(f"wrote {plot(found, out / 'gpu-roofline.png')}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
