"""The search for the largest size that fits, on made-up memory; nothing is trained here."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
import torch

from autorev.methods import Method
from autorev.profiler.job import Sweep
from autorev.profiler.passes import sweep as passes
from autorev.profiler.passes.sweep import GROWTH, TRIES, UNITS, largest
from autorev.profiler.record import Point, Status

SHAPES: dict[str, Callable[[int], float]] = {
    "affine": lambda n: 1000 + 10 * n,
    "nearly flat": lambda n: 1e6 + n,
    "convex": lambda n: 1000 + 10 * n + n * n,  # attention that keeps its scores
    "cubic": lambda n: 1000 + n**3,
    "concave": lambda n: 1000 + 1000 * math.sqrt(n),
    "in small steps": lambda n: 1000 + 512 * math.ceil(10 * n / 512),
    "in large steps": lambda n: 1000 + 5120 * math.ceil(100 * n / 5120),
    "below the optimizer's peak": lambda n: max(5000, 1000 + 10 * n),
    "with a jump": lambda n: 1000 + 10 * n + 5000 * (n > 30),
}


@dataclass
class Machine:
    """Measures by a formula, and writes down what it was asked for."""

    peak: Callable[[int], float]
    budget: int
    axis: str = "batch"
    enforced: bool = False
    """Stops a step above the budget, as a GPU does, so that its peak is never known."""
    seconds: float = 1e-9
    asked: list[tuple[int, int]] = field(default_factory=list)

    def measure(self, value: int, steps: int) -> Point:
        """See `_Trial.measure`."""
        self.asked.append((value, steps))
        peak = int(self.peak(value))
        point = Point(self.axis, value, "plain", Status.OUT_OF_MEMORY, None if self.enforced else peak)
        if peak > self.budget:
            return point
        return replace(point, status=Status.MEASURED, peak_bytes=peak, seconds=(self.seconds * value,) * steps)

    def search(self, start: int = 1, limit: int | None = None, longest_step: float = 60.0) -> list[Point]:
        """The points of the search, which are what was asked for, once each and in order."""
        sweep = Sweep(self.axis, (), limit, self.budget, None, 3, longest_step)
        points = list(largest(self.measure, start, sweep, self.budget))
        assert [p.value for p in points] == sorted({value for value, _ in self.asked})
        assert sum(p.largest for p in points) <= 1
        return points


def answer(points: list[Point]) -> Point:
    """The point that is marked."""
    return next(p for p in points if p.largest)


@pytest.mark.parametrize("enforced", [False, True], ids=["counted", "enforced"])
@pytest.mark.parametrize("room", [1, 2, 3, 7, 50, 90])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_is_found_and_shown(shape: str, room: int, enforced: bool) -> None:
    """Up to a hundred it is exact: it fits, it was timed in full, and the very next value was tried and does not."""
    peak = SHAPES[shape]
    machine = Machine(peak, int(peak(room)), enforced=enforced)
    points = machine.search()
    exact = max(n for n in range(1, 500) if int(peak(n)) <= machine.budget)
    found = answer(points)
    assert found.status is Status.MEASURED
    assert len(found.seconds) == 3
    if exact < 100:
        assert found.value == exact
    beyond = next(p for p in points if p.value > found.value)
    assert beyond.status is Status.OUT_OF_MEMORY
    assert beyond.value <= max(found.value + 1, 1.02 * found.value)
    assert (beyond.peak_bytes is None) is enforced
    assert not found.reason
    assert len(points) <= TRIES


@pytest.mark.parametrize("shape", SHAPES)
def test_large_sizes_are_found_within_two_percent(shape: str) -> None:
    """Beyond a hundred the next value tried is up to 2 % larger, and that is how exact the answer is."""
    peak = SHAPES[shape]
    for room in (137, 1000, 3001):
        machine = Machine(peak, int(peak(room)))
        points = machine.search()
        found = answer(points)
        beyond = next(p for p in points if p.value > found.value)
        assert int(peak(found.value)) <= machine.budget < peak(beyond.value)
        assert beyond.value <= 1.02 * found.value
        assert len(points) <= TRIES


def test_a_line_is_followed_to_its_end() -> None:
    """Affine memory costs no halving: four times, four times, the answer, the next; then the answer in full."""
    machine = Machine(SHAPES["affine"], 1505)
    machine.search()
    assert machine.asked == [(1, 1), (4, 1), (16, 1), (50, 1), (51, 1), (50, 3)]


def test_what_grows_faster_than_a_line_overshoots_little() -> None:
    """No step is tried that is more than `GROWTH` times as large as one that fits."""
    for shape in ("convex", "cubic", "with a jump"):
        machine = Machine(SHAPES[shape], int(SHAPES[shape](1500)))
        fit = 1
        machine.search()
        for value, _ in machine.asked:
            assert value <= GROWTH * fit
            fit = max(fit, value if machine.peak(value) <= machine.budget else 0)


def test_a_start_that_does_not_fit_is_searched_below() -> None:
    """The setting's own size may be too large already."""
    machine = Machine(SHAPES["affine"], 1505)
    assert answer(machine.search(start=200)).value == 50
    assert machine.asked[:2] == [(200, 1), (1, 1)]


