"""A run ends when it is sure, at the same batch every time, and hardly ever wrongly."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import MODEL, invoke, refused, run_json
from test_partial import Stop, every_batch_is_remembered, here, text  # noqa: F401
from tiny import tiny_model

from reap.errors import ReapError
from reap.model.info import LayerInfo, ModelInfo
from reap.planning.plan import make_plan
from reap.runs.calibration import calibrate
from reap.runs.cuts import GROUPS
from reap.runs.partial import Partial
from reap.runs.stability import Stable, Watch
from reap.statistics.stats import Statistics

E, T = 8, 24  # experts, tokens of a batch


def model(n_group: int = 1, layers: int = 2, experts: int = E) -> ModelInfo:
    names = ("a", "b", "c")[:layers]
    infos = (LayerInfo(name, experts, 2, n_group, 1) for name in names)
    return ModelInfo("m", "n", "f", None, tuple(infos))


class Run:
    """Batches of one text each: an expert's true saliency is in `scores` [E], a share `of_text` of
    its variance is the text's."""

    def __init__(self, scores: Any, of_text: float = 0.3, seed: int = 0, **info: int) -> None:
        self.model = model(**info)
        self.stats = Statistics(self.model)
        self.scores = torch.as_tensor(scores, dtype=torch.float32)
        self.of_text, self.rng = of_text, torch.Generator().manual_seed(seed)

    def batch(self, domain: str = "default") -> None:
        experts = len(self.scores)
        for layer in self.stats.layers:
            ids = torch.rand(T, experts, generator=self.rng).topk(2).indices
            own = torch.randn(experts, generator=self.rng)[ids] * self.of_text**0.5
            noise = torch.randn(T, 2, generator=self.rng) * (1 - self.of_text) ** 0.5
            norms = (self.scores[ids] + 0.1 * (own + noise)).clamp(min=0)
            with self.stats.domain(domain):
                self.stats.update(layer, ids, torch.ones(T, 2), norms, norms)


APART = [1.0, 1.3, 1.2, 2.5, 2.7, 2.6, 2.8, 2.9]


def test_ends_at_a_look_with_what_a_plan_drops() -> None:
    run = Run(APART)
    watch = Watch(Stable(0.375), run.model)
    for batches in range(1, 200):
        run.batch("a" if batches % 3 else "b")
        if watch.batch(run.stats):
            break
    assert batches == 40  # the second look
    plan = make_plan(run.stats, ratio=0.375)
    assert watch.state()["dropped"] == {name: [*ids] for name, ids in plan.dropped.items()}
    assert plan.dropped["a"] == (0, 1, 2)
    assert watch.ended() == (
        "stable after 40 batches: the experts that ratio 0.375 drops by reap were the same at 2 "
        "looks, and with 0.95 confidence none could swap"
    )


@pytest.mark.parametrize("looks", [1, 2, 4])
def test_looks_in_a_row(looks: int) -> None:
    run = Run(APART)
    watch = Watch(Stable(0.375, looks=looks), run.model)
    batches = 0
    while not watch.stable:
        run.batch()
        watch.batch(run.stats)
        batches += 1
    assert batches == {1: 32, 2: 40, 4: 56}[looks]


