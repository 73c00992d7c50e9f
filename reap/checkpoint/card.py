"""What a pruned folder says about itself: reap.json for programs, README.md for people."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reap import versions
from reap.checkpoint.composition import calibration_lines, ids
from reap.files.outputs import PRUNED
from reap.files.units import counted, sized
from reap.model.compat import NAME_KEY
from reap.model.uneven import counts_in

if TYPE_CHECKING:
    from reap.checkpoint.operation import Operation
    from reap.files.folder import Folder
    from reap.planning.plan import Plan

# Of the base model, and of its base and so on, where these were pruned too.
OLDER = re.compile(r"README(\.base)*\.md|reap(\.base)*\.json")


def record(
    folder: Folder,
    plan: Plan,
    operation: Operation,
    command: str | None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of reap.json: everything needed to see, check and repeat what was done.

    `layers` gives the ids that the experts had in the base model, in their new order. A base that
    was pruned itself keeps its own record beside this one as reap.base.json.
    """
    return {
        "format": PRUNED,
        "version": 1,
        "base_model": plan.model.to_json(),
        "base_model_name": base_name(folder),
        "criterion": plan.criterion,
        "seed": plan.seed,
        "options": dict(plan.options),
        "calibration": dict(plan.calibration),
        "layers": {
            layer.name: {"experts": layer.num_experts, "kept": list(plan.kept[layer.name])}
            for layer in plan.model.layers
        },
        "config_changes": list(operation.changes),
        "loaded_by": "reap" if counts_in(operation.config) else "transformers",
        "mtp_layers": list(operation.mtp.kept),
        "dropped_layers": list(operation.mtp.dropped),
        "left_out": list(folder.left_out),
        "notes": list(notes),
        "command": command,
        "versions": installed_versions(),
    }


def carried_as(name: str) -> str:
    """The name of a base model's file beside this model: its card and record stay readable, but are
    no longer this model's."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.base{dot}{suffix}" if OLDER.fullmatch(name) else name


def base_name(folder: Folder) -> str:
    """The base model's hub id where the folder or its config tells, else the folder's name."""
    name = folder.config.get(NAME_KEY)
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    cached = folder.path.parent.parent.name  # models--org--name/snapshots/<revision>
    if folder.path.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return folder.path.name


def installed_versions() -> dict[str, str]:
    others = versions.installed("torch", "transformers", "safetensors")
    found = {"reap": versions.OWN, "python": platform.python_version(), **others}
    return {name: number for name, number in found.items() if number}


def model_card(record: Mapping[str, Any], name: str, size: int) -> str:
    """README.md of the pruned model called `name`, whose weights take `size` bytes."""
    layers = record["layers"]
    before = sum(layer["experts"] for layer in layers.values())
    after = sum(len(layer["kept"]) for layer in layers.values())
    share = 1 - after / before
    base = record["base_model_name"]
    rows = [
        f"| `{n}` | {layer['experts']} | {len(layer['kept'])} | {ids(layer['kept'])} |"
        for n, layer in layers.items()
    ]
    tokens = record["calibration"].get("tokens")
    calibrated = counted(tokens, "token") if isinstance(tokens, int) else "see `reap.json`"
    dropped = record["dropped_layers"]
    lines = [
        "---",
        f"base_model: {_yaml(base)}",
        f"library_name: {'reap' if record.get('loaded_by') == 'reap' else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags:",
        "- moe",
        "- expert-pruning",
        "- reap",
        "---",
        "",
        f"# {name}",
        "",
        f"`{base}` with {_percent(share)} of its experts removed in one shot, ranked by the",
        f"criterion `{record['criterion']}` (REAP, router-weighted expert activation:",
        "arXiv 2510.13999). Nothing was trained afterwards; what is left has the original's bytes,",
        "data type and quantisation.",
        "",
        "| | |",
        "|---|---|",
        f"| criterion | `{record['criterion']}` |",
        f"| calibration | {calibrated} |",
        f"| experts | {before:,} -> {after:,} over {counted(len(layers), 'layer')} |",
        f"| weights | {sized(size)} |",
        f"| command | `{record['command'] or 'reap.prune (Python)'}` |",
        "",
        "Measure it on your own task before you rely on it: what a pruned model keeps depends on",
        "how close the calibration text is to that task.",
        "",
        "## Use",
        "",
        *use_lines(name, record.get("loaded_by") == "reap"),
        "",
    ]
    if record["mtp_layers"]:
        lines += [
            "Of the multi-token-prediction layer ("
            + ", ".join(f"`{prefix}`" for prefix in record["mtp_layers"])
            + ") as many experts were kept, by their own",
            "scores, so that speculative decoding with it goes on.",
            "",
        ]
    if dropped:
        lines += [
            "The multi-token-prediction layers ("
            + ", ".join(f"`{d}`" for d in dropped)
            + ") were left out: no",
            "statistics exist for their experts, so speculative decoding with them is off.",
            "",
        ]
    composition = calibration_lines(record["calibration"])
    if composition:
        lines += ["## Calibration text", "", *composition, ""]
    lines += ["## Experts kept", "", "By the ids that they had in the original.", ""]
    lines += ["| layer | experts | kept | which |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def use_lines(name: str, uneven: bool = False) -> list[str]:
    """How the model is loaded and served."""
    if uneven:
        return [
            "Its layers keep different numbers of experts, which `config.json` says in words of",
            "its own: transformers, vLLM and others refuse it.",
            "",
            "```python",
            "import reap  # reap-saliency",
            "from transformers import AutoTokenizer",
            "",
            f'model = reap.load_model("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            "```",
        ]
    return [
        "```python",
        "# pip install transformers accelerate",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
        "```",
        f"vllm serve {name}",
        "```",
    ]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 or not share else f"{share:.2%}"


def _yaml(text: str) -> str:
    return json.dumps(text)  # a JSON string is a YAML string
