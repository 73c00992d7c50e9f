"""`reap doctor` and `reap demo`: what this machine offers, and the main job on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reap.app.arguments import (
    Json,
)
from reap.app.console import print_json, reports_errors
from reap.versions import releases


@reports_errors
def doctor(json: Json = False) -> None:
    """Say what this machine offers, and why the rest is missing.

    Versions, devices and the backends of the kernels; and whether transformers and torch are as
    needed.
    """
    from reap.app.doctor import diagnose

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
    ranges = ", ".join(f"{package} {releases(package)}" for package in found.tested)
    changed = {name: what for name, what in found.seams.items() if what is not None}
    for name, what in changed.items():
        typer.echo(f"changed        {name}: {what}")
    state = f"{len(changed)} of {len(found.seams)} changed" if changed else "all as needed"
    typer.echo(f"private names  {state}; tested with {ranges}")


@reports_errors
def demo(
    out: Annotated[Path, typer.Option(help="folder for the pruned models")] = Path("out/demo"),
    json: Json = False,
) -> None:
    """Prune the small model of the source checkout, and measure it.

    It is calibrated, pruned in several ways, reloaded and measured: minutes on a CPU.
    """
    from reap.app.demo import run

    run(out, as_json=json)
