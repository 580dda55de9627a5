"""Profiles for other programs: tables for pandas, CSV and Parquet, and a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autorev.analysis import Category
from autorev.errors import RecordError
from autorev.format import format_bytes
from autorev.packages import require
from autorev.profiler.points import point_per_second
from autorev.profiler.readings import PHASES, BlockTime
from autorev.profiler.record import Profile, Result
from autorev.words import CATEGORY_TITLES

if TYPE_CHECKING:
    import pandas as pd

_text, _flag, _integer, _number = "object", "boolean", "Int64", "float64"
# Columns and their types, which no missing figure changes: integers stay integers beside an empty cell.
_result_columns = {
    **dict.fromkeys(("record", "model", "model_class"), _text),
    "parameters": _integer,
    "pretrained": _flag,
    **dict.fromkeys(("blocks", "batch", "sequence"), _integer),
    **dict.fromkeys(("dtype", "optimizer", "trains"), _text),
    "lora_rank": _integer,
    **dict.fromkeys(("device", "machine", "date", "commit", "goal"), _text),
    "budget_bytes": _integer,
    **dict.fromkeys(("method", "method", "loss"), _text),
    **dict.fromkeys(("reversible", "preserves_function"), _flag),
    **dict.fromkeys(("status", "reason"), _text),
    "peak_bytes": _integer,
    "peak_of_plain": _number,
    "phase": _text,
    **{f"{phase}_peak_bytes": _integer for phase in PHASES},
    **dict.fromkeys(("kept_bytes", "process_bytes", "host_bytes", "reserved_bytes", "attributed_bytes"), _integer),
    **{f"{category.value}_bytes": _integer for category in Category},
    "samples": _integer,
    **dict.fromkeys(("step_seconds", "spread"), _number),
    **{f"{phase}_seconds": _number for phase in PHASES},
    "per_second": _number,
    "units": _text,
    "flops": _integer,
    "utilisation": _number,
    "instrumented_seconds": _number,
    **{f"{what}_seconds": _number for what in ("recomputation", "coupling", "packing")},
    "gradient_against": _text,
    **dict.fromkeys(("gradient_error", "gradient_cosine", "largest_drift", "loss_nats", "original_loss_nats"), _number),
    **dict.fromkeys(("loss_tokens", "side_bits", "predicted_peak_bytes", "predicted_kept_bytes"), _integer),
    "predicted_step_seconds": _number,
}
_step_columns = {
    **dict.fromkeys(("record", "method"), _text),
    **dict.fromkeys(("round", "step"), _integer),
    **{f"{phase}_seconds": _number for phase in PHASES},
    "step_seconds": _number,
}
_point_columns = {
    **dict.fromkeys(("record", "method", "axis"), _text),
    "value": _integer,
    **dict.fromkeys(("status", "reason"), _text),
    "peak_bytes": _integer,
    "samples": _integer,
    "step_seconds": _number,
    "per_second": _number,
    "units": _text,
    "largest": _flag,
}


def results_frame(profiles: Iterable[Profile]) -> pd.DataFrame:
    """One row per record and method with every scalar figure; a column's name ends in its unit.

    `<category>_bytes` are what was alive at the traced peak, `peak_of_plain` is the peak's share of that of plain in
    the same record, `per_second` counts `units`, and a figure that there is not is empty.
    """
    rows = [_result_row(profile, result) for profile in profiles for result in profile.results]
    return _frame(rows, _result_columns)


def steps_frame(profiles: Iterable[Profile]) -> pd.DataFrame:
    """One row per timed step, with its phases in seconds; `round` and `step` count as they were run."""
    rows: list[dict[str, Any]] = []
    for profile in profiles:
        for result in profile.results:
            for each in result.rounds:
                rows += (
                    {
                        "record": profile.name,
                        "method": result.method.spec,
                        "round": each.number,
                        "step": step,
                        **{f"{phase}_seconds": getattr(each, phase)[step] for phase in PHASES},
                        "step_seconds": seconds,
                    }
                    for step, seconds in enumerate(each.steps)
                )
    return _frame(rows, _step_columns)


def points_frame(profiles: Iterable[Profile]) -> pd.DataFrame:
    """One row per point of a sweep."""
    rows = [
        {
            "record": profile.name,
            "method": point.method,
            "axis": point.axis,
            "value": point.value,
            "status": point.status.value,
            "reason": point.reason,
            "peak_bytes": point.peak_bytes,
            "samples": len(point.seconds),
            "step_seconds": point.step_seconds,
            "per_second": point_per_second(profile, point),
            "units": profile.units,
            "largest": point.largest,
        }
        for profile in profiles
        for point in profile.points
    ]
    return _frame(rows, _point_columns)


def write_csv(profiles: Sequence[Profile], path: str | Path) -> tuple[Path, ...]:
    """Write the results to `path`, the steps and the sweeps beside it (`NAME.steps.csv`, `NAME.points.csv`).

    Returns:
        The three files.

    Raises:
        RecordError: a file cannot be written.
    """
    return _write_tables(profiles, path, lambda frame, file: frame.to_csv(file, index=False, errors="replace"))


def write_parquet(profiles: Sequence[Profile], path: str | Path) -> tuple[Path, ...]:
    """The same as Parquet.

    Raises:
        RecordError: a file cannot be written.
        MissingPackageError: pyarrow is not installed.
    """
    require("a Parquet file", "pyarrow")
    return _write_tables(profiles, path, lambda frame, file: frame.to_parquet(file, engine="pyarrow", index=False))


def write_trace(profile: Profile, path: str | Path) -> Path:
    """Write the steps as a trace in Chrome's Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

    Each method is a process with its phases, its blocks, and its live bytes by category. The clock is that of the
    traced step, or of the median timed step where no step was traced; blocks were timed in a step of their own, are
    stretched to this clock, and carry their own seconds as an argument.

    Raises:
        RecordError: the file cannot be written.
    """
    events = [event for number, result in enumerate(profile.results, 1) for event in _trace_events(result, number)]
    document = {
        "displayTimeUnit": "ms",
        "otherData": {"record": profile.name, "model": profile.model.name, "date": profile.environment.date},
        "traceEvents": events,
    }
    path = Path(path)
    _save(path, lambda: path.write_text(json.dumps(document), encoding="utf-8"))
    return path


def _result_row(profile: Profile, result: Result) -> dict[str, Any]:
    setting, method, plain = profile.setting, result.method, profile.result("plain")
    row: dict[str, Any] = {
        "record": profile.name,
        "model": profile.model.name,
        "model_class": profile.model.class_name,
        "parameters": profile.model.parameters,
        "pretrained": profile.pretrained,
        "blocks": profile.blocks,
        **{name: getattr(setting, name) for name in ("batch", "sequence", "dtype", "optimizer", "trains", "lora_rank")},
        "device": setting.device,
        **{name: getattr(profile.environment, name) for name in ("machine", "date", "commit")},
        "goal": profile.goal,
        "budget_bytes": profile.budget_bytes,
        "method": method.spec,
        **{name: getattr(method, name) for name in ("method", "loss", "reversible", "preserves_function")},
        "status": result.status.value,
        "reason": result.reason,
        "samples": len(result.samples),
        "step_seconds": result.step_seconds,
        "spread": result.spread,
        **{f"{phase}_seconds": result.phase_seconds(phase) for phase in PHASES},
        "per_second": profile.per_second(result.step_seconds),
        "units": profile.units,
        "utilisation": profile.utilisation(result),
        "side_bits": result.side_bits,
    }
    if memory := result.memory:
        of_memory = ("peak_bytes", "phase", "kept_bytes", "process_bytes", "host_bytes", "reserved_bytes")
        row |= {name: getattr(memory, name) for name in (*of_memory, "attributed_bytes")}
        row |= {f"{phase}_peak_bytes": count for phase, count in memory.phase_peaks.items()}
        row |= {f"{category}_bytes": count for category, count in memory.categories.items()}
        if plain and plain.memory:
            row["peak_of_plain"] = memory.peak_bytes / plain.memory.peak_bytes
    if work := result.work:
        row |= {"flops": work.flops, "instrumented_seconds": work.instrumented_seconds}
        row |= {f"{what}_seconds": seconds for what, seconds in work.overhead.items()}
    if fidelity := result.fidelity:
        row |= {name: getattr(fidelity, name) for name in ("gradient_error", "gradient_cosine")}
        row |= {
            "gradient_against": fidelity.against,
            "largest_drift": max(fidelity.drift.values(), default=None),
            "loss_nats": fidelity.loss,
            "original_loss_nats": fidelity.original_loss,
            "loss_tokens": fidelity.tokens,
        }
    if prediction := result.prediction:
        row |= {f"predicted_{name}": getattr(prediction, name) for name in ("peak_bytes", "kept_bytes", "step_seconds")}
    return row


def _frame(rows: list[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    import pandas as pd

    cells = {name: pd.Series([row.get(name) for row in rows], dtype=kind) for name, kind in columns.items()}
    return pd.DataFrame(cells, columns=list(columns))


def _write_tables(
    profiles: Sequence[Profile], path: str | Path, write: Callable[[pd.DataFrame, Path], Any]
) -> tuple[Path, ...]:
    path = Path(path)
    frames = {
        path: results_frame(profiles),
        path.with_name(f"{path.stem}.steps{path.suffix}"): steps_frame(profiles),
        path.with_name(f"{path.stem}.points{path.suffix}"): points_frame(profiles),
    }
    for file, frame in frames.items():
        _save(file, partial(write, frame, file))
    return tuple(frames)


def _save(path: Path, write: Callable[[], Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror or error}; name another file") from None


# -- the trace: times in microseconds, tracks numbered within a process

_PHASES_TRACK, _BLOCKS_TRACK = 1, 2


def _trace_events(result: Result, process: int) -> Iterator[dict[str, Any]]:
    marks = _marks(result)
    if not marks:
        return
    yield _named("process_name", result.method.title, process, 0)
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
    yield _named("thread_name", "phases", process, _PHASES_TRACK)
    for phase, begin, end in marks:
        yield _span(phase, "phase", begin, end, process, _PHASES_TRACK, result.phase_seconds(phase))
    if result.work and result.work.blocks:
        yield _named("thread_name", "blocks", process, _BLOCKS_TRACK)
        stretch = sum(end - begin for _, begin, end in marks) / result.work.instrumented_seconds
        for phase, begin, end in marks:
            yield from _block_spans(result.work.blocks, phase, begin, end, stretch, process)
    timeline = result.memory.timeline if result.memory else None
    if timeline is not None:
        titles = {name: CATEGORY_TITLES[Category(name)] for name in timeline.categories}
        for point, second in enumerate(timeline.seconds):
            held = {titles[name]: counts[point] for name, counts in timeline.categories.items()}
            yield {"ph": "C", "name": "live bytes", "pid": process, "tid": 0, "ts": 1e6 * second, "args": held}
        highest = sum(counts[timeline.peak_at] for counts in timeline.categories.values())
        yield {
            "ph": "i",
            "name": f"peak: {format_bytes(highest)}",
            "cat": "memory",
            "s": "p",
            "pid": process,
            "tid": _PHASES_TRACK,
            "ts": 1e6 * timeline.seconds[timeline.peak_at],
        }


def _marks(result: Result) -> tuple[tuple[str, float, float], ...]:
    """The phases of the traced step, or those of the median timed step one after the other."""
    if result.memory and result.memory.timeline:
        return result.memory.timeline.marks
    marks: list[tuple[str, float, float]] = []
    begin = 0.0
    for phase in PHASES:
        seconds = result.phase_seconds(phase)
        if seconds is not None:
            marks.append((phase, begin, begin + seconds))
            begin += seconds
    return tuple(marks)


def _block_spans(
    blocks: Sequence[BlockTime], phase: str, begin: float, end: float, stretch: float, process: int
) -> Iterator[dict[str, Any]]:
    """The blocks in order from the beginning of forward, and in reverse order up to the end of backward.

    What a phase computes besides its blocks, embeddings apart, is the head: after them, then before them.
    """
    if phase not in ("forward", "backward"):
        return
    ordered = blocks if phase == "forward" else blocks[::-1]
    seconds = [getattr(block, phase) for block in ordered]
    total = sum(seconds)
    if not total:
        return
    # The instrumented step may share its time between the phases otherwise than the traced one.
    stretch = min(stretch, (end - begin) / total)
    at = begin if phase == "forward" else end - total * stretch
    for block, own in zip(ordered, seconds, strict=True):
        yield _span(block.path, "block", at, at + own * stretch, process, _BLOCKS_TRACK, own)
        at += own * stretch


def _span(
    name: str, kind: str, begin: float, end: float, process: int, track: int, own: float | None
) -> dict[str, Any]:
    times = {"ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
    args = {} if own is None else {"own_seconds": own}
    return {"ph": "X", "name": name, "cat": kind, "pid": process, "tid": track, **times, "args": args}


def _named(what: str, name: str, process: int, track: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}
