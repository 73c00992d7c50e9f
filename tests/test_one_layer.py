"""The layer that tries wheels without torch is packed as the package packs it, and compared."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compilers import ROOT

from reap_kernels import Saliency, native
from reap_kernels.contract import Call

sys.path.insert(0, str(ROOT / "tools"))
import one_layer

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def test_same_bytes_as_the_package():
    layer = one_layer.drawn()
    results = one_layer.truth(layer)
    x, gate_up, down, ids, gates = map(torch.from_numpy, layer)
    call = Call(x, gate_up, down, ids, gates)
    saliency = Saliency(*map(torch.from_numpy, results))
    extension = native.module()
    assert one_layer.packed(extension, layer, results, 3) == native.layer(
        extension, call, saliency, threads=3
    )


def test_every_instruction_set(capsys):
    one_layer.main(Path(native.__file__).parent.parent)
    said = capsys.readouterr().out.splitlines()
    isas = native.module().available_isas()
    assert [line.split(", ")[2].split(":")[0] for line in said] == isas


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_an_error_is_seen(wrong, monkeypatch):
    right = one_layer.truth(one_layer.drawn())
    right.norms[3, 1] *= wrong
    monkeypatch.setattr(one_layer, "computed", lambda *_: right)
    with pytest.raises(SystemExit, match="error .*, more than 1e-05"):
        one_layer.main(Path(native.__file__).parent.parent)


def test_another_pythons_wheel(tmp_path):
    (tmp_path / "reap_kernels").mkdir()
    (tmp_path / "reap_kernels" / "_native.cpython-39-x86_64-linux-gnu.so").touch()
    with pytest.raises(SystemExit, match="no extension for this Python"):
        one_layer.load(tmp_path)
