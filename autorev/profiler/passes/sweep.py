"""How far one method gets: its memory and speed along batch size, sequence length or depth, up to a budget.

On a GPU the budget is enforced by the allocator, on a CPU by counting: a step whose allocator peak is above it has not
fitted. The largest value that fits is looked for by the line through the sizes measured so far, as memory mostly grows
with batch and sequence along a line, and by halving where it does not. It is then shown: the next value (beyond a
hundred, one that is 1 to 2 % larger) is measured, too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from autorev.errors import is_out_of_memory
from autorev.in_place import in_place
from autorev.optimizers import Optimizer
from autorev.prediction.update import update_of, updated_by
from autorev.profiler.job import Job, Sweep
from autorev.profiler.passes.allocator import measure_memory
from autorev.profiler.passes.prepare import Prepared, prepare_model, with_text
from autorev.profiler.passes.step import TrainingStep, optimizer_for, storage_bytes
from autorev.profiler.record import Point, Status
from autorev.setting import Setting
from autorev.workload import Call

TRIES = 20
"""Sizes that the search for the largest measures at most."""
GROWTH = 4
"""The most times the largest size that fits that is tried next: what grows faster than a line overshoots little."""
UNITS = {"batch": 1, "sequence": 16, "depth": 1}
"""Values are multiples of these."""


def sweep(job: Job, live: tuple[nn.Module, Call] | None = None) -> Iterator[Point]:
    """The points of `job.sweep`, in the order in which they were measured; of a model at hand if one is given, whose
    tokens stand in the job's source, and whose depth is what it is.

    Raises:
        NotApplicable: the method cannot be had of this model.
    """
    assert job.sweep is not None
    if job.sweep.axis == "depth":
        for depth in job.sweep.values:
            source = replace(job.source, depth=depth)
            prepared = prepare_model(source, job.setting, None)
            trial = _Trial(replace(job, source=source, blocks=prepared.blocks), prepared)
            with trial.ready():
                point = trial.measure(depth, job.sweep.steps)
            yield point
            del prepared, trial
            if point.status is not Status.MEASURED:
                return
        return
    trial = _Trial(job, prepare_model(job.source, job.setting, job.blocks, live))
    with trial.ready():
        if job.sweep.values or trial.budget is None:
            yield from _given(trial, job.sweep)
        else:
            own = job.setting.batch if job.sweep.axis == "batch" else job.setting.sequence
            yield from largest(trial.measure, own or 1, job.sweep, trial.budget)


def _given(trial: _Trial, sweep: Sweep) -> Iterator[Point]:
    for value in sweep.values:
        point = trial.measure(value, sweep.steps)
        yield point
        if point.status is not Status.MEASURED:
            return


def largest(measure: Callable[[int, int], Point], start: int, sweep: Sweep, budget: int) -> Iterator[Point]:
    """Points up to the largest value for which `measure(value, timed steps)` fits `budget`, that one marked."""
    unit = UNITS[sweep.axis]
    points: dict[int, Point] = {}

    def fits(value: int) -> bool:
        points[value] = measure(value, 1)
        return points[value].status is Status.MEASURED

    low, high = 0, None
    most = sweep.limit or max(start, unit)
    for value in sorted({min(value, most) for value in (start, unit)}, reverse=True):
        if fits(value):
            low = value
            break
        high = value
    found, reason, gap, astray = False, "", 0, False
    while low and not found and len(points) < TRIES:
        step = max(unit, low // 50 // unit * unit)
        if high is not None and high - low <= step:
            found = True
            break
        value = _proposal(points, low, high, budget, step)
        if high is not None:
            astray = astray or value >= high or 0 < gap < 2 * (high - low)  # no line that leads anywhere
            value = (low + high) // 2 if astray else value
            value, gap = min(max(value, low + step), max(low + step, high - step)), high - low
        value = value // unit * unit
        if sweep.limit is not None and value > sweep.limit:
            value = sweep.limit
        if value <= low:
            found, reason = True, f"the model takes no more than {low:,}"
            break
        seconds = (points[low].step_seconds or 0.0) * value / low
        if seconds > sweep.longest_step:
            reason = f"a step of {value:,} would take about {seconds:.0f} s; `longest_step` allows more"
            break
        if fits(value):
            low = value
        else:
            high = value
    if found:
        last = measure(low, sweep.steps)
        points[low] = replace(last, largest=last.status is Status.MEASURED, reason=reason)
    elif low:
        points[low] = replace(points[low], reason=reason or f"the search ended after {TRIES} sizes")
    yield from (points[value] for value in sorted(points))


def _proposal(points: dict[int, Point], low: int, high: int | None, budget: int, step: int) -> int:
    """Where the line through the two peaks nearest to the budget meets it; above `low`, but not by too much."""
    known = [
        (value, point.peak_bytes)
        for value, point in sorted(points.items())
        if point.peak_bytes is not None and (high is None or value <= high)
    ]
    value = GROWTH * low
    if len(known) >= 2:
        (a, peak_a), (b, peak_b) = known[-2:]
        if peak_b > peak_a:
            value = min(value, int(b + (budget - peak_b) * (b - a) / (peak_b - peak_a)))
    return max(value, low + step)


class _Trial:
    """A model with its method in place, that is given calls of different sizes."""

    def __init__(self, job: Job, prepared: Prepared) -> None:
        assert job.sweep is not None
        self.job, self.prepared = job, prepared
        self.axis = job.sweep.axis
        self.budget = _budget(prepared.model, job.sweep, job.setting)
        self.tokens = torch.load(job.source.tokens) if job.source.tokens else None
        self.step: TrainingStep | None = None
        if self.budget is not None and job.source.on == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.budget / total))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The method is in place, and the optimiser has its state."""
        model, call = self.prepared.model, self.prepared.call
        with in_place(model, self.job.method, self.job.blocks, call):
            setting = self.job.setting
            self.step = TrainingStep(model, call, optimizer_for(model, setting.optimizer), setting.autocast)
            yield
            self.step = None

    def measure(self, value: int, steps: int) -> Point:
        """Memory of a step at `value`, and the times of `steps`."""
        assert self.step is not None
        point = Point(self.axis, value, self.job.method.spec, Status.OUT_OF_MEMORY, None)
        try:
            self.step.call = self._call(value)
            if not self.step.optimizer.state:
                self.step.run()
            peak = measure_memory(self.step).peak_bytes
            if self.budget is not None and peak > self.budget:
                return replace(point, peak_bytes=peak)
            seconds = tuple(sum(self.step.timed().values()) for _ in range(steps))
            return replace(point, status=Status.MEASURED, peak_bytes=peak, seconds=seconds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Behind the clause: as long as there is the error, its frames hold the step's tensors.
        self.step.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return point

    def _call(self, value: int) -> Call:
        if self.axis == "depth":
            return self.prepared.call
        setting = self.job.setting
        batch = value if self.axis == "batch" else setting.batch
        sequence = value if self.axis == "sequence" else setting.sequence
        if self.tokens is not None:
            return with_text(self.prepared.call, self.tokens.to(self.job.source.on), batch, sequence or 1)
        assert self.prepared.example is not None
        call = self.prepared.example(batch, sequence)
        moved: Call = tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.job.source.on), call)
        return moved


def _budget(model: nn.Module, sweep: Sweep, setting: Setting) -> int | None:
    """In bytes; a relative one is added to parameters, buffers, gradients and optimiser state."""
    if sweep.extra_bytes is None:
        return sweep.budget_bytes
    return standing_bytes(model, setting.optimizer) + sweep.extra_bytes


def standing_bytes(model: nn.Module, optimizer: str) -> int:
    """Bytes of parameters, buffers, gradients and optimiser state."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    state = update_of(updated_by(model, Optimizer.parse(optimizer), "cpu")).state
    return storage_bytes([*model.parameters(), *model.buffers()]) + trained + state
