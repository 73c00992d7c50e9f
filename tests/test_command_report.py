"""`reap report` and `reap diff` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import invoke, refused, run_json
from madeup import madeup

from reap.planning.plan import make_plan

LINE = "report {w}/stats.st {w}/half.json --out {w}/out.html"


@pytest.fixture(scope="module")
def w(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    stats, other = madeup(2), madeup(2, seed=1)
    stats.save(folder / "stats.st")
    other.save(folder / "other.st")
    madeup(3).save(folder / "three.st")
    make_plan(stats, ratio=0.5).save(folder / "half.json")
    make_plan(stats, ratio=0.25).save(folder / "quarter.json")
    make_plan(madeup(3), ratio=0.5).save(folder / "three.json")
    cost = {"tokens": 5, "loss": 2.0, "perplexity": 7.4, "teacher_loss": 1.5, "kl": 0.1}
    (folder / "costs.json").write_text(json.dumps({"half": {"total": cost}}))
    (folder / "failed.json").write_text('{"error": "no such model"}')
    (folder / "text").write_text("text")
    return folder


def test_report(w: Path) -> None:
    given = LINE.format(w=w).split()
    more = ["--evaluation", w / "costs.json", "--figures", w / "figures"]
    made = run_json(*given, w / "quarter.json", *more)
    assert made["out"] == str(w / "out.html") and made["bytes"] == (w / "out.html").stat().st_size
    assert made["figures"][:2] == ["heatmap-a", "heatmap-b"] and "cost" in made["figures"]
    assert len(made["files"]) == 2 * len(made["figures"])
    assert "On held-out text half costs +0.5 nats per token." in made["findings"]
    assert "exists: choose another name or pass --overwrite" in refused(*given)
    code, out, err = invoke(*given, "--overwrite")
    assert code == 0 and not err
    assert out.splitlines()[0].startswith("600 tokens of 2 domains (code, prose)")
    assert "out.html: " in out.splitlines()[-1]
    assert run_json("info", w / "out.html")["kind"] == "report"


MISTAKES = {
    "another model": ("report {w}/stats.st {w}/three.json", "three is a plan of another model"),
    "not statistics": ("report {w}/text", "text"),
    "a plan as statistics": ("report {w}/half.json", "is a plan, it holds no statistics"),
    "statistics as a plan": ("report {w}/stats.st {w}/other.st", "is statistics, not a plan"),
    "no such plan": ("report {w}/stats.st {w}/none.json", "none.json"),
    "a plan twice": ("report {w}/stats.st {w}/half.json {w}/half.json", "is given twice"),
    "an evaluation that failed": (
        "report {w}/stats.st --evaluation {w}/failed.json",
        "is of an evaluation that failed: no such model",
    ),
    "a plan as evaluation": (
        "report {w}/stats.st --evaluation {w}/half.json",
        "give what `reap evaluate --json` printed",
    ),
    "a page over statistics": ("report {w}/other.st --out {w}/stats.st", "it is not a report"),
    "a page over what is read": ("report {w}/stats.st --out {w}/stats.st", "which is read"),
    "a page over the evaluation": (
        "report {w}/stats.st --evaluation {w}/costs.json --out {w}/costs.json",
        "which is read",
    ),
    "figures among others": ("report {w}/stats.st --figures {w}", "is no figure of ours"),
    "no room for top-k": ("report {w}/stats.st --ratio 0.9", "the nearest that works is keep 2"),
    "unknown criterion": ("report {w}/stats.st --criterion best", "weighted_ean"),
    "diff of two kinds": ("diff {w}/stats.st {w}/half.json", "give two of a kind"),
    "diff of text": ("diff {w}/text {w}/text", "text"),
    "diff of nothing": ("diff {w}/stats.st {w}/none", "No such file"),
    "diff at an odd ratio": ("diff {w}/stats.st {w}/other.st --ratio 2", "ratio is 2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line(w: Path, mistake: str) -> None:
    line, named = MISTAKES[mistake]
    before = {path: path.stat().st_mtime_ns for path in w.iterdir()}
    given = line.format(w=w).split()
    if given[0] == "report":
        given += ["--overwrite", *([] if "--out" in given else ["--out", f"{w}/new.html"])]
    assert named in refused(*given)
    assert {path: path.stat().st_mtime_ns for path in w.iterdir()} == before


def test_diff(w: Path) -> None:
    code, out, _ = invoke("diff", w / "stats.st", w / "stats.st")
    assert code == 0 and out.strip().endswith("are equal bit for bit")
    found = run_json("diff", w / "stats.st", w / "other.st", "--ratio", 0.25)
    assert not found["equal_bits"] and not found["same"] and found["kind"] == "statistics"
    assert all(len(one["first_keeps"]) <= 2 for one in found["layers"].values())
    code, out, _ = invoke("diff", w / "stats.st", w / "other.st")
    assert code == 0 and "say the same of model, text and options" in out
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit() and "%" in line[:12]]
    assert out.count("of the dropped experts in common") == 1 and "only A keeps" in out and rows
    code, out, _ = invoke("diff", w / "half.json", w / "quarter.json")
    assert code == 0 and "0.25" in out and "ranks" not in out and "only B keeps" in out
    code, out, _ = invoke("diff", w / "stats.st", w / "three.st")
    assert code == 0 and "note: layers are not compared: 2 layers against 3" in out


def test_diff_of_what_differs_in_words_alone(w: Path) -> None:
    stats = madeup(2)
    stats.data[0]["seq_len"] = 99
    stats.save(w / "later.st", overwrite=True)
    out = invoke("diff", w / "stats.st", w / "later.st")[1]
    assert "text: seq_len  64  99" in out and "all exact sums are equal" in out
    plan = make_plan(stats, ratio="0.50")
    plan.save(w / "again.json", overwrite=True)
    assert "both keep the same experts" in invoke("diff", w / "half.json", w / "again.json")[1]
