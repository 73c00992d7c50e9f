"""README.md of a merged folder, for people; reap.json has the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reap.checkpoint.card import use_lines
from reap.checkpoint.composition import calibration_lines
from reap.files.units import counted, sized


def model_card(record: Mapping[str, Any], name: str, size: int) -> str:
    """Of the merged model called `name`, whose weights take `size` bytes."""
    layers = record["layers"]
    before = sum(layer["experts"] for layer in layers.values())
    after = sum(len(layer["groups"]) for layer in layers.values())
    tokens = record["calibration"].get("tokens")
    calibrated = counted(tokens, "token") if isinstance(tokens, int) else "see `reap.json`"
    base = record["base_model_name"]
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- moe",
        "- expert-merging",
        "---",
        "",
        f"# {name}",
        "",
        f"`{base}` with experts merged into groups by `{record['method']}`, each the mean of its",
        "experts' weights, weighted by how many calibration tokens they saw. Nothing was trained",
        "afterwards.",
        "",
        "The routers still choose among all experts, and the experts of a group are equal, so that",
        "the gates of merged experts add up. The checkpoint is therefore **as large as the",
        "original**: it is made to compare merging with pruning, not to save memory.",
        "",
        "| | |",
        "|---|---|",
        f"| method | `{record['method']}` |",
        f"| calibration | {calibrated} |",
        f"| different experts | {before:,} -> {after:,} over {counted(len(layers), 'layer')} |",
        f"| weights | {sized(size)} |",
        f"| command | `{record['command'] or 'reap.merge (Python)'}` |",
        "",
        "The groups and their weights are in `reap.json`.",
        "",
        "## Use",
        "",
        *use_lines(name),
        "",
    ]
    composition = calibration_lines(record["calibration"])
    if composition:
        lines += ["## Calibration text", "", *composition, ""]
    return "\n".join(lines)
