"""What the advice chooses from: every method at every size that was measured, and when one is better than another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autorev.methods import Method
from autorev.offers import FIXED
from autorev.profiler.points import largest_points, point_per_second, point_spread
from autorev.profiler.record import WIDE_SPREAD, Profile, Result, Status

WORTH = 0.05
"""A peak has to be lower by this share to be worth a conversion."""
_titles = {"plain": "plain training", "checkpoint": "checkpointing"}
_SIMPLEST = ("plain", "checkpoint", "sac", "compile", "offload")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One method at one size."""

    method: Method
    peak_bytes: int
    phase: str
    categories: Mapping[str, int]
    """At the peak; empty where they are not known."""
    rate: float | None
    """Tokens (or samples) a second."""
    spread: float
    """Of the rate's samples, relative to their median; 0 for a prediction."""
    batch: int
    block_bytes: tuple[int, ...] = ()
    phase_peaks: Mapping[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """As a sentence names it."""
        return _titles.get(self.method.spec, self.method.title)

    @property
    def fixed_bytes(self) -> int:
        """Weights, gradients and optimiser state at the peak."""
        return sum(self.categories.get(category, 0) for category in FIXED)

    @property
    def complexity(self) -> tuple[int, int]:
        """What PyTorch does by itself comes before a conversion."""
        method = self.method.name
        return (_SIMPLEST.index(method) if method in _SIMPLEST else len(_SIMPLEST)), len(self.method.spec)


def is_measured(profile: Profile) -> bool:
    """Does it hold a measured peak? Predictions do not count where it does: the two are not compared."""
    return any(result.memory is not None for result in profile.results)


def candidates(profile: Profile) -> list[Candidate]:
    """The methods at the setting's own size: those measured, or all predicted where none was."""
    measured = is_measured(profile)
    found = []
    for result in profile.results:
        if result.status in (Status.OUT_OF_MEMORY, Status.REFUSED, Status.FAILED):
            continue
        candidate = _measured(profile, result) if measured else _predicted(profile, result)
        if candidate is not None:
            found.append(candidate)
    return found


def at_largest_batch(profile: Profile, known: Iterable[Candidate]) -> list[Candidate]:
    """The methods at the largest batch that fits each, where it was timed."""
    methods = {result.method.spec: result.method for result in profile.results}
    phases = {candidate.method.spec: candidate.phase for candidate in known}
    found = []
    for spec, point in largest_points(profile, "batch").items():
        rate = point_per_second(profile, point)
        if spec in methods and rate is not None and point.peak_bytes is not None:
            spread = point_spread(point)
            spread = WIDE_SPREAD if spread is None else spread
            phase = phases.get(spec, "")
            found.append(Candidate(methods[spec], point.peak_bytes, phase, {}, rate, spread, point.value))
    return found


def allowed(profile: Profile, method: Method) -> bool:
    """A pretrained model has to keep its function."""
    return method.preserves_function or not profile.pretrained


def is_faster(one: Candidate, other: Candidate) -> bool:
    """By more than the samples of either spread."""
    if one.rate is None or other.rate is None:
        return False
    return one.rate > other.rate * (1 + max(one.spread, other.spread))


def same_loss(found: Iterable[Candidate], method: str, loss: str) -> Candidate | None:
    """The candidate of `method` with that loss, or with any where there is none."""
    of_method = [candidate for candidate in found if candidate.method.name == method]
    return min(of_method, key=lambda candidate: candidate.method.loss != loss, default=None)


def saves_too_little(complicated: Candidate, simple: Candidate) -> bool:
    """Is a lower peak not worth what it takes: less than `WORTH` lower, and no faster?"""
    gain = 1 - complicated.peak_bytes / simple.peak_bytes
    return gain < WORTH and not is_faster(complicated, simple)


def with_chunks(spec: str) -> str:
    """The spec of the same method with the chunked loss."""
    return f"{spec}{',' if ':' in spec else ':'}loss=chunked"


def without_chunks(spec: str) -> str:
    """The spec of the same method with full logits."""
    return spec.removesuffix("loss=chunked").removesuffix(",").removesuffix(":")


def _measured(profile: Profile, result: Result) -> Candidate | None:
    memory = result.memory
    if memory is None:
        return None
    spread = WIDE_SPREAD if result.spread is None else result.spread
    return Candidate(
        method=result.method,
        peak_bytes=memory.peak_bytes,
        phase=memory.phase,
        categories=memory.categories,
        rate=profile.per_second(result.step_seconds),
        spread=spread,
        batch=profile.setting.batch,
        block_bytes=memory.block_bytes,
        phase_peaks=memory.phase_peaks,
    )


def _predicted(profile: Profile, result: Result) -> Candidate | None:
    prediction = result.prediction
    if prediction is None:
        return None
    return Candidate(
        method=result.method,
        peak_bytes=prediction.peak_bytes,
        phase=prediction.phase,
        categories=prediction.categories,
        rate=profile.per_second(prediction.step_seconds),
        spread=0.0,
        batch=profile.setting.batch,
        phase_peaks=prediction.phase_peaks,
    )
