"""The private names of transformers and torch: all in one file, checked before they are used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import saved, some_plan
from tiny import tiny_inputs, tiny_model
from torch import nn
from transformers import core_model_loading, modeling_utils
from transformers.integrations import moe
from transformers.utils import logging

from reap.checkpoint.pruning import prune
from reap.errors import ReapError
from reap.model import compat
from reap.model.layerwise import Layerwise
from reap.model.load import load_model
from reap.observation.patch import observe
from reap.versions import releases

ROOT = Path(__file__).parent.parent
EXPERTS, CONFIGURATIONS, CLASSES, LOADER, PARTS, TORCH = compat.SEAMS


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Every test here runs the checks itself, and what it breaks is seen by no other."""
    compat._fault.cache_clear()
    yield
    compat._fault.cache_clear()


@pytest.mark.parametrize("seam", compat.SEAMS, ids=lambda seam: seam.name)
def test_the_installed_releases_are_as_needed(seam: compat.Seam) -> None:
    assert compat._fault(seam.check) is None
    assert not compat.changed()
    for work in compat.WORKS:
        compat.require(work)


def decorated(change: Callable[[nn.Module], None]) -> Any:
    """The decorator of experts classes, of a release in which their modules are a bit different."""
    original = moe.use_experts_implementation

    def decorate(cls: type[nn.Module]) -> type[nn.Module]:
        cls = original(cls)
        init = cls.__init__

        def changed_init(self: nn.Module, config: Any) -> None:
            init(self, config)
            change(self)

        cls.__init__ = changed_init
        return cls

    return decorate


def renamed_flag(module: nn.Module) -> None:
    vars(module)["gated"] = vars(module).pop("has_gate")


def other_flag(module: nn.Module) -> None:
    module.is_transposed = True


def other_gate(module: nn.Module) -> None:
    type(module)._apply_gate = lambda self, gate_up: gate_up.chunk(2, -1)[0]


def own_dispatch(module: nn.Module) -> None:
    """A class that dispatches in some other way than through a closure over the registry."""
    type(module).forward = lambda self, *args: None


def with_another_argument(*args: Any, parallel: Any) -> Any:
    raise AssertionError("called")


def reporting_nothing(model: nn.Module, *_: Any, **__: Any) -> Any:
    report = type("Report", (), {})()
    for field in ("missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors"):
        setattr(report, field, set())
    return report, None


LOAD = core_model_loading, "convert_and_load_state_dict_in_model"
BOUND = modeling_utils, LOAD[1]
DECORATE = moe, "use_experts_implementation"
AUTO = transformers.AutoModelForCausalLM
GONE = object()  # the name is no more
# Names that more than one check comes across.
ALSO = {
    "_model_mapping": {LOADER, PARTS},
    "rename_source_key": {LOADER},
    "_compiled_call_impl": {EXPERTS},
}


