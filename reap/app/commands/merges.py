"""`reap group`, `reap merge` and `reap decompose`: what pruning is measured against."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.app.arguments import (
    Domains,
    Json,
    LoadOptions,
    Model,
    Overwrite,
    Revision,
    Stats,
    TextOptions,
    Verify,
    grouped,
    load_statistics,
)
from reap.app.console import print_json, print_table, reports_errors
from reap.app.longruns import announce, read_on, reported, rows_of, shape_of, where
from reap.files.outputs import MERGE, check_file, check_folder
from reap.files.units import counted, sized, spanned

if TYPE_CHECKING:
    from reap.merging.decomposition import LayerErrors


@reports_errors
def group(
    stats: Stats,
    out: Annotated[Path, typer.Option(help="the merge file to write")],
    method: Annotated[
        str, typer.Option(help="hc-smoe, by mean outputs, or m-smoe, around the most frequent")
    ] = "hc-smoe",
    ratio: Annotated[float | None, typer.Option(help="share of experts to merge away")] = None,
    groups: Annotated[int | None, typer.Option(help="different experts left per layer")] = None,
    scope: Annotated[
        str, typer.Option(help="of m-smoe: layer, or global, by frequency over all layers")
    ] = "layer",
    model: Annotated[
        str | None, typer.Option(help="of m-smoe: the model, whose routers say what is alike")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of --model, where that is a hub id")
    ] = None,
    domain: Domains = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Choose which experts become one, by a published merging method.

    hc-smoe (arXiv 2410.08589) needs statistics of `reap calibrate --outputs`; m-smoe (arXiv
    2310.01334) takes the cosine between rows of the router of --model.
    """
    from reap.errors import ReapError
    from reap.files.hub import resolve_model
    from reap.merging.choosing import make_merge
    from reap.merging.routerrows import router_similarity

    check_file(out, MERGE, overwrite=overwrite, inputs=[stats, *filter(None, [model])])
    if model is not None and method != "m-smoe":
        raise ReapError("--model is of --method m-smoe: leave it out")
    if revision is not None and model is None:
        raise ReapError("--revision is of --model: give that too")
    loaded = load_statistics(stats, domain)
    alike = router_similarity(resolve_model(model, revision), loaded.model) if model else None
    made = make_merge(loaded, method, ratio=ratio, groups=groups, scope=scope, similarity=alike)
    made.save(out, overwrite=overwrite)
    sizes = [len(one.experts) for of in made.groups.values() for one in of]
    saved: dict[str, Any] = {
        "out": str(out),
        "method": made.method,
        "left": made.left,
        "largest_group": max(sizes),
        "alone": sizes.count(1),
    }
    if json:
        print_json(saved)
        return
    typer.echo(
        f"{out}: {spanned(made.left.values(), 'different expert')} in each of "
        f"{counted(len(made.left), 'layer')}, {sizes.count(1)} of {len(sizes)} as they were, "
        f"{max(sizes)} in the largest group"
    )
    if max(sizes) == 1:
        typer.echo("note: joins no experts: a model merged by it would be a copy")


@reports_errors
def merge(
    model: Model,
    groups: Annotated[Path, typer.Argument(metavar="MERGE", help="a merge file")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write")],
    revision: Revision = None,
    overwrite: Overwrite = False,
    verify: Verify = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="refuse another precision of the merge's model")
    ] = False,
    json: Json = False,
) -> None:
    """Write MODEL with the experts of each group of MERGE made equal.

    It loads wherever MODEL does, and is as large: a baseline to compare pruning with.
    """
    check_folder(out, overwrite=overwrite, inputs=[model, groups])
    from reap.files.hub import resolve_model
    from reap.merging.mergeplan import Merge
    from reap.merging.rewriting import check_merge
    from reap.merging.rewriting import merge as run

    chosen = Merge.load(groups)
    folder = resolve_model(model, revision)
    check_folder(out, overwrite=overwrite, inputs=[folder, groups])  # of a hub id, its cache
    size = check_merge(folder, chosen, out, overwrite=overwrite, strict=strict)
    how = "read back and compared" if verify else "not verified"
    announce("merging", model, f"{sized(size)} to write to {out}", how)
    with reported("merging", lambda: size, "bytes") as advance:
        report = run(
            folder,
            chosen,
            out,
            overwrite=overwrite,
            verify=verify,
            strict=strict,
            command=shlex.join(["reap", *sys.argv[1:]]),
            progress=advance,
        )
    if json:
        print_json(report.to_json())
    else:
        typer.echo(str(report))


@reports_errors
@grouped
def decompose(
    model: Model,
    text: TextOptions,
    loading: LoadOptions,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each layer to measure")] = 1024,
    pairs: Annotated[
        int, typer.Option(min=1, help="pairs per layer, those most often chosen together")
    ] = 256,
    least: Annotated[int, typer.Option(min=1, help="tokens that must have chosen a pair")] = 8,
    json: Json = False,
) -> None:
    """Measure what merging two experts costs, or pruning one.

    Pair by pair, beside the formulas that say which should be less.
    """
    from reap.files.hub import resolve_model
    from reap.merging.decomposition import decompose as run
    from reap.runs.mode import check_fits

    loading.check()
    sources = text.sources()
    folder = resolve_model(model, loading.revision)
    check_fits(folder, dtype=loading.dtype, device=loading.device)
    rows = rows_of(folder, text, sources, loading.trust_remote_code)
    announce("decomposing", model, where(folder, loading), shape_of(rows))
    read_on(rows, sources)
    loaded = loading.load(folder)
    with reported("decomposing", lambda: rows.expected, "tokens") as advance:
        found = run(loaded, rows, tokens=tokens, pairs=pairs, least=least, progress=advance)
    if json:
        print_json({name: layer.to_json() for name, layer in found.items()})
    else:
        print_table(f"{folder} (mean squared change of a layer's output)", *_table(found))
        without = [layer for layer in found.values() if not layer.pairs]
        if without:
            typer.echo(
                f"note: in {len(without)} of {len(found)} layers no pair of experts was chosen by "
                f"{least:,} of the tokens measured, {max(layer.tokens for layer in without):,} at "
                "most: give more text and --tokens, or a lower --least"
            )
    for note in rows.notes():
        typer.echo(note, err=json)


def _table(found: dict[str, LayerErrors]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, over the tokens that chose either expert of a pair."""
    columns = ["layer", "pairs", "best mix", "mean weights", "prune", "mix wins", "weights win"]
    columns += ["merge order", "prune order"]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    table = []
    for name, layer in found.items():
        about = layer.to_json()
        its = about["either"]
        numbers = [number(its[key]) for key in ("merge", "merge_weights", "prune")]
        keys = "merge_wins", "merge_weights_wins", "merge_order", "prune_order"
        shares = [share(its[key]) for key in keys]
        table.append([name, f"{about['pairs']:,}", *numbers, *shares])
    return columns, table
