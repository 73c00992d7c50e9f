"""Too little disk is said before work."""

from dataclasses import replace

import pytest
import torch
from slots import TWO_LAYERS, slots

from reap.errors import ReapError
from reap.files.safefile import read_header
from reap.model.structure import Structure
from reap.runs.disk import check_disk, statistics_size
from reap.statistics.stats import Statistics


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("outputs", [False, True])
def test_size(tmp_path, pairs, outputs):
    config = {"text_config.hidden_size": 7, "moe_intermediate_size": 4, "intermediate_size": 11}
    model = replace(TWO_LAYERS, structure=Structure(config=config))
    stats = Statistics(model, pairs=pairs, outputs=outputs)

    def sums(experts):
        made = {"output_sums": torch.ones(2, experts, 7), "channel_sums": torch.ones(2, experts, 4)}
        return made if outputs else {}

    for domain in ("code", "prose", "chat"):
        with stats.domain(domain):
            stats.update("first", *slots(5), **sums(6))
            stats.update("second", torch.tensor([[8, 0]]), *[torch.ones(1, 2)] * 3, **sums(9))
    stats.save(tmp_path / "x.st")
    header = read_header(tmp_path / "x.st")
    size = (tmp_path / "x.st").stat().st_size - header.data
    assert size == statistics_size(model, pairs, 3, outputs)


def test_size_with_coalitions_and_logits(tmp_path):
    """Of coalitions the most: here as many as there are."""
    stats = Statistics(TWO_LAYERS, coalitions=3, logits=True)
    for name, experts, K in (("first", 6, 3), ("second", 9, 2)):
        ids = torch.stack([torch.arange(K), torch.arange(1, K + 1), torch.arange(2, K + 2)])
        stats.update(name, ids, *[torch.ones(3, K)] * 3, logits=torch.ones(3, experts))
        chosen = stats[name].chosen
        assert chosen is not None and chosen.level == 0
    stats.save(tmp_path / "x.st")
    header = read_header(tmp_path / "x.st")
    size = (tmp_path / "x.st").stat().st_size - header.data
    assert size == statistics_size(TWO_LAYERS, False, 1, coalitions=3, logits=True)


def test_room(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    check_disk(tmp_path / "new" / "x.st", 500)
    with pytest.raises(ReapError, match=r"501 bytes of statistics.* 1.00 kB are free"):
        check_disk(tmp_path / "x.st", 501)
