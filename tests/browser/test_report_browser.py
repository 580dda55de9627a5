"""The HTML report in a real headless Chromium: drawn, readable on a phone, printed, dark, without network.

Run: python -m pytest tests/browser/test_report_browser.py
Needs Debian's chromium and chromium-driver; as root they are installed when they are missing.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autorev.report.figures import figures
from autorev.report.html import render_html
from tests import analysis_examples as examples

pytestmark = pytest.mark.browser

EXAMPLES = {
    "smollm2": examples.smollm2,
    "llama_lora": examples.llama_lora,
    "bert": examples.bert,
    "clip": examples.clip,
    "unpredicted": examples.unpredicted,
    "hostile": examples.hostile,
}
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 28)"}
# Per plot: the size of its drawing, and of every trace in it.
MEASURE_PLOTS = """
return [...document.querySelectorAll(".js-plotly-plot")].map(plot => ({
    id: plot.id,
    width: plot.querySelector("svg.main-svg").getBoundingClientRect().width,
    traces: [...plot.querySelectorAll("g.trace")].map(trace => {
        const box = trace.getBoundingClientRect();
        return box.width + box.height;
    }),
}));
"""


@pytest.fixture(scope="session")
def programs() -> tuple[str, str]:
    """Chromium and its driver, installed if this is root and they are missing."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        reason = install()
        if reason:
            print(f"\nSKIPPED: no test of the report in a browser: {reason}", file=sys.__stderr__)
            pytest.skip(reason)
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver
    return chromium, driver


def install() -> str:
    """Why Chromium could not be installed; empty when it was."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("apt-get"):
        return "chromium and chromedriver are missing; as root: apt-get install chromium chromium-driver"
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "chromium", "chromium-driver"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}"
    return ""


@pytest.fixture
def browser(programs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Chromium with an empty profile that logs its console and its network."""
    from selenium import webdriver

    # The driver is spoken to over localhost, which a proxy cannot reach.
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def show(browser: Any, directory: Path, example: str, width: int = 1280, theme: str = "light") -> None:
    """Open the report of an example in a window of `width` CSS pixels."""
    path = directory / f"{example}.html"
    path.write_text(render_html(EXAMPLES[example](), f"autorev analyze {example}"), encoding="utf-8")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())


def background(browser: Any) -> str:
    """The colour of the page."""
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def ink_of_plot(browser: Any) -> str:
    """The colour of the letters in the first plot."""
    return browser.execute_script("return getComputedStyle(document.querySelector('.ytick text')).fill")


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("width", [1280, 400])
def test_every_plot_is_drawn_and_nothing_overflows(browser: Any, tmp_path: Path, example: str, width: int) -> None:
    """On a desk and on a phone: no error, no request, no scrolling sideways, and every trace has a size."""
    show(browser, tmp_path, example, width)
    plots = browser.execute_script(MEASURE_PLOTS)
    assert [plot["id"] for plot in plots] == [
        place for place in page_order(browser) if place in figures(EXAMPLES[example]())
    ]
    assert len(plots) == len(figures(EXAMPLES[example]()))
    for plot in plots:
        assert 0 < plot["width"] <= width, plot
        assert plot["traces"] and all(size > 0 for size in plot["traces"]), plot
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []
    assert requests(browser) == {(tmp_path / f"{example}.html").as_uri()}


def page_order(browser: Any) -> list[str]:
    """The ids of the plots' places, from top to bottom."""
    return browser.execute_script("return [...document.querySelectorAll('.plot')].map(place => place.id)")


def requests(browser: Any) -> set[str]:
    """Every address that the page asked for; Chromium's own start page is not ours."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {each["request"]["url"] for each in sent if not each["documentURL"].startswith(("chrome", "about", "data"))}


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
    browser.execute_script("""
        window.seen = {};
        addEventListener("beforeprint", () => {
            seen.closed = document.querySelectorAll("details:not([open])").length;
            seen.widths = [...document.querySelectorAll(".plot svg.main-svg")].map(svg => svg.clientWidth);
            seen.ink = getComputedStyle(document.querySelector(".ytick text")).fill;
        });
    """)
    paper = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", paper)["data"])
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
