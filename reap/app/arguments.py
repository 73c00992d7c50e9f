"""What several commands share: arguments and options, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.app.console import print_json
from reap.app.longruns import reported

if TYPE_CHECKING:
    from reap.statistics.stats import Statistics
    from reap.text.batching import Batches
    from reap.text.sources import Source

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a model folder or a hub id")]
Stats = Annotated[Path, typer.Argument(metavar="STATS", help="a statistics file")]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="SPEC[=WEIGHT]",
        help="a text, .jsonl, .json or .parquet file (also FILE:COLUMN, .gz, .zst), a folder or "
        "glob of sources, stdlib:code, stdlib:prose, hf:org/name; repeat for a mix",
    ),
]
Domains = Annotated[list[str] | None, typer.Option("--domain", help="only this; repeat for more")]
Domain = Annotated[str | None, typer.Option(help="one name for all of this data")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="stop after this many tokens")]
MaxTokensPerSource = Annotated[
    int | None, typer.Option(min=1, help="take at most this many tokens of each --data")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="leave out and count rows that cannot be used")
]
Count = Annotated[
    str, typer.Option(help="all tokens, or of chats the assistant's alone; the others still run")
]
CountAfter = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="count only what follows this in a sample, </think> say"),
]
CountUntil = Annotated[
    str | None, typer.Option(metavar="TEXT", help="and only until behind this, every time")
]
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
Revision = Annotated[
    str | None, typer.Option(help="branch, tag or commit of MODEL, where that is a hub id")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that the model's folder brings")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]


def rows_of(
    folder: Path,
    data: list[Source],
    seq_len: int | None,
    quiet: bool,
    trust: bool = False,
    **options: Any,
) -> Batches:
    """The text of `data` as batches for the model in `folder`; `options` are those of `batches`.

    It is read here, while no model is loaded and nothing is lost by a bad row; only of more text
    than memory should hold, and of the standard library's, which has none, not all is.
    """
    from reap.model.config import row_length
    from reap.model.load import load_tokenizer
    from reap.text.batching import batches

    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    length = row_length(folder, seq_len, trust_remote_code=trust)
    rows = batches(data, tokenizer, seq_len=length, **options)
    if any(source.kind != "stdlib" for source in data) or rows.describe()["count"]:
        with reported("reading", lambda: rows.expected, "tokens", quiet) as advance:
            if not rows.read_ahead(advance) and not quiet:
                typer.echo("reap: long text: its beginning was checked, not all of it", err=True)
    return rows


def load_statistics(path: Path, domains: list[str] | None) -> Statistics:
    from reap.statistics.stats import Statistics

    loaded = Statistics.load(path)
    return loaded.select(*domains) if domains else loaded


def save_statistics(
    stats: Statistics, out: Path, overwrite: bool, as_json: bool, notes: Sequence[str] = ()
) -> None:
    """Write a statistics file and say what is in it, and what of the text is not."""
    stats.save(out, overwrite=overwrite)
    tokens, layers, domains = stats.tokens, len(stats.layers), list(stats.domains)
    if as_json:
        printed = {"out": str(out), "tokens": tokens, "layers": layers, "domains": domains}
        print_json(printed | {"notes": list(notes)})
        return
    typer.echo(
        f"{out}: {tokens:,} tokens through {layers} MoE layers, domains {', '.join(domains)}"
    )
    for note in notes:
        typer.echo(note)
