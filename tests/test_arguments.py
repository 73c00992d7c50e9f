"""Groups of options, which several commands share."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from reap.app.arguments import CutOptions, LoadOptions, MeasureOptions, TextOptions, grouped
from reap.app.cli import app
from reap.app.trials import EvaluatedText, GenerateOptions, TaskOptions


@dataclass(frozen=True)
class Colours:
    ink: Annotated[str, typer.Option(help="of letters")]
    paper: Annotated[int, typer.Option("--paper", min=0)] = 7
    more: Annotated[list[str], typer.Option("--more")] = field(default_factory=list)


def test_a_group_is_its_fields() -> None:
    heard = []

    @grouped
    def write(what: str, colours: Colours, loud: bool = False) -> None:
        """Doc."""
        heard.append((what, colours, loud))

    assert list(inspect.signature(write).parameters) == ["what", "ink", "paper", "more", "loud"]
    assert write.__doc__ == "Doc."
    one = typer.Typer()
    one.command()(write)
    runner = CliRunner()
    assert runner.invoke(one, ["hi", "--ink", "red", "--loud"]).exit_code == 0
    assert heard == [("hi", Colours("red", 7, []), True)]
    assert "of letters" in runner.invoke(one, ["--help"]).output
    assert runner.invoke(one, ["hi"]).exit_code == 2  # without a default it has to be given
    assert runner.invoke(one, ["hi", "--ink", "red", "--paper", "-1"]).exit_code == 2


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("calibrate", [TextOptions, MeasureOptions, LoadOptions]),
        ("evaluate", [EvaluatedText, LoadOptions, GenerateOptions, TaskOptions]),
        ("plan", [CutOptions]),
        ("compress", [TextOptions, CutOptions, MeasureOptions, LoadOptions]),
    ],
)
def test_commands_share_them(command: str, groups: list[type]) -> None:
    shown = CliRunner().invoke(app, [command, "-h"]).output
    for group in groups:
        for name in inspect.signature(group).parameters:
            assert f"--{name.replace('_', '-')}" in shown
