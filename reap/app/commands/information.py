"""`reap info`: what a file or folder is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.app.arguments import Json
from reap.app.console import legible, print_json, reports_errors
from reap.errors import ReapError
from reap.files.kinds import kind_of
from reap.files.outputs import (
    MERGE,
    MERGED,
    PLAN,
    RECORD,
    RECORDS,
    REPORT,
    STATISTICS,
    TRACE,
    format_of,
)
from reap.files.units import sized

if TYPE_CHECKING:
    from reap.model.info import ModelInfo


@reports_errors
def info(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="statistics, a plan, a trace, a model's folder, a hub id"
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of PATH, where that is a hub id")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a file or a model is, and what is in it."""
    found = _told(path, revision)
    if json:
        print_json(found)
        return
    for name, value in found.items():
        typer.echo(f"{name.replace('_', ' '):12} {legible(_shown(name, value))}")


def _told(path: str, revision: str | None) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        return _folder(path, revision)
    if revision is not None:
        raise ReapError(f"{path} is a file here: a revision is of a hub id")
    form = format_of(file)
    if form == STATISTICS:
        return _statistics(file)
    if form == PLAN:
        return _plan(file)
    if form == TRACE:
        return _trace(file)
    if form == MERGE:
        return _merge(file)
    if form == REPORT:
        return {
            "kind": "report",
            "size": sized(file.stat().st_size),
            "show": "open it in a browser",
        }
    if form in RECORDS:
        return _folder(str(file.parent))
    kind = kind_of(file)
    if kind in ("weights of a model", "a model's config"):
        raise ReapError(f"{path} is {kind}: give its folder, {file.absolute().parent}")
    raise ReapError(f"{path} is not ours: neither statistics nor a plan, merge or trace")


def _statistics(file: Path) -> dict[str, Any]:
    from reap.planning.differences import entries
    from reap.statistics.joining import shards_said
    from reap.statistics.stats import Statistics
    from reap.text.counted import said

    stats = Statistics.load(file)
    counted = [
        f"{entry.get('counted'):,} of {entry.get('tokens'):,} tokens, {said(entry['count'])}"
        for entry in stats.data
        if entry.get("count") and type(entry.get("counted")) is type(entry.get("tokens")) is int
    ]
    shards = [named for named in map(shards_said, stats.data) if named]
    ended = [str(entry["ended"]) for entry in stats.data if "ended" in entry]
    return {
        "kind": "statistics",
        **_model(stats.model),
        "tokens": stats.tokens,
        **({"only": shards} if shards else {}),
        **({"counted": counted} if counted else {}),
        **({"ended": ended} if ended else {}),
        "domains": stats.domain_tokens,
        "gates": stats.gates,
        **stats.kinds,
        "data": [
            source.get("spec") for entry in stats.data for source in entries(entry.get("sources"))
        ],
        "versions": stats.versions,
    }


def _trace(file: Path) -> dict[str, Any]:
    from reap.statistics.trace import read_about

    model, gates, tokens = read_about(file)
    return {"kind": "trace", **_model(model), "tokens": tokens, "gates": gates}


def _plan(file: Path) -> dict[str, Any]:
    from reap.planning.plan import Plan

    plan = Plan.load(file)
    return {
        "kind": "plan",
        **_model(plan.model),
        "criterion": plan.criterion,
        "kept": sorted({len(experts) for experts in plan.kept.values()}),
        "tokens": plan.calibration.get("tokens"),
        "domains": plan.calibration.get("domains"),
        "versions": plan.calibration.get("versions"),
        "notes": list(plan.notes),
    }


def _merge(file: Path) -> dict[str, Any]:
    from reap.merging.mergeplan import Merge

    merge = Merge.load(file)
    return {
        "kind": "merge",
        **_model(merge.model),
        "method": merge.method,
        "left": sorted(set(merge.left.values())),
        "tokens": merge.calibration.get("tokens"),
        "domains": merge.calibration.get("domains"),
        "versions": merge.calibration.get("versions"),
    }


def _folder(name: str, revision: str | None = None) -> dict[str, Any]:
    from reap.files.folder import open_folder
    from reap.files.hub import resolve_model
    from reap.files.safefile import read_json
    from reap.model.identity import describe_folder, mtp_of
    from reap.model.unpacked import said_of_folder

    opened = open_folder(resolve_model(name, revision))
    ours = (opened.path / RECORD).is_file()
    record = read_json(opened.path / RECORD) if ours else {}
    merged = record.get("format") == MERGED
    kind = "merged model" if merged else "pruned model" if ours else "model"
    by = "method" if merged else "criterion"
    found: dict[str, Any] = {"kind": kind}
    try:
        found |= _model(describe_folder(opened.path, mtp=True))
    except ReapError as error:  # dense, or of a type that is not known here
        found |= {"model": opened.path.name, "experts": str(error)}
    mtp, unknown = mtp_of(opened.path)
    found["mtp"] = mtp or (f"not known how to run: {unknown}" if unknown else "none with experts")
    found["weights"] = sum(t.nbytes for shard in opened.shards for t in shard.tensors.values())
    try:
        found["quantised"] = said_of_folder(opened) or "no"
    except ReapError as error:
        found["quantised"] = str(error)
    if ours:
        calibration = record.get("calibration")
        told = calibration if isinstance(calibration, dict) else {}
        found |= {
            "base_model": record.get("base_model_name"),
            by: record.get(by),
            "loaded_by": record.get("loaded_by", "transformers"),
            "tokens": told.get("tokens"),
            "domains": told.get("domains"),
            "versions": record.get("versions"),
            "command": record.get("command"),
            **({"evaluation": record["evaluation"]} if "evaluation" in record else {}),
        }
    return found


def _model(model: ModelInfo) -> dict[str, Any]:
    return {
        "model": model.name,
        "type": model.model_type,
        "moe_layers": len(model.layers),
        "experts": sorted({layer.num_experts for layer in model.layers}),
        "top_k": sorted({layer.top_k for layer in model.layers}),
    }


def _shown(name: str, value: Any) -> str:
    if name == "weights":
        return sized(value)
    if name == "evaluation":
        from reap.checkpoint.evaluations import said

        return said(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown('', item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "unknown"
    return f"{value:,}" if type(value) is int else str(value)