def test_looks_grow_with_the_text() -> None:
    """And what is remembered does not."""
    run = Run([1.0] * 4 + [1.001] * 4)
    watch, looks = Watch(Stable(0.5), run.model), []
    for batches in range(1, 300):
        run.batch()
        watch.batch(run.stats)
        if watch._looked_at == batches:
            looks.append(batches)
        assert len(watch._cuts) < 2 * GROUPS
    assert looks == [32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert "with 0.95 confidence" in watch.ended() and "(after 256 batches)" in watch.ended()
    assert watch.ended().startswith("text used up, not stable: ")


def test_equal_experts_are_a_tie_only_when_asked() -> None:
    scores = [1.0, 1.0, 2.0, 2.001, 2.0, 2.0, 3.0, 3.0]
    ended = {}
    for tie in (0.0, 0.1):
        run = Run(scores, layers=1)
        watch = Watch(Stable(0.5, tie=tie), run.model)
        for _ in range(160):
            run.batch()
            if watch.batch(run.stats):
                break
        ended[tie] = watch.ended()
    assert "4 experts in 1 layer could still swap" in ended[0.0]
    assert ended[0.1].startswith("stable after ")


def test_seldom_wrong() -> None:
    """Of runs that end at experts near each other, at most 1 - confidence are wrong, though
    they look many times."""
    wrong = ended = 0
    for seed in range(40):
        run = Run([1.0, 1.03, 2.0, 2.1], of_text=0.9, seed=seed, layers=1, experts=4)
        watch = Watch(Stable(0.25, confidence=0.8, looks=1), run.model)
        for _ in range(128):
            run.batch()
            if watch.batch(run.stats):
                ended += 1
                wrong += watch.state()["dropped"]["a"] != [0]
                break
    assert ended > 8
    assert wrong <= 0.2 * ended


def test_router_groups_are_compared_inside() -> None:
    """Experts of one group all score higher than those of the other: no swap between the two."""
    run = Run([1.0, 1.1, 5.0, 5.1, 11.0, 11.1, 15.0, 15.1], n_group=2)
    watch = Watch(Stable(0.5), run.model)
    for _ in range(40):
        run.batch()
        watch.batch(run.stats)
    assert watch.stable and watch.state()["dropped"]["a"] == [0, 1, 4, 5]


@pytest.mark.parametrize("criterion", ["reap", "frequency", "reap_l2"])
def test_pieces_have_the_same_state(criterion: str) -> None:
    """In whatever runs and domains the batches come, and however often the state went through a
    file."""
    until = Stable(0.5, criterion=criterion, confidence=0.5)
    whole, split = Run(APART), Run(APART)
    one, other = Watch(until, whole.model), Watch(until, split.model)
    before = Statistics(split.model)
    for batches in range(1, 140):
        whole.batch()
        split.batch("code" if batches % 2 else "prose")
        assert one.batch(whole.stats) == other.batch(before, split.stats)
        if batches % 5 == 0:
            state = json.loads(json.dumps(other.state()))
            other = Watch(until, split.model)
            other.restore(batches, state)
            before, split.stats = before + split.stats, Statistics(split.model)
        assert one.state() == other.state() and one.ended() == other.ended()


def test_a_damaged_state_is_refused() -> None:
    run = Run(APART)
    watch = Watch(Stable(0.5), run.model)
    for _ in range(3):
        run.batch()
        watch.batch(run.stats)
    good = watch.state()
    bad: list[Any] = [
        None,
        {},
        [],
        good | {"cuts": good["cuts"][1:]},
        good | {"cuts": ["AAAA"] * 3},
    ]
    for state in [*bad, good | {"size": 0}, good | {"cuts": [5] * 3}]:
        with pytest.raises(ReapError, match="is damaged: begin anew"):
            Watch(Stable(0.5), run.model).restore(3, state)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": 1.0}, "less than 1"),
        ({"ratio": -0.5}, "less than 1"),
        ({"ratio": math.nan}, "ratio is nan"),
        ({"criterion": "peak"}, "peak has no standard error"),
        ({"criterion": "magic"}, "must be one of"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": math.nan}, "confidence is nan"),
        ({"confidence": "high"}, "confidence is 'high'"),
        ({"looks": 0}, "looks is 0"),
        ({"looks": 1.5}, "looks is 1.5"),
        ({"tie": -0.1}, "tie is -0.1"),
    ],
)
def test_bad_options(options: Any, reason: str) -> None:
    with pytest.raises(ReapError, match=reason):
        Stable(**{"ratio": 0.5} | options)


def test_what_no_router_could_do_is_refused() -> None:
    with pytest.raises(ReapError, match="drops no expert"):
        Watch(Stable(0.1), model())
    with pytest.raises(ReapError, match="its router picks 2"):
        Watch(Stable(0.9), model())


LOOSE = Stable(0.25, confidence=0.5, tie=0.9, looks=3)


