"""Plotly figures across profiles: how the methods stand to plain training, and what the number of blocks does."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from autorev.format import clean, format_bytes, format_integer, format_rate, unit_for
from autorev.profiler.record import Profile, Result
from autorev.report.palette import method_color
from autorev.report.plotting import LIMIT_LINE, MUTED, SYMBOLS, layout, row_label, scaled
from autorev.report.profile.figures import name_rows
from autorev.report.profile.rows import by_method, labels, largest, looks
from autorev.words import method_title

_MOST_TICKS = 12
"""Numbers of blocks that can be told apart under an axis, and as marks on a line."""


@dataclass(frozen=True, slots=True)
class Family:
    """Profiles of one kind of model under one setting that differ in their number of blocks, ascending."""

    name: str
    profiles: tuple[Profile, ...]
    batch: int
    """At which the most of their methods have a peak."""

    def peak(self, profile: Profile, spec: str) -> int | None:
        """The peak of a method at the family's batch."""
        return _peaks_by_batch(profile).get((self.batch, spec))

    @property
    def specs(self) -> list[str]:
        """Every method that one of them has, in the order of the records."""
        return list(dict.fromkeys(each.method.spec for profile in self.profiles for each in profile.results))


@dataclass(frozen=True, slots=True)
class Standing:
    """One method of one record relative to plain training there."""

    profile: Profile
    result: Result
    memory: float | None
    """Peak over plain's."""
    time: float | None
    """Step over plain's."""


def comparison_figures(profiles: Sequence[Profile]) -> dict[str, go.Figure]:
    """Every figure across records that there is data for, by the id of its place in a page."""
    found: dict[str, go.Figure] = {}
    for name, title in (("memory", "peak, as a share of plain's"), ("time", "step time, as a multiple of plain's")):
        if any(getattr(each, name) is not None for each in standings(profiles)):
            found[f"relative-{name}"] = _relative(profiles, name, title)
    for i, family in enumerate(families(profiles)):
        found[f"family-{i}-memory"] = memory_against_blocks(family)
        if any(largest(p, spec, "batch") for p in family.profiles for spec in family.specs):
            found[f"family-{i}-batch"] = largest_batch_against_blocks(family)
            found[f"family-{i}-throughput"] = throughput_against_blocks(family)
    return found


def standings(profiles: Sequence[Profile]) -> list[Standing]:
    """Every method that can be set against plain training in its record, plain itself left out."""
    found = []
    for profile in profiles:
        plain = by_method(profile, "plain")
        if plain is None:
            continue
        for each in profile.results:
            if each is plain:
                continue
            memory = each.memory.peak_bytes / plain.memory.peak_bytes if each.memory and plain.memory else None
            time = each.step_seconds / plain.step_seconds if each.step_seconds and plain.step_seconds else None
            if memory is not None or time is not None:
                found.append(Standing(profile, each, memory, time))
    return found


def families(profiles: Sequence[Profile]) -> list[Family]:
    """Two or more records each: same class, machine, setting, and name but for its number of blocks; other `blocks`.

    The batch may differ between the settings: they are compared at a batch that all have, if there is one."""
    groups: dict[object, list[Profile]] = defaultdict(list)
    for profile in profiles:
        # A record has no width; a name such as `gpt2-512-16` has, and only its number of blocks may differ.
        name = re.sub(rf"(?<!\d){profile.blocks}(?!\d)", "#", clean(profile.model.name))
        s = profile.setting
        setting = (s.sequence, s.dtype, s.optimizer, s.trains, s.lora_rank, s.loss)
        groups[(profile.model.class_name, name, profile.environment.machine, setting)].append(profile)
    found = []
    for group in groups.values():
        group.sort(key=lambda profile: profile.blocks)
        if len({profile.blocks for profile in group}) > 1:
            name = f"{clean(group[0].model.class_name)} with {group[0].blocks} to {group[-1].blocks} blocks"
            found.append(Family(name, tuple(group), _common_batch(group)))
    return found


def _common_batch(profiles: Sequence[Profile]) -> int:
    counts: dict[int, int] = defaultdict(int)
    for profile in profiles:
        for batch, _ in _peaks_by_batch(profile):
            counts[batch] += 1
    return max(counts, key=lambda batch: (counts[batch], batch), default=profiles[0].setting.batch)


def _peaks_by_batch(profile: Profile) -> dict[tuple[int, str], int]:
    """Peaks by (batch, spec): those of the record's own setting and those of its sweep."""
    found = {(p.value, p.method): p.peak_bytes for p in profile.points if p.axis == "batch" and p.peak_bytes}
    own = {(profile.setting.batch, r.method.spec): r.memory.peak_bytes for r in profile.results if r.memory}
    return found | own


