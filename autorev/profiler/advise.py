"""The advice on a profile, as `autorev.advice` takes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autorev.advice.case import TITLES, Candidate, Case, Possible
from autorev.advice.predicted import predicted
from autorev.advice.recommend import recommend
from autorev.analysis import Reach, Recommendation
from autorev.format import format_bytes, plural
from autorev.profiler.points import largest_points, point_per_second, point_spread
from autorev.profiler.record import WIDE_SPREAD, Profile, Result, Status

_FAILED = (Status.OUT_OF_MEMORY, Status.REFUSED, Status.FAILED)


def advise(profile: Profile) -> Recommendation:
    """The method for `profile.goal`, why, and what would help further; its method is the method's spec, or None.

    Predictions count only where nothing was measured, and the reason says so.
    """
    measured = any(result.memory is not None for result in profile.results)
    tried = [result for result in profile.results if result.status not in _FAILED]
    known = [c for result in tried if (c := _candidate(profile, result, measured)) is not None]
    device, budget = profile.device, profile.budget_bytes
    room, there_is = None, ""
    if budget is not None:
        room, there_is = budget, f"the {format_bytes(budget)} there are"
    elif device is not None:
        room, there_is = device.usable_bytes, f"the {format_bytes(device.usable_bytes)} to use on {device.title}"
    batches, lengths = (
        {name: point.value for name, point in largest_points(profile, axis).items()} for axis in ("batch", "sequence")
    )
    doubts = ", ".join(_doubts(profile))
    doubtful = f"times are in doubt for {doubts}: measure more rounds on a machine that does nothing else"
    found = recommend(
        Case(
            setting=profile.setting,
            known=tuple(known),
            measured=measured,
            room=room,
            there_is=there_is,
            to_be_filled=budget is not None,
            goal=profile.goal,
            pretrained=profile.pretrained,
            blocks=profile.blocks,
            largest=tuple(_at_largest_batch(profile, known)),
            reaches={name: Reach(name, batches.get(name), lengths.get(name)) for name in {**batches, **lengths}},
            failed={r.method.spec: f"{r.status.value}: {r.reason}" for r in profile.results if r.status in _FAILED},
            remarks=(doubtful,) if doubts else (),
            units=profile.units,
            possible=Possible(lora=profile.pretrained),
        )
    )
    if measured or not known:
        return found
    return replace(found, why=f"predicted, nothing was measured: {found.why}")


def _candidate(profile: Profile, result: Result, measured: bool) -> Candidate | None:
    memory, method = result.memory, result.method
    title = TITLES.get(method.spec, method.title)
    if not measured and result.prediction is not None:
        return predicted(result.prediction, method, profile.setting, method.spec, title)
    if memory is None:
        return None
    return Candidate(
        name=method.spec,
        title=title,
        method=method,
        peak_bytes=memory.peak_bytes,
        phase=memory.phase,
        categories=memory.categories,
        phase_peaks=memory.phase_peaks,
        block_bytes=memory.block_bytes,
        seconds=result.step_seconds,
        rate=profile.per_second(result.step_seconds),
        spread=WIDE_SPREAD if result.spread is None else result.spread,
        batch=profile.setting.batch,
    )


def _at_largest_batch(profile: Profile, known: list[Candidate]) -> Iterator[Candidate]:
    """The methods at the largest batch that fits each, where it was timed."""
    of_setting = {candidate.name: candidate for candidate in known}
    for result in profile.results:
        method = result.method
        point = largest_points(profile, "batch").get(method.spec)
        rate = None if point is None else point_per_second(profile, point)
        if point is None or rate is None or point.peak_bytes is None:
            continue
        spread = point_spread(point)
        beside = of_setting.get(method.spec)
        yield Candidate(
            name=method.spec,
            title=TITLES.get(method.spec, method.title),
            method=method,
            peak_bytes=point.peak_bytes,
            phase=beside.phase if beside else "",
            seconds=point.step_seconds,
            rate=rate,
            spread=WIDE_SPREAD if spread is None else spread,
            batch=point.value,
        )


def _doubts(profile: Profile) -> Iterator[str]:
    for result in profile.results:
        if result.samples and result.spread is None:
            yield f"{result.method.title} ({plural(len(result.samples), 'sample')} only)"
        elif result.samples and result.in_doubt:
            yield f"{result.method.title} (quartiles {result.spread:.0%} apart)"
