"""Cells measured by as many processes as there are cores, each kept as soon as it is there."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from experiments.results import EXPERIMENTS, figures, page, read
from experiments.setting import Setting
from experiments.store import Store
from experiments.subject import Subject
from reap.errors import ReapError
from reap.files.atomic import write_file

Task = tuple[str, str, str]  # experiment, model, key of the cell
_subjects: dict[str, Subject] = {}  # of a worker process


def run(names: list[str], setting: Setting, out: Path, *, jobs: int, fresh: bool) -> None:
    """Measure the cells that are missing."""
    (out / "results").mkdir(parents=True, exist_ok=True)
    if fresh:
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
    missing.sort(key=lambda task: int(task[2]))  # a run that is stopped has some seeds of each
    began = time.monotonic()
    for done, (task, cell) in enumerate(cells(missing, setting, jobs), 1):
        name, model, key = task
        stores[name].add(f"{model}/{key}", cell)
        passed = time.monotonic() - began
        print(f"{passed:7.0f} s  {done}/{len(missing)}  {name} {model} {key}", flush=True)


def cells(missing: list[Task], setting: Setting, jobs: int) -> Iterator[tuple[Task, Any]]:
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
    """The figures and the page of the results that there are."""
    results = read(out / "results")
    if not results:
        raise ReapError(f"{out / 'results'} has no results: measure some")
    figures(results, out / "figures")
    write_file(out / "RESULTS.md", page(results).encode(), overwrite=True)
