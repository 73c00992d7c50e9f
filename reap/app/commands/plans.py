"""`reap plan`: which experts stay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.app.arguments import (
    CutOptions,
    Domains,
    Json,
    Overwrite,
    Stats,
    grouped,
    load_statistics,
)
from reap.app.console import as_flags, print_json, reports_errors
from reap.files.outputs import PLAN, check_file
from reap.files.units import counted, spanned

if TYPE_CHECKING:
    from reap.planning.plan import Plan
    from reap.statistics.stats import Statistics

SURE = 2.0  # standard errors between the weakest expert kept and the strongest dropped


@reports_errors
@grouped
def plan(
    stats: Stats,
    out: Annotated[Path, typer.Option(help="the plan file to write")],
    cut: CutOptions,
    domain: Domains = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Choose which experts stay in every layer."""
    check_file(out, PLAN, overwrite=overwrite, inputs=[stats])
    loaded = load_statistics(stats, domain)
    saved = save_plan(make(loaded, cut), loaded, out, overwrite)
    if json:
        print_json(saved)
    else:
        tell_plan(saved)


def make(stats: Statistics, cut: CutOptions) -> Plan:
    """The plan that the options ask for."""
    from reap.planning.plan import make_plan

    return make_plan(
        stats,
        cut.criterion,
        **cut.size,
        **cut.across,
        protect_super_experts=cut.protect_super_experts,
        seed=cut.seed,
    )


def save_plan(made: Plan, stats: Statistics, out: Path, overwrite: bool) -> dict[str, Any]:
    """Write a plan of these statistics; how many experts it keeps, and how sure it is of them."""
    from reap.planning.criteria import cut_confidence, under_sampled

    made.save(out, overwrite=overwrite)
    return {
        "out": str(out),
        "total": sum(map(len, made.kept.values())),
        "kept": {layer: len(experts) for layer, experts in made.kept.items()},
        "confidence": cut_confidence(stats, made.kept, made.criterion),
        "under_sampled": under_sampled(stats),
        "notes": [as_flags(note) for note in made.notes],
    }


def tell_plan(saved: dict[str, Any]) -> None:
    """Of what `save_plan` returns."""
    kept, few = saved["kept"], saved["under_sampled"]
    typer.echo(
        f"{saved['out']}: keeps {spanned(kept.values(), 'expert')} in each of "
        f"{counted(len(kept), 'layer')}, "
        f"{saved['total']:,} in all"
    )
    unsure = [layer for layer, gap in saved["confidence"].items() if abs(gap) < SURE]
    if unsure:
        typer.echo(
            f"note: in {len(unsure)} of {len(kept)} layers the weakest expert kept and the "
            f"strongest dropped are within {SURE:g} standard errors: more text may swap them"
        )
    if few:
        typer.echo(
            f"note: {counted(sum(map(len, few.values())), 'expert')} in "
            f"{counted(len(few), 'layer')} saw too few tokens to be judged: calibrate on more text"
        )
    for note in saved["notes"]:
        typer.echo(f"note: {note}")
