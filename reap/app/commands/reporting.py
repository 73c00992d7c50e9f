"""`reap report` and `reap diff`: what statistics and plans say, and how two differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.app.arguments import Criterion, Json, Overwrite, Stats
from reap.app.console import print_json, print_table, reports_errors
from reap.files.units import counted, sized
from reap.model.layernames import short_names

if TYPE_CHECKING:
    from reap.planning.differences import Comparison

LONG = 48  # letters of a value in a table


@reports_errors
def report(
    stats: Stats,
    plans: Annotated[
        list[Path] | None, typer.Argument(metavar="[PLAN]...", help="plans of the same model")
    ] = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="what `reap evaluate --json` printed of the plans, or a folder that has --card"
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="also a folder with every figure as SVG and PNG")
    ] = None,
    ratio: Annotated[float, typer.Option(help="of the cut to show where no plan is given")] = 0.5,
    criterion: Criterion = "reap",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write one HTML page of what statistics and plans say.

    It needs no network, and shows scores and the cut, criteria and domains compared, how sure it
    is, pairs, the text, and what plans cost.
    """
    from reap.report.page import write_report

    written = write_report(
        stats,
        plans or [],
        out,
        criterion=criterion,
        ratio=str(ratio),
        evaluation=evaluation,
        figures=figures,
        overwrite=overwrite,
    )
    if json:
        print_json(
            {
                "out": str(written.path),
                "bytes": written.size,
                "figures": written.figures,
                "files": [str(path) for path in written.files],
                "findings": written.findings,
            }
        )
        return
    for finding in written.findings:
        typer.echo(finding)
    typer.echo(f"{written.path}: {sized(written.size)}, {counted(len(written.figures), 'figure')}")


@reports_errors
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="statistics, or a plan")],
    second: Annotated[Path, typer.Argument(metavar="B", help="another of the same kind")],
    ratio: Annotated[
        float | None,
        typer.Option(help="of statistics: the experts that this drops are compared; 0.5"),
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="of statistics: by which they are ranked; reap")
    ] = None,
    json: Json = False,
) -> None:
    """Say how two statistics differ, or two plans.

    In model, text and options, and layer by layer in the experts that one alone keeps.

    The exit code is 0 whether they differ or not; with --json, `equal_bits` and `same` tell.
    """
    from reap.planning.differences import CRITERION, RATIO, compare

    asked = None if ratio is None else str(ratio)
    found = compare(first, second, criterion=criterion, ratio=asked)
    if json:
        print_json(found.to_json())
        return
    if found.bits:
        typer.echo(f"{first} and {second} are equal bit for bit")
        return
    if found.differences:
        rows = [[one.what, _value(one.first), _value(one.second)] for one in found.differences]
        print_table(f"{found.kind} that say otherwise", ["what", "A", "B"], rows)
    else:
        typer.echo("the files differ, and say the same of model, text and options")
    for note in found.notes:
        typer.echo(f"note: {note}")
    _tell_layers(found, f"{criterion or CRITERION} at {asked or RATIO}")


def _tell_layers(found: Comparison, how: str) -> None:
    if found.same:
        sums = found.kind == "statistics"
        typer.echo("all exact sums are equal" if sums else "both keep the same experts")
        return
    if not found.layers:
        return
    from reap.report.wording import number, ranges, share

    ranked = any(one.rank_correlation is not None for one in found.layers.values())
    columns = ["layer", *(["ranks"] if ranked else []), "in common", "only A keeps", "only B keeps"]
    short = short_names(list(found.layers))
    rows = [
        [
            short[name],
            *([number(one.rank_correlation)] if ranked else []),
            share(one.overlap),
            ranges(one.first_keeps, 5) if one.first_keeps else "",
            ranges(one.second_keeps, 5) if one.second_keeps else "",
        ]
        for name, one in found.layers.items()
    ]
    title = f"experts dropped by {how}" if ranked else "experts dropped"
    print_table(title, columns, rows)
    shares = [one.overlap for one in found.layers.values()]
    typer.echo(f"{share(sum(shares) / len(shares))} of the dropped experts in common")


def _value(value: Any) -> str:
    from reap.report.wording import plain

    if value is None:
        return "not said"
    return f"{value:,}" if type(value) is int else plain(value, LONG)
