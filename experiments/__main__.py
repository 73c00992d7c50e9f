"""python -m experiments: measure what is missing, then draw and write everything.

Every cell (an experiment, a model, a seed) is kept as soon as it is there, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from experiments.results import EXPERIMENTS, figures, page, read
from experiments.setting import FULL, QUICK, Setting
from experiments.store import Store
from experiments.subject import Subject
from reap.errors import ReapError
from reap.files.atomic import write_file

HERE = Path(__file__).resolve().parent
_subjects: dict[str, Subject] = {}  # of a worker process


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--out", type=Path, default=HERE, help="results, figures, RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(given)
    for name in options.names:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name!r}: choose of {', '.join(EXPERIMENTS)}")
    if options.quick and options.out == HERE:
        parser.error("--quick needs an --out of its own: it would replace the results")
    try:
        if not options.draw:
            names = options.names or list(EXPERIMENTS)
            run(names, QUICK if options.quick else FULL, options.out, options)
        write(options.out)
    except ReapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(names: list[str], setting: Setting, out: Path, options: argparse.Namespace) -> None:
    (out / "results").mkdir(parents=True, exist_ok=True)
    if options.fresh:
        for name in names:
            (out / "results" / f"{name}.json").unlink(missing_ok=True)
    stores = {name: Store(out / "results", name, setting) for name in names}
    missing = [
        (name, model, key)
        for name in names
        for key in EXPERIMENTS[name].keys(setting)
        for model in setting.models
        if f"{model}/{key}" not in stores[name].cells
    ]
    began = time.monotonic()
    for done, (task, cell) in enumerate(cells(missing, setting, options.jobs), 1):
        name, model, key = task
        stores[name].add(f"{model}/{key}", cell)
        passed = time.monotonic() - began
        print(f"{passed:7.0f} s  {done}/{len(missing)}  {name} {model} {key}", flush=True)


def cells(missing: list[tuple[str, str, str]], setting: Setting, jobs: int) -> Any:
    """(task, cell) as they are done."""
    if jobs == 1:
        for task in missing:
            yield task, measured(*task, setting)
        return
    # A fresh process per worker: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(measured, *task, setting): task for task in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def measured(name: str, model: str, key: str, setting: Setting) -> Any:
    """One cell, in whichever process."""
    if model not in _subjects or _subjects[model].setting != setting:
        _subjects[model] = Subject(model, setting)
    return EXPERIMENTS[name].cell(_subjects[model], key)


def write(out: Path) -> None:
    results = read(out / "results")
    if not results:
        raise ReapError(f"{out / 'results'} has no results: measure some")
    figures(results, out / "figures")
    write_file(out / "RESULTS.md", page(results).encode(), overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
