"""The HTML report in a real headless Chromium: drawn, readable on a phone, printed, dark, without network.

Run: python -m pytest tests/browser/test_report_browser.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autorev.report.render import render_html
from tests.helpers import analysis_examples as examples
from tests.helpers.chromium import (
    MEASURE_PLOTS,
    PAPER,
    background,
    ink_of_plot,
    open_page,
    print_page,
    requests,
    see,
)

pytestmark = pytest.mark.browser

UNFOLDED = "return [...document.querySelectorAll('.plot')].filter(each => each.checkVisibility()).map(each => each.id)"
EXAMPLES = {
    "smollm2": examples.smollm2,
    "llama_lora": examples.llama_lora,
    "bert": examples.bert,
    "clip": examples.clip,
    "unpredicted": examples.unpredicted,
    "hostile": examples.hostile,
}


def show(browser: Any, directory: Path, example: str, width: int = 1280, theme: str = "light") -> None:
    """Open the report of an example in a window of `width` CSS pixels."""
    open_page(browser, directory / f"{example}.html", render_html([EXAMPLES[example]()], example), width, theme)


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("width", [1280, 400])
def test_every_plot_is_drawn_and_nothing_overflows(browser: Any, tmp_path: Path, example: str, width: int) -> None:
    """On a desk and on a phone: no error, no request, no scrolling sideways, and every trace has a size."""
    show(browser, tmp_path, example, width)
    ids = browser.execute_script(UNFOLDED)
    see(browser, ids)
    plots = browser.execute_script(MEASURE_PLOTS)
    assert [plot["id"] for plot in plots] == ids
    for plot in plots:
        assert 0 < plot["width"] <= width, plot
        assert plot["traces"] and all(size > 0 for size in plot["traces"]), plot
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []
    assert requests(browser) == {(tmp_path / f"{example}.html").as_uri()}


def test_tables_scroll_inside_their_own_box(browser: Any, tmp_path: Path) -> None:
    """The wide table of a phone can be scrolled with the keyboard, its first column staying in sight."""
    show(browser, tmp_path, "smollm2", 400)
    box = "document.querySelector('.scroll[aria-label^=Every]')"
    assert browser.execute_script(f"return {box}.scrollWidth > {box}.clientWidth && {box}.tabIndex === 0")
    browser.execute_script(f"{box}.scrollLeft = 300")
    assert browser.execute_script(f"return {box}.querySelector('tbody th').getBoundingClientRect().left") >= 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colors_follow_the_system_and_the_switch(browser: Any, tmp_path: Path, theme: str) -> None:
    """Page and plots change together, both ways."""
    other = "dark" if theme == "light" else "light"
    show(browser, tmp_path, "smollm2", theme=theme)
    see(browser, ["lead"])
    ink = {"light": "rgb(22, 24, 29)", "dark": "rgb(240, 241, 244)"}
    assert (background(browser), ink_of_plot(browser)) == (PAPER[theme], ink[theme])
    button = browser.find_element("id", "theme")
    assert button.text == other.capitalize()
    for expected in (other, theme):
        button.click()
        assert (background(browser), ink_of_plot(browser)) == (PAPER[expected], ink[expected])
    assert browser.get_log("browser") == []


def test_prints_in_light_colors_with_everything_open(browser: Any, tmp_path: Path) -> None:
    """A dark page becomes a PDF of several pages with uncut plots, and is as before afterwards."""
    show(browser, tmp_path, "smollm2", theme="dark")
    see(browser, ["lead"])
    browser.execute_script("""
        window.seen = {};
        addEventListener("beforeprint", () => {
            seen.closed = document.querySelectorAll("details:not([open])").length;
            seen.widths = [...document.querySelectorAll(".plot svg.main-svg")].map(svg => svg.clientWidth);
            seen.ink = getComputedStyle(document.querySelector(".ytick text")).fill;
        });
    """)
    pdf = print_page(browser)
    assert pdf.startswith(b"%PDF") and len(pdf) > 100_000
    assert pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") > 1
    seen = browser.execute_script("return seen")
    assert seen["closed"] == 0
    assert max(seen["widths"]) <= 703, "the width of A4 without its margins"
    assert seen["ink"] == "rgb(22, 24, 29)"
    assert background(browser) == PAPER["dark"] and ink_of_plot(browser) == "rgb(240, 241, 244)"
    assert browser.execute_script("return document.querySelectorAll('details[open]').length") == 0


def test_is_readable_without_scripts(browser: Any, tmp_path: Path) -> None:
    """Recommendation, figures and reasons do not depend on a plot."""
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    show(browser, tmp_path, "bert")
    text = browser.find_element("tag name", "main").text
    for expected in ("Use plain autograd", "5.90 GiB", examples.POST_NORM):
        assert expected in text
