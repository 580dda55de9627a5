"""HTML files that need nothing else: no network, no fonts, no second file; the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from autorev import format, words
from autorev.report import palette

_templates = Path(__file__).parent / "templates"


def render_page(template: str, figures: Mapping[str, go.Figure], **values: Any) -> str:
    """The page of a template, its figures drawn where an element has their id."""
    environment = Environment(
        loader=FileSystemLoader(_templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.globals.update(words=words, palette=palette, f=format, zip=zip)
    return environment.get_template(template).render(
        figures={name: _visible(json.loads(figure.to_json())) for name, figure in figures.items()},
        # Markup: the library is ours to trust, and it is not escaped inside a script.
        plotly=Markup(get_plotlyjs()),
        **values,
    )


def _visible(value: Any) -> Any:
    """A figure's texts as every other: names of modules stand in them."""
    if isinstance(value, dict):
        return {key: _visible(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_visible(each) for each in value]
    return format.visible(value) if isinstance(value, str) else value


def _finalize(value: Any) -> Any:
    """Every text that is written shows its control characters first; escaping comes after this."""
    return value if not isinstance(value, str) or isinstance(value, Markup) else format.visible(value)
