"""Tasks of lm-evaluation-harness on a model that is loaded here, masked or not."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reap.errors import ReapError, first_line

NEEDED = ("lm_eval", "accelerate")  # without the latter lm_eval lacks its class for our models
INSTALL = "pip install 'lm-eval[hf]'"

Results = dict[str, dict[str, float | int | None]]


def require_harness() -> None:
    """ReapError where lm-evaluation-harness is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ReapError(f"tasks need {missing[0]}, which is not installed: {INSTALL}")


class Tasks:
    """Tasks, groups and tags of the harness by name, and of YAML files in the folder `path`.

    Their data is loaded here, so that what lacks shows before a model is. ReapError for names that
    are not known, a folder that is not there, and data that cannot be had.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        path: str | os.PathLike[str] | None = None,
        shots: int | None = None,
        limit: int | None = None,
    ) -> None:
        require_harness()
        from lm_eval.tasks import TaskManager

        if not names:
            raise ReapError("tasks names none: give at least one, arc_easy say")
        if path is not None and not Path(path).is_dir():
            raise ReapError(f"task_path {path} is no folder: give that of a task's YAML file")
        self.names, self.path, self.shots, self.limit = list(names), path, shots, limit
        self._manager = TaskManager(include_path=None if path is None else str(path))
        known = set(self._manager.all_tasks)
        odd = [name for name in names if name not in known]
        if odd:
            raise ReapError(
                f"lm-evaluation-harness {version('lm_eval')} has no task {odd[0]!r}: "
                "`lm-eval ls tasks` lists them, and task_path adds a folder"
            )
        try:
            self._manager.load(self.names)
        except Exception as error:  # of the data's loaders, or a task's own program
            raise ReapError(f"cannot load {', '.join(names)}: {first_line(error)}") from error

    def describe(self) -> dict[str, Any]:
        """What was asked, as JSON."""
        return {
            "tasks": self.names,
            "shots": self.shots,
            "limit": self.limit,
            "lm_eval": version("lm_eval"),
        }

    def run(self, model: Any, tokenizer: Any, *, batch_size: int = 1) -> Results:
        """By task, and by group, what the harness measures ("acc,none", its standard error
        "acc_stderr,none", ...) and how many "samples" it asked. `limit` asks the first of each
        task only, `shots` are examples before each question, None the task's own number.

        The model runs as it is, in eval mode, through `lm_eval.models.huggingface.HFLM`."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        training = model.training
        model.eval()
        try:
            wrapped = HFLM(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
            )
            found = simple_evaluate(
                model=wrapped,
                tasks=self.names,
                num_fewshot=self.shots,
                limit=self.limit,
                task_manager=self._manager,
                log_samples=False,
            )
        finally:
            model.train(training)
        asked = found["n-samples"]
        return {
            name: {
                **({"samples": asked[name]["effective"]} if name in asked else {}),
                **{key: _number(value) for key, value in measures.items() if "," in key},
            }
            for name, measures in found["results"].items()
        }


def _number(value: Any) -> float | None:
    """None for what is not finite, or "N/A"."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