@pytest.mark.parametrize(
    ("seam", "owner", "name", "value", "said"),
    [
        (EXPERTS, moe, "ALL_EXPERTS_FUNCTIONS", GONE, "ALL_EXPERTS_FUNCTIONS"),
        (EXPERTS, moe, "ALL_EXPERTS_FUNCTIONS", {}, "not recognised"),
        (EXPERTS, *DECORATE, GONE, "use_experts_implementation"),
        (EXPERTS, *DECORATE, lambda: decorated(renamed_flag), "has_gate"),
        (EXPERTS, *DECORATE, lambda: decorated(other_flag), "other flags"),
        (EXPERTS, *DECORATE, lambda: decorated(other_gate), "_apply_gate computes 1"),
        (EXPERTS, *DECORATE, lambda: decorated(own_dispatch), "not recognised"),
        (EXPERTS, compat, "EXPERTS_KEY", "_experts", "a configuration has no _experts"),
        (CONFIGURATIONS, compat, "NAME_KEY", "_from", "no empty _from"),
        (CLASSES, AUTO, "_model_mapping", GONE, "no attribute 'get'"),
        (CLASSES, AUTO, "_model_mapping", {}, "maps to [None, None]"),
        (LOADER, *LOAD, GONE, "convert_and_load"),
        (LOADER, *LOAD, with_another_argument, "parallel"),
        (LOADER, *LOAD, reporting_nothing, "of a damaged checkpoint it says"),
        (PARTS, *BOUND, GONE, "convert_and_load"),
        (PARTS, *BOUND, with_another_argument, "with_another_argument"),
        (PARTS, core_model_loading, "rename_source_key", GONE, "rename_source_key"),
        (PARTS, core_model_loading, "rename_source_key", lambda *_: ("a", None), "finds []"),
        (TORCH, torch._C, "_current_graph_task_id", GONE, "_current_graph_task_id"),
        (TORCH, torch._C, "_current_graph_task_id", lambda: 0, "where there is none"),
        (TORCH, nn.Module, "_compiled_call_impl", GONE, "_compiled_call_impl"),
        (TORCH, torch._dynamo, "OptimizedModule", GONE, "OptimizedModule"),
    ],
)  # fmt: skip
def test_a_changed_name_is_found_and_said(
    seam: compat.Seam, owner: Any, name: str, value: Any, said: str, monkeypatch: Any
) -> None:
    """By the works that need it, in one line; the others still work."""
    if value is GONE:
        monkeypatch.delattr(owner, name)
    elif (owner, name) == DECORATE:
        monkeypatch.setattr(owner, name, value())
    else:
        monkeypatch.setattr(owner, name, value)
    faults = compat.changed()
    assert set(faults) == {seam} | ALSO.get(name, set())
    assert said in faults[seam]
    rest = [work for work in compat.WORKS if not compat.changed(work)]
    assert set(rest) == set(compat.WORKS).difference(*(fault.works for fault in faults))
    for work in seam.works:
        with pytest.raises(ReapError) as caught:
            compat.require(work)
        line = str(caught.value)
        assert "\n" not in line and line.startswith(f"{work} does not work with ")
        assert f"{seam.package} {version(seam.package)}" in line.split(": ")[0]
        assert f"{seam.name} changed (" in line and said in line
        assert f"{seam.package} {releases(seam.package)}" in line.split(": install ")[1]
        assert line.endswith(", ".join([*rest, "scores and plans of existing statistics"]))
    for work in rest:
        compat.require(work)


def gone() -> None:
    raise AttributeError("away")


def test_every_work_is_checked_before_it_starts(tmp_path: Path, monkeypatch: Any) -> None:
    """What does not exist is never looked at."""
    model = tiny_model("mixtral")
    saved(tmp_path / "base", "mixtral")
    plan = some_plan(tmp_path / "base")
    for seam in compat.SEAMS:
        monkeypatch.setattr(compat, "SEAMS", [replace(seam, check=gone)])
        for work, start in {
            compat.OBSERVING: lambda: observe(model).__enter__(),
            compat.LOADING: lambda: load_model(tmp_path / "nowhere"),
            compat.STREAMING: lambda: Layerwise(tmp_path / "nowhere"),
            compat.PRUNING: lambda: prune(tmp_path / "nowhere", plan, tmp_path / "out"),
        }.items():
            with pytest.raises(ReapError) as caught:
                start()
                raise ReapError("observed")
            assert ("AttributeError: away" in str(caught.value)) == (work in seam.works)


