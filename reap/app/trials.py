"""What `reap evaluate` tries beyond predicting text: generating it, and tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reap.app.arguments import Data, TextOptions
from reap.app.longruns import reported
from reap.errors import ReapError

if TYPE_CHECKING:
    from torch import Tensor

    from reap.planning.plan import Plan
    from reap.runs.tasks import Tasks
    from reap.text.sources import Source

Results = dict[str, dict[str, Any]]  # domain -> measures, as JSON
Found = dict[str, Results]  # by plan, "" without


@dataclass(frozen=True)
class EvaluatedText(TextOptions):
    """Text that may be left out where there are tasks."""

    data: Data = field(default_factory=list)

    def sources(self) -> list[Source]:
        """Also ReapError for a domain that results have no place for."""
        from reap.runs.evaluation import check_domains

        found = super().sources()
        check_domains([self.domain] if self.domain else [source.domain for source in found])
        return found


@dataclass(frozen=True)
class GenerateOptions:
    """How many texts are generated, and how."""

    generate: Annotated[
        int | None,
        typer.Option(min=1, help="also count loops and endings of so many texts of each model"),
    ] = None
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="of --generate: the first tokens of a row of --data")
    ] = 32
    new_tokens: Annotated[int, typer.Option(min=1, help="of --generate: at most, per text")] = 256
    temperature: Annotated[
        float | None, typer.Option(help="of --generate: draw tokens, instead of the likeliest")
    ] = None
    generate_at_once: Annotated[int, typer.Option(min=1, help="of --generate: texts")] = 16

    def check(self, folder: Path, text: TextOptions, trust_remote_code: bool) -> None:
        """ReapError for what can be told before there is a model."""
        from reap.model.config import read_config
        from reap.runs.generation import check_length, check_temperature

        if self.generate is None:
            return
        if not text.data:
            raise ReapError("--generate takes its prompts from --data: give that too")
        check_temperature(self.temperature)
        config = read_config(folder, trust_remote_code=trust_remote_code)
        check_length(config, self.prompt_tokens, self.new_tokens)

    def describe(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "temperature": self.temperature,
            "seed": 0,
        }


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks of lm-evaluation-harness."""

    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="also these tasks of lm-evaluation-harness"),
    ] = None
    task_path: Annotated[
        Path | None, typer.Option(help="of --tasks: a folder with YAML files of more")
    ] = None
    shots: Annotated[
        int | None, typer.Option(min=0, help="of --tasks: examples; the task's own number")
    ] = None
    task_limit: Annotated[
        int | None, typer.Option(min=1, help="of --tasks: only so many questions of each")
    ] = None

    def load(self) -> Tasks | None:
        """ReapError for unknown tasks."""
        from reap.runs.tasks import Tasks

        if self.tasks is None:
            return None
        names = [name for name in map(str.strip, self.tasks.split(",")) if name]
        return Tasks(names, path=self.task_path, shots=self.shots, limit=self.task_limit)


class Trials:
    """Every model of an evaluation, one after the other: `student` as it is or by each plan, and
    what it is compared with, if anything."""

    def __init__(self, student: Any, plans: Mapping[str, Plan], teacher: Any | None) -> None:
        from reap.runs.masking import masked

        def masking(plan: Plan) -> Callable[[], AbstractContextManager[None]]:
            return lambda: masked(student, plan)

        self.student = student
        self.reference = student if plans and teacher is None else teacher
        self.variants: dict[str, Callable[[], AbstractContextManager[None]]] = {
            name: masking(plan) for name, plan in plans.items()
        } or {"": nullcontext}

    def generate(self, found: Found, prompts: dict[str, Tensor], how: GenerateOptions) -> None:
        """Adds "generation" and "teacher_generation" to the measures of domains and total."""
        from reap.runs.generation import Generation, generate_texts

        models = len(self.variants) + (self.reference is not None)
        tokens = models * how.new_tokens * sum(map(len, prompts.values()))
        with reported("generating", lambda: tokens, "tokens") as advance:

            def texts(model: Any) -> dict[str, Generation]:
                return generate_texts(
                    model,
                    prompts,
                    how.new_tokens,
                    temperature=how.temperature,
                    at_once=how.generate_at_once,
                    progress=advance,
                )

            theirs = {} if self.reference is None else texts(self.reference)
            for name, variant in self.variants.items():
                with variant():
                    mine = texts(self.student)
                for key, part in (("teacher_generation", theirs), ("generation", mine)):
                    for domain, one in part.items():
                        found[name].setdefault(domain, {})[key] = one.to_json()

    def ask(self, found: Found, tasks: Tasks, tokenizer: Any, batch_size: int) -> None:
        """Adds "tasks" and "teacher_tasks" to the measures of the total."""
        theirs = None
        if self.reference is not None:
            theirs = tasks.run(self.reference, tokenizer, batch_size=batch_size)
        for name, variant in self.variants.items():
            total = found[name].setdefault("total", {})
            with variant():
                total["tasks"] = tasks.run(self.student, tokenizer, batch_size=batch_size)
            if theirs is not None:
                total["teacher_tasks"] = theirs
