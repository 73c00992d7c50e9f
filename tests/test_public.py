"""The public face of `reap`: what it names is there, on first use, and nothing else is."""

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reap

MODULES = [module.name for module in pkgutil.walk_packages(reap.__path__, "reap.")]


@pytest.mark.parametrize("name", reap.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(reap, name) is not None and name in dir(reap)


def test_a_misspelled_name_is_an_error_to_python_and_to_type_checkers() -> None:
    """The comment is itself an error to mypy if there was nothing to ignore."""
    with pytest.raises(AttributeError, match="module 'reap' has no attribute 'calibrat'"):
        reap.calibrat  # type: ignore[attr-defined]  # noqa: B018


def test_the_names_of_type_checkers_are_those_of_python() -> None:
    tree = ast.parse(inspect.getsource(reap))
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes: dict[str, str] = vars(reap)["_HOME"]
    assert seen == {name: f"reap.{home}" for name, home in homes.items()}
    assert {*seen, "ReapError", "__version__"} == set(reap.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_no_module_has_the_name_of_a_public_function(module: str) -> None:
    """Importing it would hide the function behind the module in whatever package it lies in."""
    functions = [name for name in reap.__all__ if inspect.isroutine(getattr(reap, name))]
    assert module.rpartition(".")[2] not in functions


def test_functions_stay_functions_whatever_is_imported() -> None:
    code = f"import {', '.join(MODULES)}; import reap; print([callable(getattr(reap, n)) for n in"
    code += " ('saliency', 'observe', 'calibrate', 'prune', 'batches')])"
    done = run_python(code.replace("reap.__main__, ", ""))
    assert done == "[True, True, True, True, True]"


def test_importing_reap_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'rich', 'triton'}"
    for code in ("import reap", "import reap.app.cli"):
        assert run_python(f"import sys; {code}; print({heavy} & set(sys.modules))") == "set()"


def run_python(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_version_is_written_once() -> None:
    project = Path(__file__).parent.parent / "pyproject.toml"
    assert reap.__version__ not in project.read_text()