def test_one_that_is_broken_stops_no_other(tmp_path: Path, monkeypatch: Any) -> None:
    model = saved(tmp_path / "base", "mixtral")
    plan = some_plan(tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.delattr(*LOAD)
        with pytest.raises(ReapError, match="pruning .* loader changed"):
            prune(tmp_path / "base", plan, tmp_path / "out")
        with observe(model) as stats:
            model(**tiny_inputs(model))
        assert stats.tokens == 18
    compat._fault.cache_clear()
    monkeypatch.delattr(moe, "use_experts_implementation")
    with pytest.raises(ReapError, match="observing .* interface changed"), observe(model):
        pass
    assert prune(tmp_path / "base", plan, tmp_path / "out").unchecked is None
    load_model(tmp_path / "out")


def surroundings() -> list[Any]:
    return [
        sorted(compat.experts_functions()),
        torch.get_rng_state().tolist(),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device()),
        torch.distributions.Distribution._validate_args,
        (logging.get_verbosity(), logging.is_progress_bar_enabled()),
        vars(transformers.PreTrainedConfig()),
    ]


@pytest.mark.parametrize(
    "mode",
    [
        ExitStack,
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu"),
    ],
    ids=["none", "inference_mode", "no_grad", "meta", "autocast"],
)
def test_checks_leave_nothing_behind(
    mode: Callable[[], AbstractContextManager[Any]], capfd: Any
) -> None:
    threads = threading.active_count()
    with mode():
        before = surroundings()
        assert not compat.changed()
        assert surroundings() == before
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # the loader does not wait for its own
    assert threading.active_count() <= threads  # one that compiles for other tests may end
    assert capfd.readouterr() == ("", "")


def test_checks_of_a_failure_leave_nothing_behind(monkeypatch: Any) -> None:
    before = surroundings()
    monkeypatch.setattr(*DECORATE, decorated(other_gate))
    monkeypatch.setattr(*LOAD, reporting_nothing)
    assert list(compat.changed()) == [EXPERTS, LOADER]
    assert surroundings() == before


def test_checks_under_a_compiled_caller() -> None:
    model = tiny_model("mixtral")

    @torch.compile(backend="eager")
    def calibrate(x: torch.Tensor) -> torch.Tensor:
        compat.require(compat.OBSERVING)
        with observe(model):
            pass
        return x + 1

    assert calibrate(torch.ones(1)) == 2


def test_threads_that_check_at_once() -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(compat.changed())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{}] * 8


def test_checks_import_one_text_model() -> None:
    program = (
        "import sys; from transformers import PreTrainedModel; before = set(sys.modules);"
        "from reap.model import compat; assert not compat.changed();"
        "print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    models = {m.split(".")[2] for m in modules if m.startswith("transformers.models.")}
    assert models == {"auto", "mixtral"}
    assert not {"PIL", "torchvision", "torchaudio", "torch._inductor"} & set(modules)


# Names that begin with an underscore and are documented.
PUBLIC = {"_replace", "_asdict", "_fields", "_make"}
PRIVATE = re.compile(r"_[A-Za-z0-9]\w*")


def names_in(tree: ast.AST) -> Iterator[str]:
    """Attributes, imported names, and strings that getattr, vars or a table is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (part for alias in node.names for part in alias.name.split("."))
            yield from (getattr(node, "module", None) or "").split(".")
        given = [node.slice] if isinstance(node, ast.Subscript) else []
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = node.args if re.search("attr|get|set|pop", called) else []
        for word in given:
            if isinstance(word, ast.Constant) and isinstance(word.value, str):
                yield from word.value.split(".")


def defined_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.attr


def imported_from_transformers(tree: ast.AST) -> Iterator[str]:
    """Modules below `transformers`, which are not documented but for its logging."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_private_names_are_in_one_file() -> None:
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "reap").rglob("*.py")}
    ours = {name for tree in trees.values() for name in defined_in(tree)} | PUBLIC
    found = {}
    for path, tree in trees.items():
        private = {n for n in names_in(tree) if PRIVATE.fullmatch(n) and n not in ours}
        private |= {
            name
            for name in imported_from_transformers(tree)
            if name.startswith("transformers.") and name != "transformers.utils"
        }
        if private:
            found[str(path.relative_to(ROOT))] = private
    home = "reap/model/compat.py"
    assert "_apply_gate" in found[home] and "transformers.integrations.moe" in found[home]
    assert set(found) == {home}, found
