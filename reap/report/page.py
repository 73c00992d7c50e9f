"""Evidence -> one HTML page that needs nothing else, and its figures as files."""

from __future__ import annotations

import hashlib
import math
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reap.errors import ReapError
from reap.files.atomic import write_file
from reap.files.outputs import REPORT, check_file
from reap.files.paths import path_of
from reap.files.publish import staged
from reap.files.units import counted
from reap.planning.agreement import overlap
from reap.planning.criteria import extreme
from reap.planning.plan import Plan
from reap.report import style, wording
from reap.report.cochosen import cochosen
from reap.report.contents import Drawing, drawings
from reap.report.evidence import FEW, SURE, Cut, Evidence, gather
from reap.report.findings import findings
from reap.report.measured import Cost, read_costs
from reap.report.texts import runs
from reap.statistics.stats import Statistics

HERE = Path(__file__).parent


class ReportFiles(NamedTuple):
    """What was written: the page, its bytes, the names of its figures and their files."""

    path: Path
    size: int
    figures: list[str]
    files: list[Path]
    findings: list[str]


def write_report(
    stats: Statistics | str | PathLike[str],
    plans: Mapping[str, Plan | str | PathLike[str]] | Sequence[str | PathLike[str]] = (),
    path: str | PathLike[str] = "report.html",
    *,
    criterion: str = "reap",
    ratio: float | str = 0.5,
    evaluation: str | PathLike[str] | None = None,
    figures: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> ReportFiles:
    """Write a page of what statistics and plans of one model say, for people to look at.

    `plans` are files, or plans by name; without one the page shows the cut that `criterion` and
    `ratio` make. `evaluation` is a file of what `reap evaluate --json` printed or a pruned folder
    in which `reap evaluate --card` recorded it, `figures` a folder that gets every figure as SVG
    and PNG. The page and an SVG are the same bits for the same input
    and packages. ReapError for a plan of another model, for statistics of 0 tokens, where something
    is there already, and as `make_plan`.
    """
    path = path_of(path, "path", "the file to write")
    read = [each for each in (stats, evaluation) if isinstance(each, str | PathLike)]
    named = plans if isinstance(plans, Mapping) else _named(plans)
    read += [each for each in named.values() if isinstance(each, str | PathLike)]
    check_file(path, REPORT, overwrite=overwrite, inputs=read)
    folder = None if figures is None else path_of(figures, "figures", "a folder")
    if folder is not None:
        folder = check_figures(folder, overwrite=overwrite)
        if Path(os.path.realpath(path)).is_relative_to(folder):
            raise ReapError(f"{path} is or lies in {figures}, the folder of figures: name another")
    loaded = {
        name: plan if isinstance(plan, Plan) else Plan.load(plan)
        for name, plan in zip(wording.distinct(named, 40), named.values(), strict=True)
    }
    costs = [] if evaluation is None else read_costs(evaluation)
    seen = gather(Statistics.of(stats), loaded, criterion=criterion, ratio=ratio)
    text, drawn, said = _rendered(seen, costs)
    files = [] if folder is None else _save(drawn, folder, overwrite)
    content = text.encode()
    write_file(path, content, overwrite=overwrite)
    return ReportFiles(path, len(content), [one.name for one in drawn], files, said)


def check_figures(folder: Path, *, overwrite: bool = False) -> Path:
    """The folder by its real name. ReapError unless figures may take its place: that of a new one,
    or an empty one, or with `overwrite` one that holds nothing but figures of ours."""
    real = Path(os.path.realpath(folder))
    if Path.cwd().is_relative_to(real):
        raise ReapError(f"{folder} is, or holds, the folder that we are in: name another")
    if not folder.parent.is_dir():
        raise ReapError(f"{folder.absolute().parent} does not exist: create the folder first")
    if not folder.exists():
        return real
    if not folder.is_dir():
        raise ReapError(f"{folder} exists and is not a folder: choose another name")
    found = sorted(folder.iterdir())
    if found and not overwrite:
        raise ReapError(f"{folder} exists: choose another folder or pass overwrite=True")
    for one in found:
        if not _is_figure(one):
            raise ReapError(
                f"will not overwrite {folder}: {one.name} is no figure of ours: choose another "
                "folder or move it away"
            )
    return real


def _save(drawn: Sequence[Drawing], folder: Path, overwrite: bool) -> list[Path]:
    """Write the figures as all that is in `folder`, or leave it as it was."""

    def accept(stage: Path) -> None:
        check_figures(folder, overwrite=overwrite)  # again: somebody may have put something there

    try:
        with staged(folder, overwrite=folder.exists(), verify=accept) as stage:
            for one in drawn:
                style.save(one.draw, one.given, stage, one.name)
    except OSError as error:
        raise ReapError(f"cannot write {folder}: {error.strerror or error}") from error
    return sorted(folder.iterdir())


def _is_figure(path: Path) -> bool:
    if not path.is_file() or path.suffix not in (".svg", ".png"):
        return False
    with open(path, "rb") as file:
        return style.CREATOR.encode() in file.read(4096)


def _named(paths: Sequence[str | PathLike[str]]) -> dict[str, str | PathLike[str]]:
    """Files by their stem, or as they are given where two have the same. ReapError for one that
    comes twice."""
    if isinstance(paths, str | PathLike) or not isinstance(paths, Sequence):
        raise ReapError(f"plans is {paths}: give a list of files, or plans by name")
    given = [path_of(path, "plans", "files of plans") for path in paths]
    stems = [path.stem for path in given]
    found: dict[str, str | PathLike[str]] = {}
    for path in given:
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        if name in found:
            raise ReapError(f"{path} is given twice: give it once")
        found[name] = path
    return found


def _rendered(seen: Evidence, costs: Sequence[Cost]) -> tuple[str, list[Drawing], list[str]]:
    """The page, its figures and its findings."""
    together = cochosen(seen.layers, seen.first)
    read = runs(seen.stats.data)
    drawn = list(drawings(seen, together, read, costs))
    said = list(findings(seen, together, costs))
    script = (HERE / "page.js").read_text()
    sheet = (HERE / "page.css").read_text()
    for name, theme in (("LIGHT", style.LIGHT), ("DARK", style.DARK)):
        sheet = sheet.replace(f"/* {name} */", style.variables(theme))
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        {
            name: getattr(wording, name)
            for name in ("letter", "number", "plain", "ranges", "share", "signed")
        },
        counted=counted,
    )
    text = environment.get_template("page.html").render(
        format=REPORT,
        sheet=Markup(sheet),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        seen=seen,
        model=wording.plain(seen.stats.model.name),
        findings=said,
        figures={one.name: _figure(one) for one in drawn},
        layer_rows=list(_layer_rows(seen)),
        plan_overlaps=_plan_overlaps(seen.cuts),
        experts=[Markup("".join(_expert_items(seen, at))) for at in range(len(seen.layers))],
        super_experts=_super_experts(seen),
        together=together,
        runs=read,
        costs=costs,
        digest=seen.digest,
        FEW=FEW,
        SURE=SURE,
    )
    return text, drawn, said


