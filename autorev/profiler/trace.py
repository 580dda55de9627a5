"""A profile's traced steps for Perfetto and chrome://tracing: phases, blocks at work, live bytes by category."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from autorev.analysis import Category
from autorev.format import format_bytes
from autorev.profiler.readings import Timeline
from autorev.profiler.record import Profile, Result
from autorev.records import write_whole
from autorev.words import CATEGORY_TITLES

_PHASES, _BLOCKS = 1, 2
"""Tracks of a process."""


def write_trace(profile: Profile, path: str | Path) -> Path:
    """Write a file in Chrome's Trace Event Format, in which every traced method is a process.

    Raises:
        RecordError: the file cannot be written.
    """
    events = [
        event
        for process, result in enumerate(profile.results, 1)
        if result.memory is not None and result.memory.timeline is not None
        for event in _events(result, result.memory.timeline, process)
    ]
    facts = {"record": profile.name, "model": profile.model.name, "date": profile.environment.date}
    return write_whole(Path(path), json.dumps({"displayTimeUnit": "ms", "otherData": facts, "traceEvents": events}))


def _events(result: Result, line: Timeline, process: int) -> Iterator[dict[str, Any]]:
    paths = [block.path for block in result.work.blocks] if result.work else []
    for name, track, what in (
        ("process", 0, result.method.title),
        ("thread", _PHASES, "phases"),
        ("thread", _BLOCKS, "blocks"),
    ):
        yield {"ph": "M", "name": f"{name}_name", "pid": process, "tid": track, "args": {"name": what}}
    for phase, begin, end in line.marks:
        yield _span(phase, "phase", begin, end, process, _PHASES)
    for number, points in groupby(range(len(line.seconds)), key=lambda point: line.blocks[point]):
        if number >= 0:
            at_work = [line.seconds[point] for point in points]
            path = paths[number] if number < len(paths) else f"block {number}"
            yield _span(path, "block", at_work[0], at_work[-1], process, _BLOCKS)
    titles = {name: CATEGORY_TITLES[Category(name)] for name in line.categories}
    for point, second in enumerate(line.seconds):
        held = {titles[name]: counts[point] for name, counts in line.categories.items()}
        yield {"ph": "C", "name": "live bytes", "pid": process, "tid": 0, "ts": 1e6 * second, "args": held}
    highest = format_bytes(sum(counts[line.peak_at] for counts in line.categories.values()))
    at = {"ts": 1e6 * line.seconds[line.peak_at], "pid": process, "tid": _PHASES}
    yield {"ph": "i", "name": f"peak: {highest}", "cat": "memory", "s": "p", **at}


def _span(name: str, kind: str, begin: float, end: float, process: int, track: int) -> dict[str, Any]:
    times = {"ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
    return {"ph": "X", "name": name, "cat": kind, "pid": process, "tid": track, **times}
