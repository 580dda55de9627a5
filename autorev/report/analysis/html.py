"""An analysis as one HTML file that needs nothing else: no network, no fonts, no second file."""

from __future__ import annotations

from autorev.analysis import Analysis
from autorev.report.analysis import rows
from autorev.report.analysis.figures import figures
from autorev.report.pages import render_page


def render_html(analysis: Analysis, command: str) -> str:
    """The report of `analysis`, the same bytes every time; `command` is what made it, shown at its end."""
    return render_page(
        "analysis.html.jinja",
        figures(analysis),
        analysis=analysis,
        rows=rows,
        command=command,
        methods=rows.method_rows(analysis),
        scale=rows.bar_scale(analysis) if analysis.predictions else (0, None),
    )
