"""The `reap` command: calibrate -> score -> plan -> prune -> evaluate, thin calls of the API."""

from __future__ import annotations

import io
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap import __version__, console
from reap.console import print_json, print_table, progress, reports_errors
from reap.errors import ReapError

if TYPE_CHECKING:
    import torch

    from reap.data import Batches
    from reap.sources import Source
    from reap.stats import Statistics

SURE = 2.0  # standard errors between the weakest expert kept and the strongest dropped

app = typer.Typer(
    help="Expert saliency of mixture-of-experts language models, and pruning by it.",
    no_args_is_help=True,
    add_completion=False,
    # rich would triple the time of `--help`, and a traceback is for --debug.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a model folder or a hub id")]
Stats = Annotated[Path, typer.Argument(metavar="STATS", help="a statistics file")]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="SPEC[=WEIGHT]",
        help="a .txt or .jsonl file, a folder or glob of sources, stdlib:code, stdlib:prose, "
        "hf:org/name; repeat for a mix",
    ),
]
Domains = Annotated[list[str] | None, typer.Option("--domain", help="only this; repeat for more")]
Domain = Annotated[str | None, typer.Option(help="one name for all of this data")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="stop after this many tokens")]
SeqLen = Annotated[
    int | None, typer.Option(min=2, help="tokens per row; 2048, or the model's limit if lower")
]
BatchSize = Annotated[int, typer.Option(min=1, help="rows per forward pass")]
Pack = Annotated[bool, typer.Option("--pack/--no-pack", help="full rows, or a sample per row")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda:1, or a device map such as balanced")]
Backend = Annotated[str, typer.Option(help="auto, or a name that `reap doctor` lists")]
Criterion = Annotated[str, typer.Option(help="reap, frequency, ean, ...; see `reap score --help`")]
Seed = Annotated[int, typer.Option(help="for the criterion `random`")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing output")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]


@app.callback(invoke_without_command=True)
def main(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    console.debug = debug
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where it is not UTF-8
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
@reports_errors
def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="the statistics file to write")],
    max_tokens: MaxTokens = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = 1,
    domain: Domain = None,
    pack: Pack = True,
    gates: Annotated[str, typer.Option(help="applied or renormalized")] = "applied",
    pairs: Annotated[bool, typer.Option("--pairs", help="also record pair matrices")] = False,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run MODEL over calibration text and write the statistics of every expert."""
    _refuse_existing(out, overwrite)
    from reap.calibrate import calibrate as run
    from reap.layerstats import check_gates
    from reap.load import load_model, resolve_model
    from reap.models import describe_folder
    from reap.observe import check_backend
    from reap.sources import parse_spec

    check_gates(gates)
    check_backend(backend)
    sources = [parse_spec(spec) for spec in data]  # before a model is downloaded
    folder = resolve_model(model)
    describe_folder(folder)  # a model without experts is refused before its weights are loaded
    options = {"batch_size": batch_size, "max_tokens": max_tokens, "packing": pack}
    rows = _rows(folder, sources, seq_len, domain=domain, **options)
    loaded = load_model(folder, dtype=dtype, device=device)
    with progress("calibrating", lambda: rows.expected, "tokens") as advance:
        stats = run(loaded, rows, gates=gates, pairs=pairs, backend=backend, progress=advance)
    _save(stats, out, overwrite, json)


@app.command()
@reports_errors
def score(
    stats: Stats,
    criterion: Criterion = "reap",
    domain: Domains = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Print the score of every expert.

    Criteria: reap, frequency, ean, ean_mean, weighted_ean, gate_mass, reap_l2, peak, random.
    """
    from reap.saliency import saliency, standard_errors

    loaded = _statistics(stats, domain)
    scores = saliency(loaded, criterion, seed=seed)
    errors = standard_errors(loaded, criterion)
    if json:
        layers = {
            layer: {
                "scores": scores[layer].tolist(),
                "standard_errors": errors[layer].tolist(),
                "counts": loaded[layer].count.tolist(),
            }
            for layer in scores
        }
        print_json({"criterion": criterion, "tokens": loaded.tokens, "layers": layers})
        return
    rows = [[layer, *_ranked(values, errors[layer])] for layer, values in scores.items()]
    print_table(
        f"{criterion}, {loaded.tokens:,} tokens (expert: score ± standard error)",
        ["layer", "weakest", "second", "third", "median", "strongest"],
        rows,
    )


@app.command()
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
    _refuse_existing(out, overwrite)
    from reap.plan import make_plan
    from reap.saliency import cut_confidence, under_sampled

    loaded = _statistics(stats, domain)
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
                "notes": made.notes,
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
    for note in made.notes:
        typer.echo(f"note: {note}")


@app.command()
@reports_errors
def prune(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to write")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write MODEL without the experts that PLAN drops, straight from its files."""
    _refuse_existing(out, overwrite, folder=True)
    from reap.checkpoint import prune as run
    from reap.checkpoint import pruned_size
    from reap.load import resolve_model
    from reap.plan import Plan

    chosen = Plan.load(plan)
    folder = resolve_model(model)
    command = shlex.join(["reap", *sys.argv[1:]])
    size = pruned_size(folder, chosen)
    with progress("pruning", lambda: size, "bytes") as advance:
        report = run(folder, chosen, out, overwrite=overwrite, command=command, progress=advance)
    if json:
        print_json(report.to_json())
        return
    typer.echo(str(report))


@app.command()
@reports_errors
def combine(
    stats: Annotated[list[Path], typer.Argument(metavar="STATS...", help="files of one model")],
    out: Annotated[Path, typer.Option(help="the statistics file to write")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Add statistics of several runs, shards or domains of one model, exactly."""
    _refuse_existing(out, overwrite)
    from reap.stats import Statistics

    total = Statistics.load(stats[0])
    for path in stats[1:]:
        total = total + Statistics.load(path)
    _save(total, out, overwrite, json)


@app.command()
@reports_errors
def evaluate(
    model: Model,
    data: Data,
    teacher: Annotated[str | None, typer.Option(help="a model to compare with")] = None,
    max_tokens: MaxTokens = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = 1,
    domain: Domain = None,
    pack: Pack = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure loss and perplexity, and with --teacher KL divergence and top-1 agreement."""
    from reap.evaluate import evaluate as run
    from reap.load import load_model, resolve_model
    from reap.sources import parse_spec

    sources = [parse_spec(spec) for spec in data]
    folder = resolve_model(model)
    original = resolve_model(teacher) if teacher else None
    options = {"batch_size": batch_size, "max_tokens": max_tokens, "packing": pack}
    rows = _rows(folder, sources, seq_len, domain=domain, **options)
    student = load_model(folder, dtype=dtype, device=device)
    reference = load_model(original, dtype=dtype, device=device) if original else None
    with progress("evaluating", lambda: rows.expected, "tokens") as advance:
        results = run(student, rows, teacher=reference, progress=advance)
    if json:
        print_json({name: result.to_json() for name, result in results.items()})
        return
    columns = ["domain", "tokens", "loss (nats/token)", "perplexity"]
    table = [
        [name, f"{r.tokens:,}", f"{r.loss:.4f}", f"{r.perplexity:.3f}"]
        for name, r in results.items()
    ]
    if reference is not None:
        columns += ["KL (nats/token)", "top-1 agreement"]
        for row, r in zip(table, results.values(), strict=True):
            row += [f"{r.kl:.4f}", f"{r.agreement:.1%}"]
    print_table(str(folder), columns, table)


@app.command()
@reports_errors
def doctor(json: Json = False) -> None:
    """Say what this machine offers: versions, devices, and each backend or why it is missing."""
    from reap.doctor import diagnose

    found = diagnose()
    if json:
        print_json(found.to_json())
        return
    for package, number in found.versions.items():
        typer.echo(f"{package:15}{number or 'not installed'}")
    memory = f"{found.memory / 2**30:.0f} GiB"
    typer.echo(f"processor      {found.processor}, {found.threads} threads, {memory}")
    typer.echo(f"GPU            {', '.join(found.devices) or 'none'}")
    for name, reason in found.backends.items():
        state = "available" if reason is None else f"not available: {reason}"
        caveat = f" ({found.caveats[name]})" if name in found.caveats else ""
        typer.echo(f"backend {name:10} {state}{caveat}")


@app.command()
@reports_errors
def demo(
    out: Annotated[Path, typer.Option(help="folder for the pruned models")] = Path("out/demo"),
    json: Json = False,
) -> None:
    """Calibrate, score, prune, reload and measure the trained model that ships with the sources."""
    from reap.demo import run

    run(out, as_json=json)


def _rows(folder: Path, data: list[Source], seq_len: int | None, **options: Any) -> Batches:
    """The text of `data` as batches for the model in `folder`; `options` are those of `batches`."""
    from reap.data import batches
    from reap.load import load_tokenizer, row_length

    tokenizer = load_tokenizer(folder)
    return batches(data, tokenizer, seq_len=row_length(folder, seq_len), **options)


def _statistics(path: Path, domains: list[str] | None) -> Statistics:
    from reap.stats import Statistics

    loaded = Statistics.load(path)
    return loaded.select(*domains) if domains else loaded


def _save(stats: Statistics, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write a statistics file and say what is in it."""
    stats.save(out, overwrite=overwrite)
    tokens, layers, domains = stats.tokens, len(stats.layers), list(stats.domains)
    if as_json:
        print_json({"out": str(out), "tokens": tokens, "layers": layers, "domains": domains})
        return
    typer.echo(
        f"{out}: {tokens:,} tokens through {layers} MoE layers, domains {', '.join(domains)}"
    )


def _refuse_existing(out: Path, overwrite: bool, *, folder: bool = False) -> None:
    """Before any work: an output that exists, or that could not be written."""
    parent = out.absolute().parent
    if os.path.lexists(out) and not overwrite:
        raise ReapError(f"{out} exists: give --overwrite to replace it")
    if not parent.is_dir():
        raise ReapError(f"{parent} does not exist: create the folder first")
    if out.is_dir() and not folder:
        raise ReapError(f"{out} is a folder: name a file")
    try:
        tempfile.NamedTemporaryFile(prefix=f".{out.name}.", suffix=".part", dir=parent).close()
    except OSError as error:
        raise ReapError(f"cannot write {out}: {error.strerror}") from None


def _ranked(scores: torch.Tensor, errors: torch.Tensor) -> list[str]:
    order = scores.argsort(stable=True).tolist()
    fill = [order[-1]] * (3 - len(order))  # of a layer with fewer experts than columns
    picks = [*order[:3], *fill, order[len(order) // 2], order[-1]]
    shown = ["" if error != error else f" ± {error:.2g}" for error in errors.tolist()]
    return [f"{expert}: {scores[expert]:.4g}{shown[expert]}" for expert in picks]


def _span(counts: Any) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
