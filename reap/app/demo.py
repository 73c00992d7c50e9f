"""The main job on real input: calibrate a trained model on code, prune it, measure what is left.

Data flow: shipped model -> Statistics -> 12 plans -> 12 pruned checkpoints -> reload, evaluate.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import typer

from reap.app.console import print_json, print_table
from reap.errors import ReapError
from reap.files.outputs import STATISTICS, check_apart, check_file, check_folder

if TYPE_CHECKING:
    from reap.statistics.stats import Statistics

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-qwen3-moe"
CALIBRATION = "stdlib:code"
HELD_OUT = {"code": "stdlib:code/heldout", "prose": "stdlib:prose/heldout"}
STATS = "stats.safetensors"
SEQ_LEN, BATCH_SIZE = 256, 16
CALIBRATION_TOKENS, EVALUATION_TOKENS = 262_144, 65_536
RATIOS = (0.25, 0.5)
SEEDS = {"reap": (0,), "frequency": (0,), "ean": (0,), "random": (0, 1, 2)}


@dataclass(frozen=True)
class Row:
    """One pruned checkpoint on one domain; `loss` and its `increase` in nats per token."""

    criterion: str
    seed: int
    ratio: float
    domain: str
    loss: float
    increase: float


def run(out: Path, *, as_json: bool = False) -> None:
    """Run it and print the table; the statistics and the last pruned models stay under `out`.

    Raises ReapError when the trained model is not there (an installation without the sources).
    """
    if not (MODEL / "config.json").is_file():
        raise ReapError(f"the demo's model is not at {MODEL}: run the demo from a source checkout")
    start = time.perf_counter()

    def say(line: str) -> None:
        typer.echo(f"{time.perf_counter() - start:6.1f} s  {line}", err=as_json)

    check_apart(out, [MODEL])
    out.mkdir(parents=True, exist_ok=True)
    check_file(out / STATS, STATISTICS, overwrite=True)
    folders = {
        (criterion, ratio, seed): out / f"{criterion}-{seed}-{ratio:.0%}"
        for criterion, seeds in SEEDS.items()
        for ratio in RATIOS
        for seed in seeds
    }
    for folder in folders.values():
        check_folder(folder, overwrite=True)
    stats = _calibrate(out, say)
    held_out = {name: list(_batches(spec, EVALUATION_TOKENS)) for name, spec in HELD_OUT.items()}
    original = _losses(MODEL, held_out)
    say("original  " + _shown(original))
    rows = []
    for ratio in RATIOS:
        for criterion, seeds in SEEDS.items():
            for seed in seeds:
                folder = folders[criterion, ratio, seed]
                _prune(stats, criterion, ratio, seed, folder)
                losses = _losses(folder, held_out)
                say(f"{folder.name}  {_shown(losses)}")
                rows += [
                    Row(criterion, seed, ratio, domain, loss, loss - original[domain])
                    for domain, loss in losses.items()
                ]
    if as_json:
        print_json({"original": original, "rows": [asdict(row) for row in rows]})
    else:
        _print(original, rows)


def _calibrate(out: Path, say: Any) -> Statistics:
    from reap.model.load import load_model
    from reap.runs.calibration import calibrate

    model = load_model(MODEL)
    start = time.perf_counter()
    stats = calibrate(model, _batches(CALIBRATION, CALIBRATION_TOKENS))
    rate = stats.tokens / (time.perf_counter() - start)
    stats.save(out / STATS, overwrite=True)
    say(f"calibrated on {stats.tokens:,} tokens of {CALIBRATION}, {rate:,.0f} tokens/s")
    return stats


def _prune(stats: Statistics, criterion: str, ratio: float, seed: int, folder: Path) -> None:
    from reap.checkpoint.pruning import prune
    from reap.planning.plan import make_plan

    prune(MODEL, make_plan(stats, criterion, ratio=ratio, seed=seed), folder, overwrite=True)


def _losses(folder: Path, held_out: dict[str, list[Any]]) -> dict[str, float]:
    from reap.model.load import load_model
    from reap.runs.evaluation import evaluate

    model = load_model(folder)
    return {name: evaluate(model, batches)["total"].loss for name, batches in held_out.items()}


def _batches(spec: str, max_tokens: int) -> Any:
    from reap.model.load import load_tokenizer
    from reap.text.batching import batches

    tokenizer = load_tokenizer(MODEL)
    return batches([spec], tokenizer, seq_len=SEQ_LEN, batch_size=BATCH_SIZE, max_tokens=max_tokens)


def _shown(losses: dict[str, float]) -> str:
    return ", ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())


def _print(original: dict[str, float], rows: list[Row]) -> None:
    columns = ["criterion", "dropped"]
    table = [["original", "0%"]]
    for domain, loss in original.items():
        columns += [f"{domain} loss", "increase"]
        table[0] += [f"{loss:.4f}", ""]
    for ratio in RATIOS:
        for criterion in SEEDS:
            line = [criterion, f"{ratio:.0%}"]
            for domain in original:
                group = [
                    row
                    for row in rows
                    if (row.criterion, row.ratio, row.domain) == (criterion, ratio, domain)
                ]
                line += [f"{mean(row.loss for row in group):.4f}", _spread(group)]
            table.append(line)
    title = (
        "Held-out loss in nats per token after calibration on code; random: mean of 3 seeds (range)"
    )
    print_table(title, columns, table)


def _spread(group: list[Row]) -> str:
    increases = sorted(row.increase for row in group)
    shown = f"{mean(increases):+.4f}"
    return shown if len(group) == 1 else f"{shown} ({increases[0]:+.4f} to {increases[-1]:+.4f})"