def memory_against_blocks(family: Family) -> go.Figure:
    """The peak of every method against the number of blocks, at one batch and sequence."""
    peaks = [family.peak(profile, spec) for profile in family.profiles for spec in family.specs]
    unit = unit_for(peak for peak in peaks if peak)
    return _against_blocks(
        family,
        family.peak,
        lambda peak: scaled(int(peak), unit),
        lambda peak: format_bytes(int(peak)),
        f"peak at batch {format_integer(family.batch)}, {unit.name}",
    )


def largest_batch_against_blocks(family: Family) -> go.Figure:
    """The largest batch within the budget against the number of blocks."""
    return _against_blocks(
        family, largest_batch, lambda batch: batch, lambda batch: format_integer(int(batch)), "largest batch, samples"
    )


def throughput_against_blocks(family: Family) -> go.Figure:
    """Throughput at the largest batch within the budget against the number of blocks."""
    units = family.profiles[0].units
    return _against_blocks(
        family,
        throughput_there,
        lambda rate: round(rate, 2),
        lambda rate: f"{format_rate(rate)} {units}/s",
        f"{units}/s at the largest batch",
    )


def largest_batch(profile: Profile, spec: str) -> int | None:
    """The largest batch that fits under a method."""
    found = largest(profile, spec, "batch")
    return found[0] if found else None


def throughput_there(profile: Profile, spec: str) -> float | None:
    """Tokens (or samples) a second at the largest batch; None where it was not timed."""
    found = largest(profile, spec, "batch")
    return found[1] if found else None


def _against_blocks(
    family: Family,
    figure_of: Callable[[Profile, str], float | None],
    drawn: Callable[[float], float],
    text: Callable[[float], str],
    title: str,
) -> go.Figure:
    figure = go.Figure()
    for spec in family.specs:
        found = [(profile, figure_of(profile, spec)) for profile in family.profiles]
        points = [(profile.blocks, value) for profile, value in found if value is not None]
        if not points:
            continue
        look = next(looks(profile)[spec] for profile in family.profiles if profile.result(spec) is not None)
        figure.add_scatter(
            mode="lines+markers",
            name=escape(clean(spec_title(family.profiles, spec))),
            x=[blocks for blocks, _ in points],
            y=[drawn(value) for _, value in points],
            customdata=[text(value) for _, value in points],
            line={"color": look.color, "dash": look.dash, "width": 2},
            marker={"symbol": look.symbol, "size": 8},
            hovertemplate="%{fullData.name}, %{x} blocks: %{customdata}<extra></extra>",
        )
    figure.update_layout(layout(380), showlegend=True)
    figure.update_xaxes(title_text="blocks", rangemode="tozero")
    depths = sorted({profile.blocks for profile in family.profiles})
    if len(depths) <= _MOST_TICKS:
        figure.update_xaxes(tickvals=depths)
    else:
        figure.update_traces(mode="lines")
    figure.update_yaxes(title_text=title, rangemode="tozero")
    return figure


def spec_title(profiles: Sequence[Profile], spec: str) -> str:
    """What the first record that has the method calls it."""
    return next((labels(p)[spec] for p in profiles if p.result(spec) is not None), spec)


def _relative(profiles: Sequence[Profile], name: str, title: str) -> go.Figure:
    """One row per record, one dot per method; 1 is plain training."""
    rows = [p for p in profiles if any(getattr(s, name) is not None for s in standings([p]))]
    places = {id(profile): place for place, profile in enumerate(rows)}
    groups: dict[str, list[Standing]] = defaultdict(list)
    for each in standings(rows):
        if getattr(each, name) is not None:
            groups[each.result.method.name].append(each)
    figure = go.Figure()
    for method, members in groups.items():
        figure.add_scatter(
            mode="markers",
            name=escape(method_title(method)),
            x=[round(getattr(each, name), 4) for each in members],
            y=[places[id(each.profile)] for each in members],
            customdata=[f"{escape(clean(s.result.method.title))}: {getattr(s, name):.2f} of plain" for s in members],
            marker={"color": method_color(method), "symbol": SYMBOLS.get(method, "circle"), "size": 9},
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.add_shape(type="line", x0=1, x1=1, y0=0, y1=1, yref="paper", line=LIMIT_LINE | {"color": MUTED})
    name_rows(figure, [row_label(profile.name, 24) for profile in rows])
    figure.update_layout(layout(28 * len(rows) + 20 * len(groups) + 80), showlegend=True)
    figure.update_layout(margin={"t": 8})
    figure.update_xaxes(title_text=f"{title} (1 = plain)", rangemode="tozero")
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], griddash="dot", ticklabelstandoff=6)
    return figure
