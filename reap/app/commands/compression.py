"""`reap compress`: calibrate, plan and prune as one command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reap.app.arguments import (
    CutOptions,
    Json,
    LoadOptions,
    MeasureOptions,
    Model,
    Overwrite,
    TextOptions,
    Verify,
    grouped,
)
from reap.app.commands.calibration import (
    find_model,
    measured,
    save_statistics,
    tell_statistics,
)
from reap.app.commands.plans import make, save_plan, tell_plan
from reap.app.commands.pruning import write_pruned
from reap.app.console import print_json, reports_errors
from reap.files.outputs import PLAN, STATISTICS, check_file, check_folder

if TYPE_CHECKING:
    from reap.model.info import ModelInfo

# Behind the output's name. Beside it, because what serves a model reads all weights in its folder,
# and statistics are a file of the same kind.
STATS_FILE, PLAN_FILE = ".stats.safetensors", ".plan.json"


@reports_errors
@grouped
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write")],
    text: TextOptions,
    cut: CutOptions,
    measuring: MeasureOptions,
    loading: LoadOptions,
    verify: Verify = True,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Calibrate, plan and prune in one go.

    OUT becomes MODEL without the experts that matter least for the text. Beside it are left
    OUT.stats.safetensors and OUT.plan.json, for other plans of the same statistics.
    """
    from reap.checkpoint.pruning import check_prune
    from reap.planning.budget import check_scope
    from reap.planning.counting import kept_counts
    from reap.planning.criteria import check_criterion
    from reap.planning.plan import trial_plan

    stats_file, plan_file = (out.parent / (out.name + end) for end in (STATS_FILE, PLAN_FILE))

    def check(inputs: Sequence[str | Path]) -> None:
        check_folder(out, overwrite=overwrite, inputs=inputs)
        check_file(stats_file, STATISTICS, overwrite=overwrite, inputs=inputs)
        check_file(plan_file, PLAN, overwrite=overwrite, inputs=inputs)

    check_criterion(cut.criterion)
    check_scope(cut.scope, cut.normalize, total=cut.total, min_per_layer=cut.min_per_layer)
    if cut.scope == "layer":
        kept_counts((), **cut.size)  # what is wrong with any model
    folder = find_model(model, text, measuring, loading, check)

    def accept(found: ModelInfo) -> None:
        check_prune(folder, trial_plan(found, **cut.size, **cut.across), out, overwrite=overwrite)

    # What was measured is kept until all is done: the same command goes on after any error.
    with measured(model, folder, text, measuring, loading, stats_file, accept) as (stats, notes):
        made = make(stats, cut)
        report = write_pruned(model, folder, made, out, verify=verify, overwrite=overwrite)
        saved = save_statistics(stats, stats_file, overwrite, notes)
        planned = save_plan(made, stats, plan_file, overwrite)
    if json:
        print_json({"calibrate": saved, "plan": planned, "prune": report.to_json()})
        return
    tell_statistics(saved)
    tell_plan(planned)
    typer.echo(str(report))
