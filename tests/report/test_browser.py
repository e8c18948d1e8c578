"""The report in a real browser: wide and narrow, light and dark."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from sparsecod_mcore.report.page.page import FIGURES, write_report
from tests.distributed.jobs import REPOSITORY
from tests.report.example_runs import write_example_run, write_ladder

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")

LOAD_SECONDS = 2.0
UNMEASURED_BY_DEMO = 0  # figures
_UNDRAWN = """() => [...document.querySelectorAll(".plot")].filter((plot) => {
  const [box, picture] = [plot.getBoundingClientRect(), plot.querySelector("img")];
  const lines = [...plot.querySelectorAll("svg path:not(.grid)")];
  const drawn = picture ? picture.naturalWidth > 0 : lines.some((path) => path.getBBox().width > 10);
  return !drawn || box.width < 100 || box.height < 100 || box.left < 0 || box.right > innerWidth;
}).map((plot) => plot.ariaLabel)"""
_OVERLAPS = """() => [...document.querySelectorAll(".x-ticks, .y-ticks")].flatMap((axis) => {
  const boxes = [...axis.children].map((tick) => tick.getBoundingClientRect());
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  return boxes.some((a, i) => boxes.some((b, j) => i < j && meet(a, b))) ? [axis.textContent] : [];
})"""
_OUTSIDE = """() => [...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width && !element.closest("svg, [hidden]") && (box.left < -1 || box.right > innerWidth + 1);
}).map((element) => element.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of five runs, and one that was killed."""
    folder = tmp_path_factory.mktemp("report")
    killed = write_example_run(folder / "killed", layers=6, steps=30, target=90, probes=False, scores=False)
    write_report([*write_ladder(folder, layers=8, steps=60), killed], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def demo() -> Path:
    """The latest report of `make demo` in this clone."""
    reports = (REPOSITORY / "runs").glob("demo-*/report.html")
    report = max(reports, key=lambda path: path.stat().st_mtime, default=None)
    if report is None:
        pytest.skip("there is no report of make demo in runs/")
    return report


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to have as root
        with playwright.chromium.launch(executable_path=CHROMIUM, args=arguments) as browser:
            yield browser


def opened(browser: Browser, report: Path, width: int, scheme: str) -> tuple[Page, list[str]]:
    """The page, and what it complains about, which grows."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else complaints.append(asked.url))
    page.goto(report.as_uri())
    return page, complaints


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("of", ["ladder", "demo"])
def test_report(browser: Browser, request: pytest.FixtureRequest, of: str, width: int, scheme: str) -> None:
    report: Path = request.getfixturevalue(of)
    page, complaints = opened(browser, report, width, scheme)
    navigation = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < navigation < 1000 * LOAD_SECONDS and report.stat().st_size < 5e6
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_OUTSIDE) == [] and page.evaluate(_OVERLAPS) == []
    assert page.evaluate(_UNDRAWN) == []
    figures = page.locator("figure").all()
    assert len(figures) == len(FIGURES) - (of == "demo") * UNMEASURED_BY_DEMO
    for figure in figures:
        _point_at(page, figure.locator(".plot").last, width)
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    serious = [
        f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found if one["impact"] in ("serious", "critical")
    ]
    assert serious == [] and complaints == []
    page.close()


def _point_at(page: Page, plot: Locator, width: int) -> None:
    """It says something of itself under the pointer, inside the window."""
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.3 * box["height"])
    tip = page.locator("#tip")
    assert tip.is_visible() and any(letter.isdigit() for letter in tip.inner_text())
    place = tip.bounding_box()
    assert place is not None and place["x"] >= 0 and place["x"] + place["width"] <= width and place["y"] >= 0
    page.mouse.move(0, 0)
    assert not tip.is_visible()


@pytest.mark.slow
def test_keys_and_paper(browser: Browser, ladder: Path) -> None:
    """The arrow keys go from point to point; a print has the evidence that is folded away on screen."""
    page, complaints = opened(browser, ladder, 1440, "light")
    page.locator("#variance-depth .plot").focus()
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        said.append(page.locator("#tip b").inner_text())
    assert said == ["layer 0", "layer 1", "layer 2", "layer 1"]
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.locator("#causal .plot").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert "layer skipped 1" in page.locator("#tip").inner_text()
    evidence = page.locator("details p").first
    assert not evidence.is_visible()
    assert len(page.pdf()) > 10_000
    assert evidence.is_visible() and complaints == []
    page.close()
