"""Pages as HTML files that need nothing else: no network, no fonts, no second file; the same bytes every time.

plotly is in the file, compressed: the page inflates it by the browser's own DecompressionStream when it is opened. That
is 2 MB instead of 4.8 for a library that draws, hovers and prints; of the page itself are about 0.2.
"""

from __future__ import annotations

import base64
import gzip
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from autorev.format import visible
from autorev.report import palette
from autorev.report.document import Page
from autorev.words import CATEGORY_TITLES


def to_html(page: Page) -> str:
    """The page, every name in it escaped and every control character shown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    return environment.get_template("page.html.jinja").render(
        page=page,
        figures={id: _visible({"data": each.data, "layout": each.layout}) for id, each in page.figures.items()},
        palette=palette,
        titles=CATEGORY_TITLES,
        kind=lambda part: "" if isinstance(part, str) else type(part).__name__,
        plotly=packed_plotly(),
    )


@cache
def packed_plotly() -> str:
    """plotly's library as a page holds it."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _visible(value: Any) -> Any:
    """A figure's texts as every other: names of modules stand in them."""
    if isinstance(value, dict):
        return {key: _visible(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_visible(each) for each in value]
    return visible(value) if isinstance(value, str) else value


def _finalize(value: Any) -> Any:
    """Every text that is written shows its control characters first; escaping comes after this."""
    return value if not isinstance(value, str) or isinstance(value, Markup) else visible(value)