def test_nothing_fits_is_two_points_and_no_answer() -> None:
    """Neither the setting's size nor the smallest: both are recorded, and the search ends."""
    points = Machine(SHAPES["affine"], 500).search(start=8)
    assert [(p.value, p.status, p.largest) for p in points] == [
        (1, Status.OUT_OF_MEMORY, False),
        (8, Status.OUT_OF_MEMORY, False),
    ]


def test_sequences_go_by_sixteens() -> None:
    """All sizes but the start and the model's limit are multiples of 16."""
    machine = Machine(lambda n: 1000 + n + n * n / 100, 20_000, "sequence")
    points = machine.search(start=100)
    assert all(value % UNITS["sequence"] == 0 for value, _ in machine.asked if value != 100)
    exact = max(n for n in range(16, 4000, 16) if machine.peak(n) <= machine.budget)
    assert answer(points).value <= exact <= 1.02 * answer(points).value


@pytest.mark.parametrize("limit", [300, 304, 100, 8])
def test_the_models_limit_is_an_end_of_its_own(limit: int) -> None:
    """Nothing longer is tried; the limit is the largest, and the reason says that memory is not why."""
    machine = Machine(SHAPES["affine"], 10**9, "sequence")
    found = answer(machine.search(start=min(100, limit), limit=limit))
    assert found.value == limit
    assert found.reason == f"the model takes no more than {limit}"
    assert max(value for value, _ in machine.asked) == limit


def test_memory_may_end_before_the_limit() -> None:
    """The limit is not the answer where it does not fit."""
    found = answer(Machine(SHAPES["affine"], 3000, "sequence").search(start=32, limit=1000))
    assert found.value == 192
    assert not found.reason


def test_a_step_that_would_take_too_long_ends_the_search() -> None:
    """Nothing is marked, and the last point says why and which option allows more."""
    machine = Machine(SHAPES["affine"], 10**6, seconds=0.5)
    points = machine.search(longest_step=40)
    assert not any(p.largest for p in points)
    assert max(value for value, _ in machine.asked) * 0.5 <= 40
    assert points[-1].reason == "a step of 256 would take about 128 s; `longest_step` allows more"


def test_the_search_ends_after_so_many_sizes() -> None:
    """Memory that never tells where it ends (every second size fits) is given up, with the reason."""
    machine = Machine(lambda n: 1 if n & (n - 1) == 0 else 10, 5)
    points = machine.search()
    assert len(points) <= TRIES
    huge = Machine(lambda n: 1, 5)
    points = huge.search(longest_step=1e9)
    assert len(points) == TRIES
    assert not any(p.largest for p in points)
    assert points[-1].reason == f"the search ended after {TRIES} sizes"


def test_an_answer_that_fails_when_it_is_timed_is_not_marked() -> None:
    """A fragmented GPU may refuse a size that it took before."""
    machine = Machine(SHAPES["affine"], 1505)
    measure = machine.measure

    def moody(value: int, steps: int) -> Point:
        point = measure(value, steps)
        return replace(point, status=Status.OUT_OF_MEMORY, seconds=()) if steps == 3 else point

    machine.measure = moody  # type: ignore[method-assign]
    assert not any(point.largest for point in machine.search())


def test_what_did_not_fit_is_free_when_the_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error holds the frames that it passed, and these the tensors of the step: they are gone by then."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def full(step: object) -> None:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(passes, "measure_memory", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[0]() is not None))
    trial = passes._Trial.__new__(passes._Trial)
    trial.axis, trial.budget, trial.step = "depth", None, mock.Mock()
    trial.job, trial.prepared = mock.Mock(method=Method("plain")), mock.Mock()
    assert trial.measure(2, 1).status is Status.OUT_OF_MEMORY
    assert alive == [False]
