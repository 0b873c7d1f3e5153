"""A run's page in a real browser, where there is one (see `chromium.found`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scenarios.page import write_page
from tests.scenarios.chromium import VARIABLE, Tab, found, tab
from tests.scenarios.pages import whole

pytestmark = pytest.mark.skipif(
    found() is None,
    reason=f"no Chromium on the path: install one (Debian: chromium-headless-shell), or set "
    f"{VARIABLE}",
)

LOOK = "getComputedStyle(document.body).backgroundColor"
PICTURE = "document.getElementById('timeline').toDataURL()"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    program = found()
    assert program is not None
    with tab(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every part, full of hostile text."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, whole())
    return path


def press(browser: Tab, key: str, on: str) -> None:
    """A key, with the focus on an element."""
    browser.value(f"document.querySelector('{on}').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    browser.call("Input.dispatchKeyEvent", type="keyUp", key=key)


def test_no_complaint_no_request_and_nothing_sticks_out(browser: Tab, report: Path) -> None:
    """On a phone and a desktop, light and dark; hostile text has not run."""
    looks = set()
    for width in (375, 1280):
        for scheme in ("light", "dark"):
            browser.open(report, width, scheme)
            assert browser.complaints == []
            assert browser.requests == []
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("typeof window.pwned") == "undefined"
            looks.add((scheme, browser.value(LOOK)))
    assert len(looks) == len({colour for _, colour in looks}) == 2


def test_curves_are_read_and_the_timeline_zooms_by_keys(browser: Tab, report: Path) -> None:
    """Without a pointer; buttons do the same."""
    browser.open(report, 1280, "light")
    press(browser, "ArrowLeft", "svg.chart.wide")
    said = browser.value("document.getElementById('loss-at').textContent")
    assert said.startswith("step 59  ·  private: training 3.")
    whole_view = browser.value(PICTURE)
    press(browser, "+", "#timeline")
    zoomed = browser.value(PICTURE)
    press(browser, "ArrowRight", "#timeline")
    moved = browser.value(PICTURE)
    assert len({whole_view, zoomed, moved}) == 3
    press(browser, "0", "#timeline")
    assert browser.value(PICTURE) == whole_view
    browser.value("document.querySelector('[data-do=closer]').click()")
    assert browser.value(PICTURE) not in (whole_view, zoomed, moved)
    assert browser.complaints == []


def test_the_pointer_reads_both(browser: Tab, report: Path) -> None:
    """Values of the curves, and what a bar of the timeline was."""
    browser.open(report, 1280, "dark", height=6000)
    for at, reads, has in (
        ("svg.chart.wide", "loss-at", "clear: training"), ("#timeline", "span-at", "s, from 3"),
    ):  # fmt: skip
        place = "document.querySelector('%s').getBoundingClientRect().%s"
        x, y = (browser.value(place % (at, side)) for side in ("left", "top"))
        for dx in range(100, 160, 4):
            browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + dx, y=y + 34)
        assert has in browser.value(f"document.getElementById('{reads}').textContent")


def test_such_a_test_would_notice(browser: Tab, tmp_path: Path) -> None:
    """An error, a request, and what the policy forbids."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><body style='width: 2000px'><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('loud'); missing()</script>"
    )
    browser.open(bad, 375, "light")
    told = " ".join(browser.complaints)
    assert "loud" in told
    assert "missing is not defined" in told
    assert browser.requests == ["http://127.0.0.1:9/x.png"]
    assert browser.value("document.documentElement.scrollWidth") > 375
