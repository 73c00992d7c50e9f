"""Cosines between experts, against vectors compared one by one."""

import pytest
import torch
from brute import brute_force, run
from slots import TWO_LAYERS
from test_logits import last_linear
from tiny import tiny_inputs, tiny_model

from reap.errors import ReapError
from reap.observation.patch import observe
from reap.planning.cosines import RECORDED, similarity
from reap.statistics.stats import Statistics


@pytest.fixture(scope="module")
def observed():
    model = tiny_model("qwen3_moe")
    with (
        observe(model, outputs=True, logits=True) as stats,
        brute_force(model) as truth,
        last_linear(model) as logits,
    ):
        run(model, tiny_inputs(model, lengths=[4, 3]))
    return stats, truth, {name: rows[0][:7] for name, rows in logits.items()}


@pytest.mark.parametrize("of", RECORDED)
def test_against_vectors(observed, of, tmp_path):
    stats, truth, logits = observed
    keep = torch.tensor([True] * 7 + [False])
    stats.save(tmp_path / "x.st")
    found = similarity(tmp_path / "x.st", of)
    assert list(found) == list(stats.layers)
    for name, cosines in found.items():
        if "outputs" in of:
            rows = truth[name].fields(keep=keep)[f"{of.removesuffix('s')}_sum"]
            rows = rows / stats[name].count.clamp(min=1)[:, None]
        else:
            rows = logits[name].T
            rows = rows - rows.mean(1, keepdim=True) if of == "centred_logits" else rows
        for i, mine in enumerate(rows):
            for j, other in enumerate(rows):
                if not (mine.any() and other.any()):
                    assert cosines[i, j].isnan()
                    continue
                expected = torch.nn.functional.cosine_similarity(mine, other, dim=0)
                assert cosines[i, j] == pytest.approx(float(expected), abs=1e-3)


def test_what_is_not_there(caplog):
    stats = Statistics(TWO_LAYERS)
    for of, option in RECORDED.items():
        with pytest.raises(ReapError, match=rf"observe\({option}=True\), or reap .* --{option}"):
            similarity(stats, of)
    with pytest.raises(ReapError, match="it must be one of gated_outputs"):
        similarity(stats, "weights")
    empty = similarity(Statistics(TWO_LAYERS, outputs=True, logits=True), "outputs")
    assert all(cosines.isnan().all() for cosines in empty.values())
    stats = Statistics(TWO_LAYERS, logits=True)
    one = torch.ones(1, 1)
    stats.update("second", one.long(), one, one, one)
    with pytest.raises(ReapError, match="layer second: its logits are unknown"):
        similarity(stats, "logits")
