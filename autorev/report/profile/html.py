"""Profiles as one HTML file that needs nothing else: the report of one, or the comparison of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from autorev.format import format_bytes, format_change, format_error, format_integer, format_rate, format_seconds
from autorev.profiler.record import Profile, Result
from autorev.report.pages import render_page
from autorev.report.profile import comparison, comparison_tables, paper, peak, rows, tables, time_tables
from autorev.report.profile import figures as drawings
from autorev.report.profile.comparison import comparison_figures
from autorev.report.profile.figures import memory_figures
from autorev.report.profile.rows import chosen, fits, largest, peak_bytes, rival
from autorev.report.profile.tables import doubt
from autorev.report.profile.time_figures import time_figures
from autorev.report.profile.timelines import timelines
from autorev.report.tables import Tile

MOST_WITH_TIMELINES = 4
"""Records on one page before their timelines would make it large and slow."""


def render_profile_html(profiles: Sequence[Profile], command: str) -> str:
    """The report of one profile, or the comparison of several; the same bytes every time.

    `command` is what made the report, shown at its end beside the command of every record.

    Raises:
        ValueError: there is no profile.
    """
    if not profiles:
        raise ValueError("there is no profile to report")
    modules = {
        "pr": rows,
        "tables": tables,
        "times": time_tables,
        "peak": peak,
        "across": comparison,
        "comparison": comparison_tables,
        "drawings": drawings,
        "paper": paper,
    }
    if len(profiles) == 1:
        profile = profiles[0]
        figures = memory_figures(profile) | time_figures(profile)
        return render_page(
            "profile.html.jinja", figures, profile=profile, command=command, tiles=tiles(profile), **modules
        )
    figures = comparison_figures(profiles)
    with_timelines = len(profiles) <= MOST_WITH_TIMELINES
    if with_timelines:
        for i, profile in enumerate(profiles):
            figures |= {f"r{i}-{name}": figure for name, figure in timelines(profile).items()}
    return render_page(
        "profiles.html.jinja",
        figures,
        profiles=list(profiles),
        command=command,
        with_timelines=with_timelines,
        most_timelines=MOST_WITH_TIMELINES,
        without_plain=[profile.name for profile in profiles if not comparison.standings([profile])],
        has_batches=any(point.axis == "batch" for profile in profiles for point in profile.points),
        **modules,
    )


def tiles(profile: Profile) -> list[Tile]:
    """What the recommended method needs, costs and gains; only what is known of it."""
    best, other = chosen(profile), rival(profile)
    if best is None:
        return []
    found = []
    name = "" if other is None else rows.labels(profile)[other.method.spec]
    peak, others = peak_bytes(best), peak_bytes(other) if other else None
    if peak is not None:
        over = "" if fits(profile, peak) else "over the budget"
        against = _against(name, peak, others, format_bytes)
        if other and not others:
            against = f"{name}: {rows.ended(other)}"
        found.append(Tile("Peak memory", format_bytes(peak), against, over))
    seconds, others_seconds = best.step_seconds, other.step_seconds if other else None
    rate, others_rate = profile.per_second(seconds), profile.per_second(others_seconds)
    if seconds and rate:
        against = _against(name, seconds, others_seconds, format_seconds)
        found.append(Tile("Time of a step", format_seconds(seconds), against, doubt(best)))
        title = f"{profile.units.capitalize()} a second"
        found.append(Tile(title, format_rate(rate), _against(name, rate, others_rate, format_rate)))
    if rows.only_predicted(profile) and best.prediction:
        found.append(Tile("Time of a step, at least", format_seconds(best.prediction.step_seconds)))
    found += _reach_tiles(profile, best, other)
    if best.fidelity:
        found.append(Tile("Gradient error", format_error(best.fidelity.gradient_error)))
        change = best.fidelity.loss - best.fidelity.original_loss
        found.append(Tile("Loss change before training", f"{change:+.3f}"))
    return found


def _against(name: str, figure: float, other: float | None, text: Callable[[Any], str]) -> str:
    """`-40 % against plain's 3.56 GiB`; empty where there is nothing to compare with."""
    return f"{format_change(figure, other)} against {name}'s {text(other)}" if other else ""


def _reach_tiles(profile: Profile, best: Result, other: Result | None) -> list[Tile]:
    found = []
    for axis, title in (("batch", "Largest batch"), ("sequence", "Longest sequence"), ("depth", "Most blocks")):
        reached = largest(profile, best.method.spec, axis)
        others = largest(profile, other.method.spec, axis) if other else None
        if reached:
            name = "" if other is None else rows.labels(profile)[other.method.spec]
            against = f"{name}: {format_integer(others[0])}" if others else ""
            found.append(Tile(title, format_integer(reached[0]), against))
    return found
