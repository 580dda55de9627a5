"""How far each method gets on the device, and its peaks on the way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from autorev.analysis import Reach, Sweep
from autorev.errors import first_line
from autorev.methods import Method
from autorev.prediction.forecast import Forecaster
from autorev.prediction.scaling import ScaledTrace
from autorev.prediction.simulate import StepTrace

AXES = ("batch", "sequence")
MOST_CORRECTIONS = 5
"""Simulated steps to settle how far a method reaches; one is the rule."""
NEARER = 8
"""So many times shorter is the next that is simulated, where nothing seems to fit."""
CLOSE = 0.002
"""Relative difference at which a proposed peak and the simulated one are the same."""


@dataclass(eq=False)
class Exploration:
    """One method's step at other sizes."""

    method: Method
    curves: dict[str, ScaledTrace] = field(default_factory=dict)
    """Axis -> the step along it; an axis that cannot be varied is missing."""
    limits: dict[str, int] = field(default_factory=dict)
    """Axis -> the largest size that fits the device."""
    problems: list[str] = field(default_factory=list)

    def reach(self) -> Reach:
        """The public form of the limits."""
        return Reach(self.method.known_as, self.limits.get("batch"), self.limits.get("sequence"))


def explore(
    forecaster: Forecaster,
    method: Method,
    here: StepTrace,
    axes: tuple[str, ...] = AXES,
    room: int | None = None,
) -> Exploration:
    """Vary batch and sequence around `here`, a simulated step at the setting's own sizes; `room` is in bytes, and by
    default what the device has."""
    exploration = Exploration(method)
    room = forecaster.device.usable_bytes if room is None else room
    for axis in axes:
        if size_at(forecaster, axis) is None or (axis == "batch" and not forecaster.resizable):
            continue
        try:
            curve = _curve(forecaster, method, here, axis)
            limit, curve = _limit(forecaster, method, curve, axis, room)
        except Exception as error:  # the model ran at the setting's sizes; that it does not at others is an answer
            exploration.problems.append(f"the {axis} axis could not be varied: {first_line(error)}")
            continue
        exploration.curves[axis], exploration.limits[axis] = curve, limit
    return exploration


def size_at(forecaster: Forecaster, axis: str) -> int | None:
    """The setting's own size along an axis."""
    return forecaster.setting.batch if axis == "batch" else forecaster.setting.sequence


def _trace(forecaster: Forecaster, method: Method, axis: str, size: int) -> StepTrace:
    setting = forecaster.setting
    if axis == "batch":
        return forecaster.trace(method, size, setting.sequence)
    return forecaster.trace(method, setting.batch, size)


def _curve(forecaster: Forecaster, method: Method, here: StepTrace, axis: str) -> ScaledTrace:
    size = size_at(forecaster, axis)
    assert size is not None
    points: tuple[int, ...]
    if axis == "batch":
        # Not through a batch of one: kernels treat an axis of one element differently (views instead of copies).
        points = (2, 3) if size == 1 else (size, size + 2)
    else:
        longest = forecaster.longest_sequence or 2 * size
        points = (max(size // 4, 2), max(size // 2, 4), size)
        if 2 * size <= longest:
            points = (max(size // 2, 4), size, 2 * size)
    traces = (here if p == size else _trace(forecaster, method, axis, p) for p in points)
    return ScaledTrace(points, tuple(traces))


def _limit(forecaster: Forecaster, method: Method, curve: ScaledTrace, axis: str, room: int) -> tuple[int, ScaledTrace]:
    """The largest size that fits, and the curve sharpened there: it proposes a size, a simulated step disposes."""
    most = 2**20 if axis == "batch" else forecaster.longest_sequence or 2**24

    def fits(size: int) -> bool:
        return forecaster.peak(curve.at(size), method) <= room

    size = largest(fits, most)
    for _ in range(MOST_CORRECTIONS):
        # That not even one fits, far below what was simulated, is not believed: peaks are no polynomials there.
        at = size or (curve.points[0] // NEARER if _may_fit(forecaster, curve, room) else 0)
        if at == 0 or at in curve.points or (axis == "batch" and forecaster.walks_batch):
            break
        trace = _trace(forecaster, method, axis, at)
        simulated, proposed = forecaster.peak(trace, method), forecaster.peak(curve.at(at), method)
        curve = curve.with_point(at, trace)
        if at == size and simulated <= room and abs(simulated - proposed) <= CLOSE * proposed:
            break
        size = largest(fits, most)
    return size, curve


def _may_fit(forecaster: Forecaster, curve: ScaledTrace, room: int) -> bool:
    """Is there room for what is alive before a step?"""
    return forecaster.standing(curve.traces[0]) < room


def sweeps(forecaster: Forecaster, explored: list[Exploration]) -> list[Sweep]:
    """Every method's peaks over the same sizes, up to a little beyond what the best of them reaches."""
    found = []
    for axis in AXES:
        here = size_at(forecaster, axis)
        if here is None:
            continue
        most = min(max([2 * here, *(2 * e.limits.get(axis, 0) for e in explored)]), 256 * here)
        if axis == "sequence" and forecaster.longest_sequence is not None:
            most = min(most, forecaster.longest_sequence)
        values = powers_around(here, most)
        for exploration in explored:
            curve, method = exploration.curves.get(axis), exploration.method
            if curve is not None:
                peaks = tuple(forecaster.peak(curve.at(value), method) for value in values)
                found.append(Sweep(axis, method.known_as, values, peaks))
    return found


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n <= `most` with `fits(n)`, for a test that turns from true to false once; 0 when none fits."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def powers_around(value: int, most: int) -> tuple[int, ...]:
    """Powers of two from an eighth of `value` up to `most`, with `value` itself."""
    powers = [2**n for n in range(most.bit_length()) if max(value // 8, 1) <= 2**n <= most]
    return tuple(sorted({value, *powers}))
