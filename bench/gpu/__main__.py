"""`python -m bench.gpu`: the stages of `make gpu`, a table, a JSON file, and an exit code."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.gpu import stages, table
from bench.gpu.stages import Stage

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
TEST_PROCESSES, TEST_SECONDS = 8, 90.0
# Nothing is fetched, and every process finds what the warm-up has compiled.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
MANY = ENVIRONMENT | {"OMP_NUM_THREADS": "2"}  # of the stages with many processes
QWEN = "qwen3-30b-a3b"
BACKENDS = ("reap:triton", "reap:cuda", "reap:cuda_sm90")
FAST = ("grouped_mm", "bmm", "liger", "deepgemm", "sonicmoe")
SLOW = ("eager", "batched_mm", "hooks", "observer")  # at few sizes: a loop over experts, or worse


def _that_work(command: list[str], before: dict[str, dict[str, Any]]) -> list[str]:
    """The command without backends whose small calls went wrong: one that ends its process would
    take the times of all others with it."""
    broken = [
        f"reap:{name.removeprefix('small ')}"
        for name, outcome in before.items()
        if name.startswith("small ") and outcome["state"] != stages.OK
    ]
    if "--impls" not in command:
        return command
    at = command.index("--impls") + 1
    impls = [x for x in command[at].split(",") if x.partition("+")[0] not in broken]
    return [*command[:at], ",".join(impls), *command[at + 1 :]]


def plan(out: Path, device: str, *, smoke: bool = False) -> list[Stage]:
    """All stages, the more important ones first. Benches have the machine for themselves; only
    compilers run side by side."""
    python = [sys.executable, "-m"]

    def bench(name: str, suites: str, limit: float, *options: str) -> Stage:
        folder = out / name
        command = [*python, "bench", *suites.split(), "--device", device, "--out", str(folder)]
        command += ["--smoke"] if smoke else ["--dtype", "bf16", *options]
        result = folder / "rows.jsonl"
        return Stage(name, partial(_that_work, command), limit, result, ("facts",), ENVIRONMENT)

    def own(name: str, limit: float, *options: str, needs: tuple[str, ...] = ("facts",)) -> Stage:
        result = out / f"{name}.json"
        command = [*python, f"bench.gpu.{name}", *options]
        return Stage(name, command, limit, result, needs, MANY, beside=name == "build")

    def small(backend: str) -> Stage:
        command = [*python, "bench.gpu.small", backend]
        beside = f"reap:{backend}" != BACKENDS[-1]
        return Stage(f"small {backend}", command, 90, None, ("facts",), MANY, beside=beside)

    tests = [str(out / "tests.json"), str(TEST_SECONDS - 5), str(TEST_PROCESSES)]
    short = ("--quick", "--rounds", "5", "--seconds", "0.3")
    layer = (*short, "--shapes", QWEN, "--tokens")
    large = ("--shapes", f"{QWEN},deepseek-v3,mixtral-8x7b,gpt-oss-120b-own", "--tokens", "16384")
    modes = [f"{name}{mode}" for name in BACKENDS for mode in ("", "+det")]
    modes += [f"{BACKENDS[-1]}+{form}" for form in ("cooperative", "pingpong", "swapped")]
    fast = ("--impls", ",".join((*modes, *FAST)))
    slow = ("--impls", ",".join((*BACKENDS, *SLOW)))
    whole = ("--impls", ",".join((*BACKENDS, "grouped_mm without head")))
    on_gpu = [own("warm", 100, device, str(out / "warm.json"))]
    on_gpu += [small(name.removeprefix("reap:")) for name in BACKENDS]
    on_gpu += [own("tests", TEST_SECONDS, *tests)]
    made = [
        own("facts", 30, device, str(out / "facts.json"), needs=()),
        own("build", 100, device, str(out / "build.json")),
        *on_gpu,
        own("streamed", 60, device, str(out / "streamed.json"), *["smoke"] * smoke),
        bench("layer", "layer stats", 80, *layer, "1,64,1024,4096", *fast),
        bench("calibrate", "calibrate", 80, "--rounds", "2", *whole),
        bench("large", "layer", 100, *short, *large, *fast, "--routing", "uniform,even"),
        bench("norms", "norms", 25, *layer, "16384,1024"),
        bench("observers", "layer", 40, *layer, "64,1024", *slow),
    ]
    return made if device == "cuda" else [stage for stage in made if stage not in on_gpu]


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to see that it runs")] = "cuda",
    out: Annotated[Path, typer.Option(help="folder of logs and results")] = Path("out/gpu"),
    seconds: Annotated[float, typer.Option(help="in all")] = 360.0,
    only: Annotated[str | None, typer.Option(help="stages, by comma; facts always")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="tiny shapes, no figures")] = False,
) -> None:
    """Build, test and time everything on the GPU of this machine."""
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"--device {device!r}: it must be cuda or cpu")
    folder = out / time.strftime("%Y%m%d-%H%M%S")
    chosen = plan(folder, device, smoke=smoke)
    if only is not None:
        names = [stage.name for stage in chosen]
        for name in only.split(","):
            if name not in names:
                raise typer.BadParameter(f"--only {name!r}: it must be one of {', '.join(names)}")
        wanted = {"facts", *only.split(",")}
        # Without the build among them, what has been built before has to do.
        chosen = [_alone(stage, wanted) for stage in chosen if stage.name in wanted]
    folder.mkdir(parents=True)
    report = stages.Report(folder / "gpu.json")
    report.content["command"] = sys.argv
    report.content["device"] = device
    start = time.monotonic()
    wrong = stages.run(chosen, report, folder / "logs", seconds=seconds)
    report.content["seconds"] = round(time.monotonic() - start, 1)
    report.content["wrong"] = wrong
    report.write()
    table.show(report.content)
    print(f"wrote {os.path.relpath(report.path)}")
    sys.exit(1 if wrong else 0)


def _alone(stage: Stage, wanted: set[str]) -> Stage:
    return replace(stage, needs=tuple(name for name in stage.needs if name in wanted))


if __name__ == "__main__":
    app()
