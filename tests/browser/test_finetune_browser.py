"""The report of fine-tunings in a real headless Chromium: drawn, readable on a phone, dark, printed, without network.

Run: python -m pytest tests/browser/test_finetune_browser.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autorev.report.render import render_html
from tests.helpers import finetune_examples as examples
from tests.helpers.chromium import (
    INK,
    MEASURE_PLOTS,
    PAPER,
    background,
    drawn,
    ink_of_plot,
    open_page,
    page_order,
    print_page,
    requests,
    see,
)

pytestmark = pytest.mark.browser

PAGES = {
    "scheduled": lambda: [examples.scheduled()],
    "calibrated": lambda: [examples.calibrated()],
    "interrupted": lambda: [examples.interrupted()],
    "begun": lambda: [examples.begun()],
    "hostile": lambda: [examples.hostile()],
    "many": lambda: [*examples.many(), examples.hostile()],
}


def show(browser: Any, directory: Path, name: str, width: int = 1280, theme: str = "light") -> None:
    """Open a page in a window of `width` CSS pixels."""
    page = render_html(PAGES[name](), f"autorev report {name}")
    open_page(browser, directory / f"{name}.html", page, width, theme)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1280, 400])
def test_every_plot_is_drawn_when_seen_and_nothing_overflows(
    browser: Any, tmp_path: Path, name: str, width: int
) -> None:
    """On a desk and on a phone: no error, no request, no scrolling sideways, and every figure has something in it."""
    show(browser, tmp_path, name, width)
    ids = page_order(browser)
    see(browser, ids)
    assert drawn(browser) == ids
    for plot in browser.execute_script(MEASURE_PLOTS):
        assert 0 < plot["width"] <= width, plot
        assert any(size > 0 for size in plot["traces"]) or plot["id"] == "sensitivity", plot
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []
    # The map of the sensitivities is an image that the page itself paints: no request leaves.
    asked = {each for each in requests(browser) if not each.startswith("data:image/png;")}
    assert asked == {(tmp_path / f"{name}.html").as_uri()}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colors_follow_the_system_and_the_switch(browser: Any, tmp_path: Path, theme: str) -> None:
    """Page and drawn plots change together; the map of the sensitivities is an image, and changes too."""
    other = "dark" if theme == "light" else "light"
    show(browser, tmp_path, "calibrated", theme=theme)
    see(browser, ["loss", "sensitivity"])
    heat = "return document.querySelector('#sensitivity .heatmaplayer image').href.baseVal"
    assert (background(browser), ink_of_plot(browser)) == (PAPER[theme], INK[theme])
    before = browser.execute_script(heat)
    browser.find_element("id", "theme").click()
    assert (background(browser), ink_of_plot(browser)) == (PAPER[other], INK[other])
    assert browser.execute_script(heat) != before
    assert browser.get_log("browser") == []


def test_prints_everything_in_light_colors(browser: Any, tmp_path: Path) -> None:
    """A dark page becomes a PDF with every figure and every fold, and is as before afterwards."""
    show(browser, tmp_path, "scheduled", theme="dark")
    see(browser, page_order(browser)[:1])
    browser.execute_script("""
        window.seen = {};
        addEventListener("beforeprint", () => {
            seen.closed = document.querySelectorAll("details:not([open])").length;
            seen.drawn = [...document.querySelectorAll(".js-plotly-plot")].map(plot => plot.id);
            seen.widths = [...document.querySelectorAll(".plot svg.main-svg")].map(svg => svg.clientWidth);
        });
    """)
    pdf = print_page(browser)
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
    seen = browser.execute_script("return seen")
    assert seen["closed"] == 0 and seen["drawn"] == page_order(browser)
    assert max(seen["widths"]) <= 703, "the width of A4 without its margins"
    assert background(browser) == PAPER["dark"]


def test_is_readable_without_scripts(browser: Any, tmp_path: Path) -> None:
    """Verdict, figures and chains do not depend on a plot."""
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    show(browser, tmp_path, "scheduled")
    text = browser.find_element("tag name", "main").text
    for expected in ("Ship it reversible", "autorev.load", "2.880", "513 MiB", "rebuilt bit for bit", "model.layers"):
        assert expected in text
