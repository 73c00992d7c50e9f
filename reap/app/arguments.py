"""What several commands share: arguments, options, and groups of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from reap.errors import ReapError

if TYPE_CHECKING:
    from reap.model.info import ModelInfo
    from reap.runs.stability import Stable
    from reap.statistics.stats import Statistics
    from reap.statistics.trace import Trace
    from reap.text.sources import Source

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a model folder or a hub id")]
Stats = Annotated[Path, typer.Argument(metavar="STATS", help="a statistics file")]
Domains = Annotated[list[str] | None, typer.Option("--domain", help="only this; repeat for more")]
Criterion = Annotated[str, typer.Option(help="reap, frequency, ean, ...; see `reap score --help`")]
Seed = Annotated[int, typer.Option(help="for the criterion `random`")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing output")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="read back and compare what was written")
]
Revision = Annotated[
    str | None, typer.Option(help="branch, tag or commit of MODEL, where that is a hub id")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]


Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="SPEC[=WEIGHT]",
        help="a text, .jsonl, .json or .parquet file (also FILE:COLUMN, .gz, .zst), a folder "
        "or glob of sources, stdlib:code, stdlib:prose, hf:org/name; repeat for a mix",
    ),
]


@dataclass(frozen=True)
class TextOptions:
    """Which text is read, and as which rows."""

    data: Data
    max_tokens: Annotated[int | None, typer.Option(min=1, help="stop after this many tokens")] = (
        None
    )
    max_tokens_per_source: Annotated[
        int | None, typer.Option(min=1, help="take at most this many tokens of each --data")
    ] = None
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="tokens per row; 2048, or the model's limit if lower")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="rows per forward pass")] = 1
    domain: Annotated[str | None, typer.Option(help="one name for all of this data")] = None
    pack: Annotated[
        bool, typer.Option("--pack/--no-pack", help="full rows, or a sample per row")
    ] = True
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave out and count rows that cannot be used")
    ] = False
    count: Annotated[
        str,
        typer.Option(help="all tokens, or of chats the assistant's alone; the others still run"),
    ] = "all"
    count_after: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="count only what follows this in a sample, </think> say"),
    ] = None
    count_until: Annotated[
        str | None, typer.Option(metavar="TEXT", help="and only until behind this, every time")
    ] = None

    def sources(self) -> list[Source]:
        """What --data names; ReapError where it names nothing."""
        from reap.text.sources import parse_spec

        if self.domain == "":
            raise ReapError("--domain is empty: give a name, or leave it out")
        return [parse_spec(spec) for spec in self.data]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is found and loaded."""

    dtype: Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32")] = (
        "auto"
    )
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda:1, or a device map such as balanced")
    ] = "auto"
    revision: Revision = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="run Python code that the model's folder brings"),
    ] = False

    def check(self) -> None:
        """ReapError for what can be told before there is a model."""
        from reap.model.load import check_dtype, find_device

        check_dtype(self.dtype)
        find_device(self.device)

    def load(self, folder: Path) -> Any:
        from reap.model.load import load_model

        return load_model(
            folder,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured of experts, and by which kernels."""

    gates: Annotated[str, typer.Option(help="applied or renormalized")] = "applied"
    pairs: Annotated[bool, typer.Option("--pairs", help="also record pair matrices")] = False
    outputs: Annotated[
        bool,
        typer.Option(
            "--outputs", help="also record mean outputs of experts, and of their inner channels"
        ),
    ] = False
    coalitions: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="also record which sets of experts tokens chose, at most N a layer and domain",
        ),
    ] = 0
    logits: Annotated[
        bool,
        typer.Option("--logits", help="also record sums of products of the router's logits"),
    ] = False
    backend: Annotated[str, typer.Option(help="auto, or a name that `reap doctor` lists")] = "auto"
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="the same bits in every run, also on a GPU")
    ] = False
    mtp: Annotated[
        bool,
        typer.Option("--mtp/--no-mtp", help="also the layer for multi-token prediction, if any"),
    ] = True
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="one layer in memory at a time; by itself where the model does not fit",
        ),
    ] = None
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="like 24G; without it all that is free")
    ] = None
    wave_tokens: Annotated[
        int | None, typer.Option(min=1, help="of --stream: tokens at a time, which a kill may lose")
    ] = None

    def check(self) -> None:
        """ReapError for what can be told before there is a model."""
        from reap.errors import ReapError
        from reap.observation.patch import check_backend
        from reap.statistics.gates import check_gates
        from reap.statistics.setcounts import check_coalitions

        check_gates(self.gates)
        check_coalitions(self.coalitions)
        check_backend(self.backend)
        if self.stream is False and (self.memory_limit, self.wave_tokens) != (None, None):
            raise ReapError("--memory-limit and --wave-tokens are not for --no-stream")
        _ = self.limit

    @property
    def kinds(self) -> dict[str, Any]:
        """What is recorded beside the sums that always are, as `observe` takes it."""
        return {name: getattr(self, name) for name in ("pairs", "outputs", "coalitions", "logits")}

    @property
    def limit(self) -> int | None:
        """--memory-limit in bytes; ReapError for what is no size."""
        from reap.runs.memory import parse_size

        return None if self.memory_limit is None else parse_size(self.memory_limit)


@dataclass(frozen=True)
class TraceOptions:
    """What each token chose, in a file of its own."""

    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="also write what each of the first tokens chose"),
    ] = None
    trace_tokens: Annotated[
        int | None, typer.Option(min=1, help="of --trace: how many tokens; 65536")
    ] = None

    def check(self, out: Path, overwrite: bool, inputs: Sequence[str | Path]) -> None:
        """ReapError for a trace that cannot be written beside `out`."""
        from reap.files.outputs import TRACE, check_file

        if self.trace is None:
            if self.trace_tokens is not None:
                raise ReapError("--trace-tokens is of --trace: give that too")
            return
        check_file(self.trace, TRACE, overwrite=overwrite, inputs=inputs)
        if self.trace.absolute() == out.absolute():
            raise ReapError(f"--trace and --out are both {out}: give each a file of its own")

    def begin(self, model: ModelInfo, overwrite: bool) -> Trace | None:
        """ReapError where the disk has no room for one of `model`."""
        from reap.runs.disk import check_disk
        from reap.statistics.trace import Trace, trace_size

        if self.trace is None:
            return None
        trace = Trace(self.trace, self.trace_tokens or Trace.tokens, overwrite)
        check_disk(self.trace, trace_size(model, trace.tokens), "a trace")
        return trace


@dataclass(frozen=True)
class StopOptions:
    """When a calibration may end before its text does."""

    until_stable: Annotated[
        float | None,
        typer.Option(
            metavar="RATIO",
            help="stop when it is sure which experts this ratio drops; --max-tokens is the most",
        ),
    ] = None
    stable_criterion: Annotated[
        str | None, typer.Option(help="of --until-stable; reap, or another that has an error")
    ] = None
    stable_confidence: Annotated[
        float | None, typer.Option(help="of --until-stable, over all layers and looks; 0.95")
    ] = None
    stable_looks: Annotated[
        int | None, typer.Option(min=1, help="of --until-stable: in a row with the same experts; 2")
    ] = None
    stable_tie: Annotated[
        float | None,
        typer.Option(help="of --until-stable; scores that differ by less than this share may swap"),
    ] = None

    def until(self) -> Stable | None:
        """ReapError for what makes no sense."""
        from reap.runs.stability import Stable

        given = {
            name: value
            for name in ("criterion", "confidence", "looks", "tie")
            if (value := getattr(self, f"stable_{name}")) is not None
        }
        if self.until_stable is not None:
            return Stable(self.until_stable, **given)
        if given:
            raise ReapError(f"--stable-{next(iter(given))} is of --until-stable: give that too")
        return None


@dataclass(frozen=True)
class CutOptions:
    """Which experts stay."""

    ratio: Annotated[float | None, typer.Option(help="share of experts to drop")] = None
    keep: Annotated[int | None, typer.Option(help="experts to keep per layer")] = None
    criterion: Criterion = "reap"
    multiple_of: Annotated[int, typer.Option(min=1, help="round the kept count up")] = 1
    protect_super_experts: Annotated[
        bool, typer.Option("--protect-super-experts", help="never drop experts with extreme peaks")
    ] = False
    seed: Seed = 0
    scope: Annotated[
        str,
        typer.Option(help="layer: equally many stay in each; global: one budget for all layers"),
    ] = "layer"
    normalize: Annotated[
        str | None,
        typer.Option(help="with --scope global: compare scores of layers raw, by mean or by share"),
    ] = None
    total: Annotated[
        int | None, typer.Option(min=1, help="experts to keep in all layers, with --scope global")
    ] = None
    min_per_layer: Annotated[
        int | None, typer.Option(min=1, help="that each layer keeps, with --scope global")
    ] = None

    @property
    def size(self) -> dict[str, Any]:
        """What says how many experts stay in a layer."""
        return {"ratio": self.ratio, "keep": self.keep, "multiple_of": self.multiple_of}

    @property
    def across(self) -> dict[str, Any]:
        """What says how many stay in all layers."""
        names = ("scope", "normalize", "total", "min_per_layer")
        return {name: getattr(self, name) for name in names}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, in which a parameter of a dataclass above stands for one parameter per field."""
    groups: dict[str, Any] = {}
    parameters = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if not is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name] = parameter.annotation
        hints = get_type_hints(parameter.annotation, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(field),
                annotation=hints[field.name],
            )
            for field in fields(parameter.annotation)
        ]

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    made = field.default_factory
    return inspect.Parameter.empty if made is MISSING else made()


def load_statistics(path: Path, domains: list[str] | None) -> Statistics:
    from reap.statistics.stats import Statistics

    loaded = Statistics.load(path)
    return loaded.select(*domains) if domains else loaded
