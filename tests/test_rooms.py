"""The imports of the packages are those that CONTRIBUTING.md's table of rooms allows."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"reap.errors", "reap.versions"}
THIRD_PARTY = {  # of each package, beside the standard library
    "reap": {
        "greenlet",
        "huggingface_hub",
        "jinja2",
        "lm_eval",
        "markupsafe",
        "matplotlib",
        "numpy",
    }
    | {"reap_kernels", "rich", "safetensors", "scipy", "torch", "transformers", "typer"},
    "reap_kernels": {"torch", "triton"},
}
ROW = re.compile(r"\| `reap/(\w+)` \|[^|]*\|([^|]*)\|")


def modules(package: str) -> dict[str, Path]:
    paths = (ROOT / package).rglob("*.py")
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = modules("reap") | modules("reap_kernels")


def imports(module: str) -> Iterator[str]:
    """Everything that a file imports, anywhere in it, types included."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def room(module: str) -> str:
    """The folder of `reap` that a module lies in; for others the package."""
    top, _, rest = module.partition(".")
    return rest.split(".")[0] if top == "reap" else top


def allowed() -> dict[str, set[str]]:
    rows = ROW.findall((ROOT / "CONTRIBUTING.md").read_text())
    return {name: set(filter(None, map(str.strip, cell.split(",")))) for name, cell in rows}


ROOMS = sorted(path.name for path in (ROOT / "reap").iterdir() if any(path.glob("*.py")))


def test_every_room_has_a_row() -> None:
    assert sorted(allowed()) == ROOMS


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_what_its_row_allows_and_no_less(name: str) -> None:
    taken = set()
    for module in MODULES:
        if module.startswith("reap.") and room(module) == name:
            ours = {i for i in imports(module) if i.split(".")[0] in THIRD_PARTY}
            taken |= {room(i) for i in ours - GROUND}
    assert taken - {name} == allowed()[name]


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_imports_nothing_of_ours(module: str) -> None:
    assert not [name for name in imports(module) if name.split(".")[0] in THIRD_PARTY]


def test_nothing_imports_the_public_face() -> None:
    """What it names has a home, which says where a reader has to look."""
    assert not [module for module in MODULES for name in imports(module) if name == "reap"]


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_no_circles(package: str) -> None:
    graph = {
        module: {name for name in imports(module) if name in MODULES and name != package}
        for module in MODULES
        if module.split(".")[0] == package and module != package
    }
    TopologicalSorter(graph).prepare()  # CycleError, which lists one


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_other_packages(package: str) -> None:
    for module in MODULES:
        if module.split(".")[0] == package:
            foreign = {name.split(".")[0] for name in imports(module)} - {package}
            foreign -= set(sys.stdlib_module_names)
            assert foreign <= THIRD_PARTY[package], module


def test_native_code_knows_nothing_of_torch() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
