"""The page as a whole; `test_report_browser.py` opens it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from madeup import HOSTILE, madeup
from matplotlib.figure import Figure

from reap.errors import ReapError
from reap.files.kinds import kind_of
from reap.files.outputs import REPORT, format_of
from reap.planning.plan import make_plan
from reap.report import page
from reap.report.contents import Drawing, drawings
from reap.report.page import write_report
from reap.report.style import Theme, canvas, themed
from reap.statistics.stats import Statistics

VOID = {"meta", "br", "img", "source", "link", "input"}
SVG_VOID = {"path", "use", "rect", "image", "circle", "line"}


class Outline(HTMLParser):
    """Tags that are open, ids, links and headings of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID | {"li"}:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found["href"] or ""] if tag == "a" else []
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)
        for name in ("src", "srcset", "action"):
            assert (found.get(name) or "data:").startswith("data:")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag != "li":
            assert self.open.pop() == tag


@themed
def dot(theme: Theme) -> Figure:
    return canvas(1, 1)[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of nothing."""

    def drawn(*given: Any) -> Iterator[Drawing]:
        return (replace(one, draw=dot, given=()) for one in drawings(*given))

    monkeypatch.setattr(page, "drawings", drawn)


def written(tmp_path: Path, stats: Statistics, plans: Any = (), **options: Any) -> str:
    path = tmp_path / "page.html"
    write_report(stats, plans, path, overwrite=True, **options)
    return path.read_text()


def test_the_page_is_whole(tmp_path: Path) -> None:
    stats = madeup(3, pairs=True)
    plans = {name: make_plan(stats, name, ratio=0.5) for name in ("reap", "ean", "frequency")}
    text = written(tmp_path, stats, plans)
    seen = Outline(text)
    assert len(seen.ids) == len(set(seen.ids))
    assert {link.removeprefix("#") for link in seen.links} <= set(seen.ids)
    assert seen.headings[0] == "h1" and seen.headings.count("h1") == 1
    assert "default-src 'none'" in text and "http://" not in text.replace("http://www.w3.org", "")
    assert text.count('class="drawing" data-box=') == 3
    # What figures show is there as text.
    lists = re.findall(r'<ol class="experts"[^>]*>(.*?)</ol>', text, re.S)
    assert len(lists) == 3
    for items, kept in zip(lists, plans["reap"].kept.values(), strict=True):
        struck = ["<s>" in item for item in items.split("<li>")[1:]]
        assert [expert for expert, gone in enumerate(struck) if not gone] == list(kept)
    assert "dropped by A, B" in text


def test_the_same_input_is_the_same_page(tmp_path: Path) -> None:
    assert written(tmp_path, madeup(1)) == written(tmp_path, madeup(1))


def test_what_was_not_recorded_says_how_to(tmp_path: Path, quick: None) -> None:
    text = written(tmp_path, madeup(domains=("one",), data=[]), criterion="peak")
    for hint in (
        "reap calibrate --pairs</code> records them",
        "give <code>reap calibrate</code> more than one <code>--data</code>",
        "The criterion peak has no standard error",
        "The statistics do not say which text they are of. <code>reap calibrate</code> records it",
        "No evaluation was given. <code>reap evaluate",
        "No plan was given",
    ):
        assert hint in text, hint
    Outline(text)
    assert "No token chose two experts" in written(tmp_path, madeup(top_k=1, pairs=True))


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    stats = madeup(
        2, name=HOSTILE, layer_names=[f"{HOSTILE}.{i}" for i in "ab"], domains=[HOSTILE, "b"]
    )
    stats.versions[HOSTILE] = HOSTILE
    stats.data[0]["run"] = {HOSTILE: HOSTILE}
    stats.data[0]["ended"] = HOSTILE
    costs = tmp_path / "costs.json"
    costs.write_text('{"<script>": {"<b>": {"tokens": 1, "loss": 1.0, "teacher_loss": 0.5}}}')
    text = written(tmp_path, stats, {HOSTILE: make_plan(stats, ratio=0.5)}, evaluation=costs)
    Outline(text)
    assert text.count("<script>") == 1 and "<b>" not in text and "\x00" not in text
    assert "\u202e" not in text and "&lt;script&gt;" in text
    assert "[stats]" not in text


def test_where_it_may_be_written(tmp_path: Path, quick: None) -> None:
    stats, out = madeup(), tmp_path / "page.html"
    stats.save(tmp_path / "stats")
    made = write_report(tmp_path / "stats", path=out)
    assert made.size == out.stat().st_size and format_of(out) == REPORT
    assert kind_of(out) == "a report"
    with pytest.raises(ReapError, match="page.html exists: choose another name"):
        write_report(stats, path=out)
    write_report(stats, path=out, overwrite=True)
    for name, content in (("notes.html", "<!doctype html><p>mine"), ("x.txt", "text")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ReapError, match="it is not a report of ours"):
            write_report(stats, path=tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_text() == content
    with pytest.raises(ReapError, match="which is read"):
        write_report(tmp_path / "stats", path=tmp_path / "stats", overwrite=True)


def test_where_figures_may_be_written(tmp_path: Path, quick: None) -> None:
    stats, folder = madeup(2), tmp_path / "figures"
    made = write_report(stats, path=tmp_path / "a.html", figures=folder)
    assert sorted(made.files) == sorted(folder.iterdir()) and len(made.files) == 2 * len(
        made.figures
    )
    with pytest.raises(ReapError, match="figures exists: choose another folder"):
        write_report(stats, path=tmp_path / "b.html", figures=folder)
    write_report(stats, path=tmp_path / "b.html", figures=folder, overwrite=True)
    (folder / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(ReapError, match="photo.png is no figure of ours"):
        write_report(stats, path=tmp_path / "c.html", figures=folder, overwrite=True)
    with pytest.raises(ReapError, match="a.html exists and is not a folder"):
        write_report(stats, path=tmp_path / "c.html", figures=tmp_path / "a.html")
    with pytest.raises(ReapError, match="create the folder first"):
        write_report(stats, path=tmp_path / "c.html", figures=tmp_path / "no" / "folder")
    assert not (tmp_path / "c.html").exists()


def test_plans_are_named(tmp_path: Path, quick: None) -> None:
    stats = madeup(2)
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        make_plan(stats, ratio=0.5).save(tmp_path / place / "plan.json")
    make_plan(stats, ratio=0.25).save(tmp_path / "quarter.json")
    one = tmp_path / "a" / "plan.json"
    text = written(tmp_path, stats, [one, tmp_path / "quarter.json"])
    assert "<h3>A: plan</h3>" in text and "<h3>B: quarter</h3>" in text
    said = written(tmp_path, stats, [one, tmp_path / "b" / "plan.json"])
    assert said.count("plan.json</h3>") == 2
    with pytest.raises(ReapError, match="is given twice"):
        written(tmp_path, stats, [one, one])
    with pytest.raises(ReapError, match="give a list of files, or plans by name"):
        written(tmp_path, stats, str(one))
    with pytest.raises(ReapError, match="plans is None: give a list of files"):
        written(tmp_path, stats, None)
    with pytest.raises(ReapError, match="is statistics, not a plan"):
        stats.save(tmp_path / "stats")
        written(tmp_path, stats, [tmp_path / "stats"])


@pytest.mark.slow
def test_sixty_layers_of_384_experts(tmp_path: Path) -> None:
    """In CPU time, which programs beside it lengthen less than that of a clock."""
    stats = madeup(60, 384, 8, tokens=100)
    start = time.process_time()
    assert len(written(tmp_path, stats)) < 5_000_000
    assert time.process_time() - start < 10


def test_no_plan_is_lost_for_its_name(tmp_path: Path, quick: None) -> None:
    """Names are shortened in the middle, where these two differ."""
    stats = madeup(2)
    names = ["x" * 40 + middle + "y" * 40 for middle in "AB"]
    plans = {name: make_plan(stats, keep=keep) for name, keep in zip(names, (4, 6), strict=True)}
    text = written(tmp_path, stats, plans)
    assert text.count("<h3>A: x") == text.count("<h3>B: x") == 1 and "(2)</h3>" in text
    assert "heatmap-b" in text


def test_figures_are_those_of_one_report(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, folder, out = madeup(2), tmp_path / "figures", tmp_path / "a.html"
    plans = {name: make_plan(stats, keep=keep) for name, keep in (("a", 4), ("b", 6))}
    write_report(stats, plans, out, figures=folder)
    both = sorted(path.name for path in folder.iterdir())
    assert "heatmap-b.svg" in both

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(page.style, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            write_report(stats, path=out, figures=folder, overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            write_report(stats, path=tmp_path / "b.html", figures=tmp_path / "new")
    assert sorted(path.name for path in folder.iterdir()) == both
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "figures"]
    made = write_report(stats, {"a": plans["a"]}, out, figures=folder, overwrite=True)
    assert sorted(folder.iterdir()) == made.files
    assert not (folder / "heatmap-b.svg").exists()


def test_the_page_is_apart_from_the_figures(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    for out, figures in ((folder / "a.html", folder), (tmp_path / "b", tmp_path / "b")):
        with pytest.raises(ReapError, match="is or lies in .*, the folder of figures"):
            write_report(madeup(2), path=out, figures=figures)
    monkeypatch.chdir(folder)
    with pytest.raises(ReapError, match="the folder that we are in"):
        write_report(madeup(2), path=tmp_path / "c.html", figures=".")
    assert not list(folder.iterdir()) and [p.name for p in tmp_path.iterdir()] == ["figures"]
