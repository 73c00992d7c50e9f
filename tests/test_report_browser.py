"""Reports in a real browser: nothing is loaded, nothing complains, nothing sticks out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import NAMES, Browser, found
from madeup import HOSTILE, madeup

from reap.report import style
from reap.report.page import write_report

pytestmark = pytest.mark.skipif(found() is None, reason=f"needs one of {', '.join(NAMES)}")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    kinds = {
        "small": madeup(4, 8, pairs=True),
        "large": madeup(60, 384, 8, tokens=60, domains=("code",)),
        "hostile": madeup(
            3,
            40,
            name=HOSTILE,
            layer_names=[f"{HOSTILE}.{i}.{HOSTILE}" for i in range(3)],
            domains=[HOSTILE, *(f"domain {i} {'w' * 90}" for i in range(20))],
            tokens=20,
        ),
    }
    for name, stats in kinds.items():
        write_report(stats, path=folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in kinds}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


KINDS = ("small", "large", "hostile")
SPILLS = """[...document.querySelectorAll("body *")].filter((one) => {
  for (let at = one; at; at = at.parentElement)
    if (at.classList.contains("wide") || at.classList.contains("skip")) return false;
  return one.getBoundingClientRect().right > innerWidth + 0.5;
}).map((one) => one.outerHTML.slice(0, 200))"""

SCROLLS = """[...document.querySelectorAll(".wide")].filter(
  (one) => one.scrollWidth > one.clientWidth).length"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_whole_by_itself(
    pages: dict[str, Path], browser: Browser, kind: str, width: int
) -> None:
    page = browser.open(pages[kind], width=width)
    asked = [url for url in page.requests() if not url.startswith("data:")]
    assert asked == [pages[kind].as_uri()]
    assert page.complaints() == []
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(SPILLS) == []
    if width == 1280 and kind != "hostile":
        assert page.value(SCROLLS) == 0


def test_the_checks_see_what_they_look_for(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "bad.html").write_text(
        '<body><img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script>'
        '<div style="width: 3000px">wide</div><div class="wide" style="overflow-x: auto">'
        '<div style="width: 3000px">wide</div></div></body>'
    )
    page = browser.open(tmp_path / "bad.html")
    assert "http://127.0.0.1:9/x.png" in page.requests()
    assert page.complaints()
    assert page.value("document.documentElement.scrollWidth") > 1280
    assert len(page.value(SPILLS)) == 1
    assert page.value(SCROLLS) == 1


def test_hostile_names_are_text(pages: dict[str, Path], browser: Browser) -> None:
    page = browser.open(pages["hostile"])
    assert page.value('document.querySelector("h1").textContent').count("<script>alert(1)") == 1
    assert page.value("document.scripts.length") == 1
    assert page.value('document.querySelector("h1").children.length') == 0


@pytest.mark.parametrize("dark", [False, True])
def test_it_follows_light_and_dark(pages: dict[str, Path], browser: Browser, dark: bool) -> None:
    page = browser.open(pages["small"], dark=dark)
    theme = style.DARK if dark else style.LIGHT
    for what, colour in (("body", theme.ink), ("svg text", theme.ink)):
        field = "fill" if "svg" in what else "color"
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        shown = page.value(f'getComputedStyle(document.querySelector("{what}")).{field}')
        assert shown == f"rgb({red}, {green}, {blue})"


def test_the_keyboard_reaches_all_of_it(pages: dict[str, Path], browser: Browser) -> None:
    page = browser.open(pages["small"])
    reached = []
    for _ in range(200):
        page.press("Tab")
        at = page.value("document.activeElement.outerHTML.slice(0, 120)")
        if at.startswith("<body"):
            break
        reached.append(at)
    assert 'class="skip"' in reached[0]
    for part in ('href="#experts"', 'class="wide"', "data-box=", "<button", "<summary"):
        assert any(part in one for one in reached), part
    # Every place that takes the focus shows it.
    assert page.value('getComputedStyle(document.querySelector("a")).outlineStyle') == "none"
    page.value('document.querySelector("[data-box]").focus()')
    for key in ("ArrowDown", "ArrowRight"):
        page.press(key)
    said = page.value('document.querySelector("output").textContent')
    listed = page.value('document.querySelectorAll("ol.experts")[1].children[1].textContent')
    assert said == f"layer 4, expert 1: {listed}"


def test_tables_are_sorted_by_a_key(pages: dict[str, Path], browser: Browser) -> None:
    page = browser.open(pages["small"])
    page.value('document.querySelectorAll("#layers ~ * button, section button")[4].focus()')
    page.press("Enter")
    rows = '[...document.querySelectorAll("table.sortable")[0].tBodies[0].rows]'
    lowest = page.value(f"{rows}.map((row) => Number(row.cells[4].dataset.value))")
    assert lowest == sorted(lowest) and len(lowest) == 4
    page.press("Enter")
    assert page.value(f"{rows}.map((row) => Number(row.cells[4].dataset.value))") == lowest[::-1]


@pytest.mark.parametrize("kind", ["small", "large"])
def test_it_prints(pages: dict[str, Path], browser: Browser, kind: str) -> None:
    printed = browser.open(pages[kind], dark=True).pdf()
    assert printed.startswith(b"%PDF-") and b"%%EOF" in printed[-32:]
    assert printed.count(b"/Type /Page\n") >= 3
