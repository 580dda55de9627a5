"""Profiles as tables for pandas, and these as CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autorev.analysis import Category
from autorev.errors import RecordError
from autorev.packages import require
from autorev.profiler.points import point_per_second
from autorev.profiler.readings import PHASES
from autorev.profiler.record import Profile, Result

if TYPE_CHECKING:
    import pandas as pd

_SETTING = (
    *("batch", "sequence", "dtype", "autocast", "optimizer", "trains", "lora_rank", "lora_dropout", "adapter_dtype"),
    "device",
)
_METHOD = ("name", "loss", "reversible", "preserves_function")
_MEMORY = ("peak_bytes", "phase", "kept_bytes", "process_bytes", "host_bytes", "reserved_bytes", "attributed_bytes")
_OVERHEAD = ("recomputation", "coupling", "packing")
_PREDICTED = ("peak_bytes", "kept_bytes", "step_seconds")
_RESULTS = (
    *("record", "model", "model_class", "parameters", "pretrained", "blocks", *_SETTING, "machine", "date", "commit"),
    *("goal", "budget_bytes", "method", *_METHOD, "status", "reason", *_MEMORY, "peak_of_plain"),
    *(f"{phase}_peak_bytes" for phase in PHASES),
    *(f"{category.value}_bytes" for category in Category),
    *("samples", "step_seconds", "spread", *(f"{phase}_seconds" for phase in PHASES), "per_second", "units"),
    *("flops", "utilisation", "instrumented_seconds", *(f"{what}_seconds" for what in _OVERHEAD)),
    *("gradient_against", "gradient_error", "gradient_cosine", "largest_drift"),
    *("loss_nats", "original_loss_nats", "loss_tokens", "side_bits", *(f"predicted_{name}" for name in _PREDICTED)),
)
_STEPS = ("record", "method", "round", "step", *(f"{phase}_seconds" for phase in PHASES), "step_seconds")
_POINTS = (
    *("record", "method", "axis", "value", "status", "reason", "peak_bytes", "samples", "step_seconds"),
    *("per_second", "units", "largest"),
)
# A column's type follows from its name, so that no missing figure changes it. What is in none of these is a number.
_TEXTS = (
    *("record", "model", "model_class", "dtype", "autocast", "optimizer", "trains", "adapter_dtype", "device"),
    *("machine", "date", "commit", "goal", "method", "name", "loss", "status", "reason", "phase", "units"),
    *("gradient_against", "axis"),
)
_FLAGS = ("pretrained", "reversible", "preserves_function", "largest")
_INTEGERS = (
    *("parameters", "blocks", "batch", "sequence", "lora_rank", "samples", "flops", "loss_tokens", "side_bits"),
    *("round", "step", "value"),
)


def results_frame(profiles: Iterable[Profile]) -> pd.DataFrame:
    """One row per record and method with every scalar figure; a column's name ends in its unit.

    `<category>_bytes` are what was alive at the traced peak, `peak_of_plain` is the peak's share of that of plain in
    the same record, `per_second` counts `units`, and a figure that there is not is empty.
    """
    return _frame((_result_row(profile, result) for profile in profiles for result in profile.results), _RESULTS)


def steps_frame(profiles: Iterable[Profile]) -> pd.DataFrame:
    """One row per timed step, with its phases in seconds; `round` and `step` count as they were run."""
    rows = (
        {
            "record": profile.name,
            "method": result.method.spec,
            "round": each.number,
            "step": step,
            **{f"{phase}_seconds": getattr(each, phase)[step] for phase in PHASES},
            "step_seconds": seconds,
        }
        for profile in profiles
        for result in profile.results
        for each in result.rounds
        for step, seconds in enumerate(each.steps)
    )
    return _frame(rows, _STEPS)


def points_frame(profiles: Iterable[Profile]) -> pd.DataFrame:
    """One row per point of a sweep."""
    rows = (
        {
            "record": profile.name,
            **{name: getattr(point, name) for name in ("method", "axis", "value", "reason", "peak_bytes", "largest")},
            "status": point.status.value,
            "samples": len(point.seconds),
            "step_seconds": point.step_seconds,
            "per_second": point_per_second(profile, point),
            "units": profile.units,
        }
        for profile in profiles
        for point in profile.points
    )
    return _frame(rows, _POINTS)


def write_tables(profiles: Sequence[Profile], path: str | Path, kind: str = "csv") -> tuple[Path, ...]:
    """Write the results to `path`, the steps and the sweeps beside it (`NAME.steps.csv`, `NAME.points.csv`).

    Args:
        profiles: any number of records.
        path: of the first file; its folder is made.
        kind: csv or parquet.

    Raises:
        RecordError: a file cannot be written.
        MissingPackageError: pyarrow is not installed, which Parquet needs.
    """
    if kind == "parquet":
        require("a Parquet file", "pyarrow")
    path = Path(path)
    beside = [path.with_name(f"{path.stem}.{what}{path.suffix}") for what in ("steps", "points")]
    files = (path, *beside)
    for file, make in zip(files, (results_frame, steps_frame, points_frame), strict=True):
        frame = make(profiles)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if kind == "parquet":
                frame.to_parquet(file, engine="pyarrow", index=False)
            else:
                frame.to_csv(file, index=False, errors="replace")
        except OSError as error:
            raise RecordError(f"{file} cannot be written: {error.strerror or error}; name another file") from None
    return files


def _result_row(profile: Profile, result: Result) -> dict[str, Any]:
    plain, memory, work, fidelity = profile.result("plain"), result.memory, result.work, result.fidelity
    row: dict[str, Any] = {
        "record": profile.name,
        "model": profile.model.name,
        "model_class": profile.model.class_name,
        "parameters": profile.model.parameters,
        **_named(profile, ("pretrained", "blocks", "goal", "budget_bytes", "units")),
        **_named(profile.setting, _SETTING),
        **_named(profile.environment, ("machine", "date", "commit")),
        "method": result.method.spec,
        **_named(result.method, _METHOD),
        "status": result.status.value,
        **_named(result, ("reason", "step_seconds", "spread", "side_bits")),
        "samples": len(result.samples),
        **{f"{phase}_seconds": result.phase_seconds(phase) for phase in PHASES},
        "per_second": profile.per_second(result.step_seconds),
        "utilisation": profile.utilisation(result),
    }
    if memory:
        row |= _named(memory, _MEMORY)
        row |= {f"{phase}_peak_bytes": count for phase, count in memory.phase_peaks.items()}
        row |= {f"{category}_bytes": count for category, count in memory.categories.items()}
        row["peak_of_plain"] = memory.peak_bytes / plain.memory.peak_bytes if plain and plain.memory else None
    if work:
        row |= _named(work, ("flops", "instrumented_seconds"))
        row |= {f"{what}_seconds": seconds for what, seconds in work.overhead.items()}
    if fidelity:
        row |= _named(fidelity, ("gradient_error", "gradient_cosine"))
        row |= {"gradient_against": fidelity.against, "largest_drift": max(fidelity.drift.values(), default=None)}
        row |= {"loss_nats": fidelity.loss, "original_loss_nats": fidelity.original_loss}
        row["loss_tokens"] = fidelity.tokens
    if result.prediction:
        row |= {f"predicted_{name}": value for name, value in _named(result.prediction, _PREDICTED).items()}
    return row


def _named(source: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def _frame(rows: Iterator[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    kept = list(rows)
    return pd.DataFrame({name: pd.Series([row.get(name) for row in kept], dtype=_type(name)) for name in columns})


def _type(column: str) -> str:
    if column in _TEXTS:
        return "object"
    if column in _FLAGS:
        return "boolean"
    return "Int64" if column in _INTEGERS or column.endswith("_bytes") else "float64"
