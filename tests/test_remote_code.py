"""Code that a model's folder brings: never asked about, never run unless that is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from folders import edit_config, saved, some_plan, tensors_of
from safetensors.torch import save_file
from tiny import tiny_inputs, tiny_model

from reap.checkpoint.pruning import prune
from reap.checkpoint.verification import verify
from reap.errors import ReapError
from reap.model.identity import describe, describe_folder
from reap.model.info import ModelInfo
from reap.model.load import load_model, load_tokenizer
from reap.runs.calibration import calibrate
from reap.runs.waves import calibrate_streamed

CONFIGURATION = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import Qwen3MoeConfig
class OddConfig(Qwen3MoeConfig):
    model_type = "odd_moe"
"""
MODELING = """
from transformers import Qwen3MoeForCausalLM
from .configuration_odd import OddConfig
class OddForCausalLM(Qwen3MoeForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a type that transformers does not know, with the code for it."""

    def asked(*_: Any) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # of an earlier test's folder
    monkeypatch.setattr("sys.path", [*sys.path])  # to which transformers adds this one's
    folder = tmp_path / "odd"
    saved(folder, num_hidden_layers=2)
    code = CONFIGURATION.format(mark=str(tmp_path / "ran"))
    (folder / "configuration_odd.py").write_text(code)
    (folder / "modeling_odd.py").write_text(MODELING)
    places = {
        "AutoConfig": "configuration_odd.OddConfig",
        "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
    }
    edit_config(folder, model_type="odd_moe", architectures=["OddForCausalLM"], auto_map=places)
    return folder


def plan_for_odd(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, model_type="qwen3_moe")
    model = describe_folder(folder).to_json()
    (folder / "config.json").write_text(json.dumps(config))
    return some_plan(folder, model=ModelInfo.from_json({**model, "model_type": "odd_moe"}))


def test_it_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    for act in (load_model, describe_folder):
        with pytest.raises(ReapError, match="code of its own.*trust_remote_code=True") as caught:
            act(folder)
        assert "\n" not in str(caught.value)
    own = {"AutoTokenizer": ["tokenization_odd.OddTokenizer", None]}
    config = {"tokenizer_class": "OddTokenizer", "auto_map": own}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    edit_config(folder, model_type="qwen3_moe", auto_map=None)
    with pytest.raises(ReapError, match="no tokenizer|trust_remote_code=True"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_it_is_pruned_by_its_names_and_shapes(folder: Path, tmp_path: Path) -> None:
    plan = plan_for_odd(folder)
    report = prune(folder, plan, tmp_path / "out")
    assert report.unchecked is not None and "code" in report.unchecked
    assert (tmp_path / "out" / "modeling_odd.py").read_text() == MODELING
    gates = [x for name, x in tensors_of(tmp_path / "out").items() if "mlp.gate" in name]
    assert gates and all(len(gate) == 5 for gate in gates)
    assert verify(tmp_path / "out", folder).unchecked is not None
    assert not (tmp_path / "ran").exists()
    edit_config(folder, model_type="even_moe")
    with pytest.raises(ReapError, match="model type odd_moe against even_moe"):
        prune(folder, plan, tmp_path / "again")


def test_it_is_run_when_allowed(folder: Path, tmp_path: Path) -> None:
    state = tiny_model("qwen3_moe", num_hidden_layers=2).state_dict()  # no conversion is known
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model = load_model(folder, trust_remote_code=True)
    assert type(model).__name__ == "OddForCausalLM" and (tmp_path / "ran").exists()
    assert describe(model).model_type == "odd_moe"


def test_what_transformers_knows_itself_needs_no_code(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, model_type="qwen3_moe")
    assert type(load_model(folder)).__name__ == "Qwen3MoeForCausalLM"
    report = prune(folder, some_plan(folder), tmp_path / "out")
    assert report.unchecked is None and not (tmp_path / "ran").exists()


SHARED = """
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1] = self.model.layers[0]
"""


@pytest.mark.parametrize("shared", [False, True])
def test_it_runs_layer_by_layer(folder: Path, shared: bool) -> None:
    """Also one that goes through a layer twice, of which the checkpoint has one."""
    state = tiny_model("qwen3_moe", num_hidden_layers=2).state_dict()
    if shared:
        (folder / "modeling_odd.py").write_text(MODELING + SHARED)
        state = {name: x for name, x in state.items() if ".layers.1." not in name}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model = load_model(folder, trust_remote_code=True)
    batches = [tiny_inputs(model, lengths=[9, 4]), tiny_inputs(model, seed=2)]
    whole = calibrate(model, batches)
    found = calibrate_streamed(folder, batches, trust_remote_code=True)
    assert found.digest() == whole.digest() and len(found.layers) == 2 - shared
    with pytest.raises(ReapError, match="trust_remote_code=True"):
        calibrate_streamed(folder, batches)
