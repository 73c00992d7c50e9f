"""Names of layers as people read them."""

from __future__ import annotations

from typing import Any

import pytest

from reap.model.layernames import pattern, short_names

NAMES: dict[str, Any] = {
    "stack": (["m.layers.3.mlp.experts", "m.layers.11.mlp.experts"], ["3", "11"], "N.mlp.experts"),
    "one layer": (["m.layers.3.mlp.experts"], ["3"], "m.layers.N.mlp.experts"),
    "no number": (["experts"], ["experts"], "N"),
    "two kinds": (["m.layers.0.mlp", "mtp.layers.0.mlp"], ["m", "mtp"], "N.layers.0.mlp"),
    "one within another": (["m.0", "m.0.0"], ["0", "0.0"], "m.N"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_as_short_as_they_differ(kind: str) -> None:
    names, short, end = NAMES[kind]
    assert list(short_names(names).values()) == short
    assert pattern(names).endswith(end)
