"""RESULTS.md and the figures, from the raw JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments import calibration, merging, multidomain, noise, subspace, sweep, transfer
from experiments.reading import AGAINST, AGREES, OPEN, Data, table
from experiments.setting import MODELS
from experiments.store import load
from experiments.texts import DOMAINS
from reap.files.atomic import write_file
from reap.report.style import LIGHT, svg_of

EXPERIMENTS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (noise, sweep, calibration, transfer, multidomain, merging, subspace)
}
TITLES = {
    "noise": "Noise floor",
    "sweep": "Compression sweep",
    "calibration": "How many tokens",
    "transfer": "Calibration text and domain transfer",
    "multidomain": "One plan for several domains",
    "merging": "Pruning against merging",
    "subspace": "Functional subspace",
}
PAPER = "[arXiv 2510.13999](https://arxiv.org/abs/2510.13999)"


def read(folder: Path) -> dict[str, Data]:
    """The raw results that there are, by experiment."""
    paths = {name: folder / f"{name}.json" for name in EXPERIMENTS}
    return {name: load(path) for name, path in paths.items() if path.exists()}


def figures(results: dict[str, Data], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in results.items():
        drawn = svg_of(EXPERIMENTS[name].figure(LIGHT, data))
        write_file(folder / f"{name}.svg", drawn.encode(), overwrite=True)


def page(results: dict[str, Data]) -> str:
    """RESULTS.md."""
    setting = next(iter(results.values()))["setting"]
    lines = [
        "# Results",
        "",
        "Written by `make experiments` from `experiments/results/*.json`; no figure here is typed.",
        f"The claims are those of REAP's paper, {PAPER}. Two small models on four kinds of text",
        "rank no criteria in general: what follows says what holds for them, and how surely.",
        "",
        *_about(setting),
    ]
    for name, data in results.items():
        lines += _section(name, data)
        if name == "noise":  # what claims have to be read by
            lines += _claims(results)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, data: Data) -> list[str]:
    picture = f"![{TITLES[name]}](figures/{name}.svg)"
    return [f"## {TITLES[name]}", "", picture, "", *EXPERIMENTS[name].report(data)]


def _about(setting: dict[str, Any]) -> list[str]:
    lines = [
        f"A seed is another sample of calibration text, {setting['calibration_tokens']:,} tokens",
        f"of each of {', '.join(DOMAINS)} unless said otherwise, {setting['seeds']} seeds"
        f" ({setting['noise_seeds']} for the noise floor).",
        f"Losses are of the same {setting['evaluation_tokens']:,} held-out tokens per domain.",
        "Intervals are Student's, 95%, over seeds: they hold the luck of the calibration text, not",
        "that of the training run, of which there is one per model. `tools/train_pair.py` made",
        "both of `models/tiny-qwen3-moe`, each expert cut into two, and trained them on (losses of",
        "the bf16 weights on all held-out text, in nats per token):",
        "",
    ]
    rows = []
    for name in setting["models"]:
        record = json.loads((MODELS[name] / "training.json").read_text())
        losses = [f"{record['domains'][d]['heldout']['loss']:.2f}" for d in DOMAINS]
        size = f"{record['parameters'] / 1e6:.1f} M"
        rows.append([f"`{MODELS[name].name}`", size, f"{record['tokens'] / 1e6:.1f} M", *losses])
    head = ["model", "parameters", "trained on", *(f"loss, {d}" for d in DOMAINS)]
    return lines + table(head, rows)


def _claims(results: dict[str, Data]) -> list[str]:
    rows = [
        row
        for name, data in results.items()
        if hasattr(EXPERIMENTS[name], "claims")
        for row in EXPERIMENTS[name].claims(data)
    ]
    if not rows:
        return []
    counts = {word: sum(row[-1] == word for row in rows) for word in (AGREES, AGAINST, OPEN)}
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    return [
        "## Claims",
        "",
        "The difference of the two that a claim compares, with its interval; below zero the claim",
        f"holds here, and where the interval holds zero it is `{OPEN}`. `of`: the paper's own",
        f"claim on large models, or a question of ours. In all: {told}.",
        f"Intervals are taken one by one: of {len(rows)} comparisons of equals, about one in 20",
        "would be called different by chance.",
        "",
        *table(["claim", "of", "model", "difference", "verdict"], rows),
    ]