def _figure(one: Drawing) -> dict[str, Any]:
    """What the template needs of a figure; `box` is where its first axes are, from the top left, in
    shares of its size."""
    html, figure = style.inline(one.draw, one.given, one.name, one.said)
    box = figure.axes[0].get_position()
    place = (box.x0, 1 - box.y1, box.x1, 1 - box.y0)
    return {
        "name": one.name,
        "html": Markup(html),
        "said": one.said,
        "box": " ".join(f"{value:.5f}" for value in place),
    }


def _layer_rows(seen: Evidence) -> Iterator[dict[str, Any]]:
    first = seen.first
    for at, layer in enumerate(seen.layers):
        scores, errors = first.scores[at], first.errors[at]
        routed = scores[layer.count > 0]
        relative = (errors / scores)[(layer.count > 0) & ~errors.isnan()]
        yield {
            "label": layer.label,
            "name": wording.plain(layer.info.name),
            "experts": layer.info.num_experts,
            "top_k": layer.info.top_k,
            "tokens": layer.sums.tokens,
            "lowest": float(routed.min()) if len(routed) else math.nan,
            "median": float(routed.quantile(0.5)) if len(routed) else math.nan,
            "highest": float(routed.max()) if len(routed) else math.nan,
            "error": float(relative.quantile(0.5)) if len(relative) else math.nan,
            "fewest": int(layer.count.min()),
            "few": len(seen.few[at]),
            "unrouted": len(seen.unrouted[at]),
            "cuts": [(len(cut.dropped[at]), cut.gaps[at]) for cut in seen.cuts],
        }


def _plan_overlaps(cuts: Sequence[Cut]) -> list[list[float]]:
    """Mean over layers of what each two plans drop in common."""
    return [
        [
            sum(map(overlap, one.dropped, other.dropped)) / len(one.dropped) if one.dropped else 1.0
            for other in cuts
        ]
        for one in cuts
    ]


def _expert_items(seen: Evidence, at: int) -> Iterator[str]:
    """List items of a layer's experts, of numbers and letters alone: nothing needs escaping."""
    first, layer = seen.first, seen.layers[at]
    by: dict[int, list[str]] = {}
    for place, cut in enumerate(seen.cuts):
        for expert in cut.dropped[at]:
            by.setdefault(expert, []).append(wording.letter(place))
    values = zip(
        first.scores[at].tolist(), first.errors[at].tolist(), layer.count.tolist(), strict=True
    )
    for expert, (score, error, tokens) in enumerate(values):
        shown = wording.number(score, 4)
        gone = by.get(expert, [])
        if "A" in gone:
            shown = f"<s>{shown}</s>"
        spread = "" if math.isnan(error) else f" ± {wording.number(error, 2)}"
        dropped = f"; dropped by {', '.join(gone)}" if gone else ""
        yield f"<li>{shown}{spread}, {counted(tokens, 'token')}{dropped}"


def _super_experts(seen: Evidence) -> list[tuple[str, str]]:
    labels = {layer.info.name: layer.label for layer in seen.layers}
    found = extreme({layer.info.name: layer.sums.peak.double() for layer in seen.layers})
    return [(labels[name], wording.ranges(experts)) for name, experts in found.items()]
