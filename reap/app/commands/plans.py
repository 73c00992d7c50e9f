"""`reap plan`: which experts stay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reap.app.arguments import (
    Criterion,
    Domains,
    Json,
    Overwrite,
    Seed,
    Stats,
    load_statistics,
)
from reap.app.console import as_flags, print_json, reports_errors
from reap.files.outputs import PLAN, check_file

SURE = 2.0  # standard errors between the weakest expert kept and the strongest dropped


@reports_errors
def plan(
    stats: Stats,
    out: Annotated[Path, typer.Option(help="the plan file to write")],
    ratio: Annotated[float | None, typer.Option(help="share of experts to drop")] = None,
    keep: Annotated[int | None, typer.Option(help="experts to keep per layer")] = None,
    criterion: Criterion = "reap",
    domain: Domains = None,
    multiple_of: Annotated[int, typer.Option(min=1, help="round the kept count up")] = 1,
    protect_super_experts: Annotated[
        bool, typer.Option("--protect-super-experts", help="never drop experts with extreme peaks")
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Choose which experts stay in every layer."""
    check_file(out, PLAN, overwrite=overwrite, inputs=[stats])
    from reap.planning.criteria import cut_confidence, under_sampled
    from reap.planning.plan import make_plan

    loaded = load_statistics(stats, domain)
    made = make_plan(
        loaded,
        criterion,
        ratio=ratio,
        keep=keep,
        multiple_of=multiple_of,
        protect_super_experts=protect_super_experts,
        seed=seed,
    )
    made.save(out, overwrite=overwrite)
    kept = {layer: len(experts) for layer, experts in made.kept.items()}
    confidence = cut_confidence(loaded, made.kept, criterion)
    few = under_sampled(loaded)
    if json:
        print_json(
            {
                "out": str(out),
                "kept": kept,
                "confidence": confidence,
                "under_sampled": few,
                "notes": [as_flags(note) for note in made.notes],
            }
        )
        return
    typer.echo(f"{out}: keeps {_span(kept.values())} experts in each of {len(kept)} layers")
    unsure = [layer for layer, gap in confidence.items() if abs(gap) < SURE]
    if unsure:
        typer.echo(
            f"note: in {len(unsure)} of {len(kept)} layers the weakest expert kept and the "
            f"strongest dropped are within {SURE:g} standard errors: more text may swap them"
        )
    if few:
        typer.echo(
            f"note: {sum(map(len, few.values()))} experts in {len(few)} layers saw too few tokens "
            "to be judged: calibrate on more text"
        )
    for note in map(as_flags, made.notes):
        typer.echo(f"note: {note}")


def _span(counts: Any) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
