"""An analysis as one HTML file that needs nothing else: no network, no fonts, no second file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from autorev.analysis import Analysis
from autorev.report import format, palette, rows, words
from autorev.report.figures import figures

_templates = Path(__file__).parent / "templates"


def render_html(analysis: Analysis, command: str) -> str:
    """The report of `analysis`, the same bytes every time; `command` is what made it, shown at its end."""
    drawn = {name: json.loads(figure.to_json()) for name, figure in figures(analysis).items()}
    return (
        _environment()
        .get_template("analysis.html.jinja")
        .render(
            analysis=analysis,
            command=command,
            figures=drawn,
            # Markup: the library is ours to trust, and it is not escaped inside a script.
            plotly=Markup(get_plotlyjs()),
            strategies=rows.strategy_rows(analysis),
            scale=rows.bar_scale(analysis) if analysis.predictions else (0, None),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.globals.update(rows=rows, words=words, palette=palette, f=format, zip=zip)
    return environment


def _finalize(value: Any) -> Any:
    """Every text that is written loses its control characters first; escaping comes after this."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in value)
