"""What is said of releases is the same wherever it is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import triton
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from reap.versions import LOWEST, SINCE, TESTED, installed
from reap_kernels.triton import MIN_TRITON

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_newest_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    for package, (_, last) in TESTED.items():
        found = [pin for pin in pins if pin.name == package]
        assert last in [spec.version for pin in found for spec in pin.specifier]


@pytest.mark.parametrize("package", LOWEST)
def test_the_lowest_is_what_installing_asks_for(package: str) -> None:
    release, why = LOWEST[package]
    if package == "python":
        assert f'requires-python = ">={release}"' in PROJECT
        assert f'target-version = "py{release.replace(".", "")}"' in PROJECT
    else:
        dependencies = PROJECT.split("dependencies = [")[1].split("]")[0]
        (needed,) = re.findall(rf'"({package}\b[^"]*)"', dependencies)
        assert Requirement(needed).specifier == SpecifierSet(f">={release}")
        now = installed(package)[package]
        assert now is not None and Version(now) >= Version(release)
    row = f"| {package} {release} | {why} |"
    assert row in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_lowest_is_the_oldest_that_is_tested() -> None:
    assert LOWEST["transformers"][0] == TESTED["transformers"][0]
    assert f"transformers {LOWEST['transformers'][0]} or newer" in (ROOT / "README.md").read_text()
    assert ".".join(map(str, MIN_TRITON)) == LOWEST["triton"][0]


def test_what_the_lowest_is_for_is_there() -> None:
    assert torch.float8_e8m0fnu and triton.knobs.runtime


def test_types_that_came_later_are_in_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for model_type, release in SINCE.items():
        assert f"| transformers {release} | {model_type} " in text


def test_what_was_tried_is_in_the_table() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    for first, last in TESTED.values():
        assert f" {first}" in page and f" {last}" in page
    pins = re.findall(
        r"^([\w-]+)\S*==([\w.]+)", (ROOT / "requirements-others.txt").read_text(), re.M
    )
    assert pins
    for package, release in pins:
        assert package == "greenlet" or release in page, f"{package} {release}"
