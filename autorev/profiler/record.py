"""A profile as frozen data: what was run, where, the raw samples, and everything that is derived from them.

Nothing here needs torch: a report is rendered from these objects, or from their JSON, on any machine. Sizes are bytes,
times seconds, work floating-point operations. Samples are kept as they were read; medians and ratios are properties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

from autorev.analysis import DeviceInfo, ModelInfo, Prediction, Recommendation
from autorev.methods import Method
from autorev.profiler.readings import Fidelity, Memory, Round, Work, are_times, check
from autorev.records import Record, check_name
from autorev.setting import Setting

if TYPE_CHECKING:
    import pandas as pd

GOALS = ("memory", "throughput", "context")
AXES = ("batch", "sequence", "depth")
WIDE_SPREAD = 0.10
"""Quartiles farther apart than this share of the median are said to be in doubt."""


class Status(StrEnum):
    """How it ended with a method."""

    MEASURED = "measured"
    OUT_OF_MEMORY = "out of memory"
    REFUSED = "refused"
    """It does not apply to this model; `reason` says why."""
    FAILED = "failed"
    """It should have worked; `reason` says what happened."""
    PENDING = "pending"
    """Not measured yet: the run was interrupted, and `--resume` goes on with it."""
    PREDICTED = "predicted"
    """Only predicted (`--predict`)."""


@dataclass(frozen=True, slots=True)
class Result:
    """Everything about one method."""

    method: Method
    status: Status
    reason: str = ""
    rounds: tuple[Round, ...] = ()
    memory: Memory | None = None
    work: Work | None = None
    fidelity: Fidelity | None = None
    side_bits: int = 0
    """The most bits that a step of the chains keeps per element."""
    prediction: Prediction | None = None
    """What the analysis predicted for it; None where it makes no prediction."""

    @property
    def samples(self) -> tuple[float, ...]:
        """Seconds of every timed step."""
        return tuple(s for r in self.rounds for s in r.steps)

    @property
    def step_seconds(self) -> float | None:
        """The median."""
        return median(self.samples) if self.samples else None

    @property
    def spread(self) -> float | None:
        """The distance of the quartiles relative to the median; None for fewer than three samples."""
        if len(self.samples) < 3:
            return None
        low, middle, high = quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / middle

    @property
    def in_doubt(self) -> bool:
        """Are the quartiles so far apart that small differences mean nothing?"""
        return self.spread is None or self.spread > WIDE_SPREAD

    def phase_seconds(self, phase: str) -> float | None:
        """The median of one phase."""
        samples = [s for r in self.rounds for s in getattr(r, phase)]
        return median(samples) if samples else None


@dataclass(frozen=True, slots=True)
class Point:
    """One size of a sweep under one method."""

    axis: str
    """batch, sequence or depth."""
    value: int
    method: str
    """The method's spec."""
    status: Status
    peak_bytes: int | None
    """By the allocator; None where it did not fit, and the step was stopped."""
    seconds: tuple[float, ...] = ()
    """Timed steps; empty where only memory was looked at."""
    largest: bool = False
    """The largest value that fits the budget: the next was tried and does not."""
    reason: str = ""

    def __post_init__(self) -> None:
        check(self.value > 0 and self.axis in AXES, "a point has a size on an axis")
        check(are_times(self.seconds) and (self.peak_bytes is None or self.peak_bytes > 0), "a step has time and peak")

    @property
    def step_seconds(self) -> float | None:
        """The median."""
        return median(self.seconds) if self.seconds else None


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and when it ran."""

    date: str
    """ISO 8601, with the time zone."""
    machine: str
    """The processor, or the GPU."""
    system: str
    cores: int
    threads: int
    """That PyTorch computes with."""
    memory_bytes: int
    versions: dict[str, str]
    commit: str | None
    """Of autorev's checkout, `+` where it had changes; None where it was installed."""


