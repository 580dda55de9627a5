"""What the advice chooses from: every variant at every size that was measured, and when one is better than another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autorev.offers import FIXED
from autorev.profiler.points import largest_points, point_per_second, point_spread
from autorev.profiler.record import WIDE_SPREAD, Profile, Result, Status
from autorev.variants import Variant

WORTH = 0.05
"""A peak has to be lower by this share to be worth a conversion."""
_titles = {"plain": "plain training", "checkpoint": "checkpointing"}
_SIMPLEST = ("plain", "checkpoint", "sac", "compile", "offload")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One variant at one size."""

    variant: Variant
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
        return _titles.get(self.variant.spec, self.variant.title)

    @property
    def fixed_bytes(self) -> int:
        """Weights, gradients and optimiser state at the peak."""
        return sum(self.categories.get(category, 0) for category in FIXED)

    @property
    def complexity(self) -> tuple[int, int]:
        """What PyTorch does by itself comes before a conversion."""
        strategy = self.variant.strategy
        return (_SIMPLEST.index(strategy) if strategy in _SIMPLEST else len(_SIMPLEST)), len(self.variant.spec)


def is_measured(profile: Profile) -> bool:
    """Does it hold a measured peak? Predictions do not count where it does: the two are not compared."""
    return any(result.memory is not None for result in profile.results)


def candidates(profile: Profile) -> list[Candidate]:
    """The variants at the setting's own size: those measured, or all predicted where none was."""
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
    """The variants at the largest batch that fits each, where it was timed."""
    variants = {result.variant.spec: result.variant for result in profile.results}
    phases = {candidate.variant.spec: candidate.phase for candidate in known}
    found = []
    for spec, point in largest_points(profile, "batch").items():
        rate = point_per_second(profile, point)
        if spec in variants and rate is not None and point.peak_bytes is not None:
            spread = point_spread(point)
            spread = WIDE_SPREAD if spread is None else spread
            phase = phases.get(spec, "")
            found.append(Candidate(variants[spec], point.peak_bytes, phase, {}, rate, spread, point.value))
    return found


def allowed(profile: Profile, variant: Variant) -> bool:
    """A pretrained model has to keep its function."""
    return variant.preserves_function or not profile.pretrained


def is_faster(one: Candidate, other: Candidate) -> bool:
    """By more than the samples of either spread."""
    if one.rate is None or other.rate is None:
        return False
    return one.rate > other.rate * (1 + max(one.spread, other.spread))


def same_loss(found: Iterable[Candidate], strategy: str, loss: str) -> Candidate | None:
    """The candidate of `strategy` with that loss, or with any where there is none."""
    of_strategy = [candidate for candidate in found if candidate.variant.strategy == strategy]
    return min(of_strategy, key=lambda candidate: candidate.variant.loss != loss, default=None)


def saves_too_little(complicated: Candidate, simple: Candidate) -> bool:
    """Is a lower peak not worth what it takes: less than `WORTH` lower, and no faster?"""
    gain = 1 - complicated.peak_bytes / simple.peak_bytes
    return gain < WORTH and not is_faster(complicated, simple)


def with_chunks(spec: str) -> str:
    """The spec of the same variant with the chunked loss."""
    return f"{spec}{',' if ':' in spec else ':'}loss=chunked"


def without_chunks(spec: str) -> str:
    """The spec of the same variant with full logits."""
    return spec.removesuffix("loss=chunked").removesuffix(",").removesuffix(":")


def _measured(profile: Profile, result: Result) -> Candidate | None:
    memory = result.memory
    if memory is None:
        return None
    spread = WIDE_SPREAD if result.spread is None else result.spread
    return Candidate(
        variant=result.variant,
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
        variant=result.variant,
        peak_bytes=prediction.peak_bytes,
        phase=prediction.phase,
        categories=prediction.categories,
        rate=profile.per_second(prediction.step_seconds),
        spread=0.0,
        batch=profile.setting.batch,
        phase_peaks=prediction.phase_peaks,
    )