def test_calibrate(here: Path) -> None:  # noqa: F811
    """Ends before the text, at the same batch after any break, and says why in its file."""
    tiny = tiny_model("qwen3_moe", num_hidden_layers=2)
    full = calibrate(tiny, text(here, seq_len=16, batch_size=1))
    whole = calibrate(tiny, text(here, seq_len=16, batch_size=1), until=LOOSE)
    (data,) = whole.data
    assert data["ended"].startswith("stable after 48 batches")
    assert data["until"] == {
        "ratio": "0.25", "criterion": "reap", "confidence": 0.5, "looks": 3, "tie": 0.9,
    }  # fmt: skip
    assert whole.tokens == data["tokens"] < full.tokens
    for stops in ([10], [47], [3, 30, 13]):
        for stop in stops:
            with pytest.raises(Stop):
                stopped(here, tiny, stop)
        pieces = stopped(here, tiny)
        assert pieces.digest() == whole.digest() and pieces.data == whole.data


def stopped(folder: Path, tiny: Any, after: int | None = None, until: Any = LOOSE) -> Statistics:
    """Stop behind that many batches, in what follows the last of them."""
    partial, seen = Partial(folder / "kept"), 0

    def progress(_: int) -> None:
        nonlocal seen
        seen += partial._whole is not None
        if seen == after:
            raise Stop

    with partial.kept():
        rows = text(folder, seq_len=16, batch_size=1)
        return calibrate(tiny, rows, partial=partial, until=until, progress=progress)


def test_an_end_that_was_not_saved_is_the_end(here: Path) -> None:  # noqa: F811
    tiny = tiny_model("qwen3_moe", num_hidden_layers=2)
    with pytest.raises(Stop):
        stopped(here, tiny, 48)
    kept = Statistics.load(here / "kept")
    assert kept.data[0]["partial"]["until"]["stable"]
    assert stopped(here, tiny).tokens == kept.tokens


@pytest.mark.parametrize("until", [None, Stable(0.5, confidence=0.5, tie=0.9, looks=3)])
def test_another_end_is_another_run(here: Path, until: Any) -> None:  # noqa: F811
    tiny = tiny_model("qwen3_moe", num_hidden_layers=2)
    with pytest.raises(Stop):
        stopped(here, tiny, 5)
    with pytest.raises(ReapError, match="until was .*, and is "):
        stopped(here, tiny, until=until)


def test_text_that_ends_first(here: Path) -> None:  # noqa: F811
    tiny = tiny_model("qwen3_moe", num_hidden_layers=2)
    rows = [{"input_ids": batch.input_ids} for batch in text(here)]
    (data,) = calibrate(tiny, rows[:9], until=Stable(0.5)).data
    assert data["ended"] == (
        "text used up, not stable: 9 batches are too few to look at, 32 are needed"
    )
    with pytest.raises(ReapError, match="fewer than 32"):
        calibrate(tiny, text(here, max_tokens=100), until=Stable(0.5))


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 800)
    out = tmp_path / "x.st"
    command = ["calibrate", MODEL, "--data", tmp_path / "a.txt", "--seq-len", 64, "--out", out]
    for options, reason in [
        (["--stable-looks", 3], "--stable-looks is of --until-stable"),
        (["--until-stable", 1.5], "ratio is 1.5"),
        (["--until-stable", 0.95], "its router picks 2"),
        (["--until-stable", 0.01], "drops no expert"),
        (["--until-stable", 0.5, "--stable-criterion", "random"], "random has no standard error"),
        (["--until-stable", 0.5, "--max-tokens", 640], "fewer than 32"),
    ]:
        assert reason in refused(*command, *options)
    assert "leave out --shard" in refused(*command, "--until-stable", 0.5, "--shard", "0/2")
    loose = ["--until-stable", 0.25, "--stable-confidence", 0.5, "--stable-tie", 0.9]
    saved = run_json(*command, *loose, "--max-tokens", 9600, "--stable-looks", 1)
    (ended,) = saved["ended"]
    (batches,) = re.findall(r"^stable after (\d+) batches", ended)
    assert saved["tokens"] == int(batches) * 64 < 9600
    code, shown, _ = invoke("info", out)
    assert code == 0 and ended in shown
    assert run_json("info", out)["ended"] == [ended]
    options = [*loose, "--max-tokens", 9600, "--stable-looks", 1, "--stream", "--overwrite"]
    streamed = run_json(*command, *options)
    assert streamed["ended"][0].startswith(f"stable after {batches} batches")