@dataclass(frozen=True, slots=True)
class Profile(Record):
    """Everything that `autorev profile` found out."""

    name: str
    """Of the record: its file is `NAME.json`."""
    model: ModelInfo
    pretrained: bool
    blocks: int
    """How many residual blocks it has, refused ones included."""
    setting: Setting
    device: DeviceInfo | None
    """The device profile that utilisation is relative to."""
    text: str
    """Where the tokens come from, in words."""
    command: str
    """What made it; one line for each run that went on with it."""
    environment: Environment
    memory_limit: str | None
    """The budget as it was given: `2GiB`, `+128MiB` (beside weights, gradients and optimiser state); None: none."""
    budget_bytes: int | None
    """The budget in bytes."""
    goal: str
    """memory, throughput or context."""
    results: tuple[Result, ...]
    points: tuple[Point, ...] = ()
    recommendation: Recommendation | None = None
    complete: bool = False
    notes: tuple[str, ...] = ()
    kind: str = "profile"
    schema_version: int = 3

    def __post_init__(self) -> None:
        specs = [result.method.spec for result in self.results]
        check((bool(specs) or not self.complete) and len(specs) == len(set(specs)), "there are methods, each once")
        check({point.method for point in self.points} <= set(specs), "every point is one of a method's")
        check(self.goal in GOALS, "a recommendation has a goal")
        check(self.budget_bytes is None or self.budget_bytes > 0, "a budget is more than nothing")

    def result(self, spec: str) -> Result | None:
        """The result of the method `spec`."""
        return next((r for r in self.results if r.method.spec == spec), None)

    def with_result(self, result: Result) -> Profile:
        """A copy in which `result` replaces the one of the same method, or is added."""
        specs = [r.method.spec for r in self.results]
        if result.method.spec not in specs:
            return replace(self, results=(*self.results, result))
        at = specs.index(result.method.spec)
        return replace(self, results=(*self.results[:at], result, *self.results[at + 1 :]))

    @property
    def why_empty(self) -> str:
        """Why there is no figure of any method; empty where there is one. What does not fit was measured, too."""
        found = (Status.MEASURED, Status.OUT_OF_MEMORY)
        if any(r.status in found or (r.status is Status.PREDICTED and r.prediction) for r in self.results):
            return ""
        reasons = dict.fromkeys(f"{r.status}: {r.reason}" if r.reason else str(r.status) for r in self.results)
        return "; ".join(reasons) or "none was asked for"

    @property
    def units(self) -> str:
        """What throughput counts: tokens or samples."""
        return "samples" if self.setting.sequence is None else "tokens"

    def per_second(self, seconds: float | None, batch: int | None = None, sequence: int | None = None) -> float | None:
        """Tokens (or samples) a second for a step of `seconds`; at the setting's own size unless told otherwise."""
        if not seconds:
            return None
        batch = (batch or self.setting.batch) * self.setting.accumulate
        return batch * (sequence or self.setting.sequence or 1) / seconds

    def utilisation(self, result: Result) -> float | None:
        """Share of the device's published peak that the work of a step comes to; None without a device or a time."""
        if self.device is None or result.work is None or not result.step_seconds:
            return None
        return result.work.flops / result.step_seconds / self.device.peak_flops

    @classmethod
    def from_json(cls, text: str, name: str = "this record") -> Profile:
        """As of every record; its name is a file's, too."""
        found = super(Profile, cls).from_json(text, name)
        check_name(found.name, name)
        return found

    def write_into(self, folder: str | Path) -> Path:
        """Write `NAME.json` into `folder`.

        Raises:
            RecordError: the file cannot be written.
        """
        return self.write(Path(folder) / f"{self.name}.json")

    def to_frame(self) -> pd.DataFrame:
        """One row per method; `autorev.profiler.frames` has the steps and the sweeps."""
        from autorev.profiler.frames import results_frame

        return results_frame([self])

    def __str__(self) -> str:
        from autorev.report.render import render_text

        return render_text(self)
