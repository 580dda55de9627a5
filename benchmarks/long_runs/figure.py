"""README's picture of the long context: python -m benchmarks.long_runs.figure > runs/long_context.html

    chromium --headless --hide-scrollbars --virtual-time-budget=20000 --window-size=1280,520 \\
        --screenshot=docs/long-context.png runs/long_context.html
"""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from autorev.methods import METHODS
from autorev.report.palette import THEME
from benchmarks.long_runs.context import BASE, RECORD, ROWS, Plan
from benchmarks.long_runs.retrieval import VALUES
from benchmarks.long_runs.saved import Line, Lines
from benchmarks.long_runs.tables import MIB


def figure(lines: list[Line]) -> go.Figure:
    """Left what a step of the full length holds, right what the trained models answer rightly, by length."""
    plan = Plan(**lines[0]["plan"])
    ink, muted, bad = THEME["ink"][0], THEME["muted"][0], THEME["bad"][0]
    titles = (
        f"Memory of a step of {plan.length:,} tokens, MiB",
        f"Right answers, trained within {plan.limit / MIB:g} MiB",
    )
    both = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.16, column_widths=[0.5, 0.5])
    shown = sorted((line for line in lines if line["name"] != BASE), key=lambda line: -line["peak"])
    names = [line["name"] for line in shown]
    hosts = [f", and {line['host'] / MIB:.0f} on the host" if line["host"] else "" for line in shown]
    both.add_bar(
        y=names,
        x=[line["peak"] / MIB for line in shown],
        orientation="h",
        marker_color=[_color(line) for line in shown],
        text=[f"{line['peak'] / MIB:.1f}{host}" for line, host in zip(shown, hosts, strict=True)],
        textposition="inside",
        insidetextanchor="start",
        showlegend=False,
    )
    both.add_vline(x=plan.limit / MIB, line={"color": bad, "dash": "dash"}, row=1, col=1)
    # Plain training needs ten times as much as anything else: its bar is cut, and says so.
    most = 1.25 * max(line["peak"] for line in lines if not line["name"].startswith("plain")) / MIB
    both.update_xaxes(range=[0, most], row=1, col=1)
    for line in lines:
        if line.get("asked"):
            right = line["asked"][-1]["right"]
            steps = "" if line["status"] == "done" else f" (after {line['asked'][-1]['step']} of {line['steps']} steps)"
            what = f"{line['name']}: trains at {line['trained_at']:,} tokens{steps}"
            both.add_scatter(
                x=list(map(int, right)),
                y=[100 * share for share in right.values()],
                name=f"before: trained at {plan.short[-1][0]} tokens" if line["name"] == BASE else what,
                mode="lines+markers",
                line={"color": muted if line["name"] == BASE else _color(line), "width": 3},
                row=1,
                col=2,
            )
    both.add_hline(y=100 / VALUES, line={"color": muted, "dash": "dot"}, row=1, col=2)
    ticks = list(plan.lengths)
    both.update_xaxes(
        type="log", tickvals=ticks, ticktext=[f"{n:,}" for n in ticks], title="tokens of context", row=1, col=2
    )
    both.update_yaxes(range=[0, 104], ticksuffix=" %", row=1, col=2)
    both.update_layout(
        width=1280,
        height=520,
        template="plotly_white",
        font={"family": "sans-serif", "size": 14, "color": ink},
        legend={"x": 1, "y": -0.18, "xanchor": "right", "yanchor": "top"},
        margin={"l": 190, "r": 20, "t": 50, "b": 130},
    )
    return both


def _color(line: Line) -> str:
    name = line["spec"].partition(":")[0]
    return METHODS[name].light if name in METHODS else THEME["accent"][0]


if __name__ == "__main__":
    known = Lines(RECORD).by_name
    print(
        figure([known[name] for name in ROWS if name in known]).to_html(
            include_plotlyjs=True, config={"displayModeBar": False}
        )
    )
