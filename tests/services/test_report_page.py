"""The report of a real search, and hostile texts in one, in a real browser."""

import re
import shutil
from html import escape
from pathlib import Path

import pytest
from markupsafe import Markup
from plotly.graph_objects import Bar, Figure

from search.page import chart, render
from search.report import REPORT_FILE, main

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory):
    """The report of a copy of the finished search, written again by its own command."""
    copy = tmp_path_factory.mktemp("copy") / "runs"
    shutil.copytree(finished.output, copy)
    folder = copy / finished.folder.relative_to(finished.output)
    (folder / REPORT_FILE).unlink()
    assert main([str(folder)]) == 0
    return folder / REPORT_FILE


class Visit:
    """A page that was opened, with what it asked for and complained of."""

    def __init__(self, browser, file, viewport, **options):
        self.page = browser.new_page(viewport=viewport, **options)
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(Path(file).as_uri())
        self.page.wait_for_load_state("load")

    @property
    def asked_for(self):
        """The requests but for what the file itself holds."""
        return [url for url in self.requests if not url.startswith("data:")]


@pytest.fixture(scope="module")
def visit(browser):
    """Open files, and close them again."""
    opened = []

    def call(file, viewport, **options):
        opened.append(Visit(browser, file, viewport, **options))
        return opened[-1]

    yield call
    for each in opened:
        each.page.close()


@pytest.fixture(scope="module", params=["desktop", "phone"])
def opened(request, visit, report, screenshots):
    """The report on a desktop in light, and on a phone in dark colours."""
    viewport, scheme = {"desktop": (DESKTOP, "light"), "phone": (PHONE, "dark")}[request.param]
    opened = visit(report, viewport, color_scheme=scheme)
    opened.page.screenshot(path=screenshots / f"report-{request.param}.png", full_page=True)
    return opened


def test_it_opens_without_complaint_or_request(opened, report):
    assert opened.complaints == []
    assert opened.asked_for == [report.as_uri()]


def test_the_pictures_are_there(opened):
    widths = opened.page.eval_on_selector_all("img", "all => all.map(each => each.naturalWidth)")

    # Of 8 prompts, 4 as they come and at most 4 that gained or lost, three pictures each.
    assert len(widths) >= 3 * 4
    assert set(widths) == {40}


def test_the_charts_are_drawn(opened):
    drawn = opened.page.eval_on_selector_all(
        ".chart", "all => all.map(each => each.querySelectorAll('svg.main-svg path').length)"
    )

    # Wins and losses, the history, three maps and the parallel coordinates.
    assert len(drawn) == 6
    assert all(drawn)


def test_nothing_is_wider_than_the_screen(opened):
    width = opened.page.evaluate("document.documentElement.scrollWidth")

    assert width <= opened.page.viewport_size["width"]


def test_the_verdict_is_on_the_first_screen(opened):
    heading = opened.page.locator("h1")
    box = heading.bounding_box()

    assert re.match("Better|Worse|No difference shown", heading.inner_text())
    assert box["y"] + box["height"] < 400


def test_pictures_of_a_prompt_stand_side_by_side_even_on_a_phone(opened):
    row = opened.page.locator(".row").first.locator("img")
    boxes = [row.nth(number).bounding_box() for number in range(row.count())]

    assert len({box["y"] for box in boxes}) == 1
    assert all(box["width"] >= 80 for box in boxes)


def test_code_is_copied_and_runs(opened, report, tmp_path, monkeypatch):
    page = opened.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    block = page.locator("#use .code").first
    block.locator("button").click()
    block.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")

    assert copied == block.locator("code").inner_text()
    if page.viewport_size == DESKTOP:  # Once is enough.
        monkeypatch.chdir(report.parent)
        exec(copied.replace('"picture.png"', repr(str(tmp_path / "picture.png"))), {})
        assert (tmp_path / "picture.png").is_file()


# --- hostile texts ---------------------------------------------------------------------------

ATTACK = "</script><script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)>"
EMPTY = {
    **dict.fromkeys(("groups", "reranked", "notes", "maps", "spent", "stages", "found"), ()),
    **dict.fromkeys(("failures", "made_with", "stage_names", "scores"), ()),
    **dict.fromkeys(("state", "validation", "history", "parallel", "use"), None),
    "name": "a model",
    "verdict": {"headline": "Nothing", "kind": "neutral", "sentence": "at all"},
    "keeps_pictures": True,
    "num_steps": 0,
    "num_complete": 0,
    "importance": "unknown",
    "command": "none",
}


@pytest.fixture
def filled(tmp_path, visit):
    """Fill in a report with texts of anybody's, and open it."""

    def call(**content):
        file = tmp_path / "page.html"
        file.write_bytes(render("report.html", **{**EMPTY, **content}))
        return visit(file, DESKTOP)

    return call


def test_hostile_texts_are_shown_and_do_nothing(filled):
    opened = filled(
        name=ATTACK,
        state=ATTACK,
        verdict={"headline": ATTACK, "kind": '"><script>alert(3)</script>', "sentence": ATTACK},
        found=[(ATTACK, ATTACK)],
        history=chart(Figure(Bar(x=[escape(ATTACK)], y=[1], customdata=[ATTACK])), ATTACK),
        command=ATTACK,
    )
    page = opened.page

    assert page.title().startswith(ATTACK)
    for place in ("h1", ".notice", "th", "code", "svg.main-svg .xtick"):
        assert page.locator(place).first.text_content() == ATTACK
    assert page.locator("img").count() == 0
    assert page.evaluate("document.scripts.length") == 3  # Plotly, ours, and the chart's data.
    assert len(opened.asked_for) == 1
    assert opened.complaints == []


def test_no_script_runs_but_the_pages_own(filled):
    """Even if a text came through unescaped."""
    opened = filled(state=Markup("<script>window.ran = true</script><img src=http://[::1]:9/x>"))

    assert opened.page.evaluate("window.ran") is None
    assert len(opened.complaints) == 2
    assert all("Content Security Policy" in each for each in opened.complaints)
