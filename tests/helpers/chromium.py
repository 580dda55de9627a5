"""What the tests of the reports ask a browser."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 120
"""Seconds: a browser that has just been started on a busy machine took 90 for its first page."""
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 28)"}
INK = {"light": "rgb(22, 24, 29)", "dark": "rgb(240, 241, 244)"}
# Per plot: the size of its drawing, and of every trace in it.
MEASURE_PLOTS = """
const plots = [...document.querySelectorAll(".js-plotly-plot")].filter(plot => plot.querySelector("svg.main-svg"));
return plots.map(plot => ({
    id: plot.id,
    width: plot.querySelector("svg.main-svg").getBoundingClientRect().width,
    traces: [...plot.querySelectorAll("g.trace")].map(trace => {
        const box = trace.getBoundingClientRect();
        return box.width + box.height;
    }),
}));
"""


def open_page(browser: Any, path: Path, page: str, width: int = 1280, theme: str = "light") -> None:
    """Write `page` and open it in a window of `width` CSS pixels."""
    path.write_text(page, encoding="utf-8")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())


def print_page(browser: Any) -> bytes:
    """The page as a PDF on A4."""
    paper = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
    return base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", paper)["data"])


def background(browser: Any) -> str:
    """The colour of the page."""
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def ink_of_plot(browser: Any) -> str:
    """The colour of the letters in the first plot."""
    return browser.execute_script("return getComputedStyle(document.querySelector('.ytick text')).fill")


def page_order(browser: Any) -> list[str]:
    """The ids of the plots' places, from top to bottom."""
    return browser.execute_script("return [...document.querySelectorAll('.plot')].map(place => place.id)")


def requests(browser: Any) -> set[str]:
    """Every address that the page asked for; Chromium's own start page is not ours."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {each["request"]["url"] for each in sent if not each["documentURL"].startswith(("chrome", "about", "data"))}


def drawn(browser: Any) -> list[str]:
    """The ids of the figures that are drawn, from top to bottom."""
    return [plot["id"] for plot in browser.execute_script(MEASURE_PLOTS)]


def see(browser: Any, ids: list[str]) -> None:
    """Scroll to every place and wait until its figure is drawn."""
    for each in ids:
        browser.execute_script("document.getElementById(arguments[0]).scrollIntoView({block: 'center'})", each)
        WebDriverWait(browser, PATIENCE, poll_frequency=0.02).until(lambda driver, each=each: each in drawn(driver))
