"""What to do, from what was measured: a pure function of a profile."""

from __future__ import annotations

from collections.abc import Sequence

from autorev.analysis import Category, Recommendation
from autorev.format import format_bytes as size
from autorev.format import format_integer as number
from autorev.offers import what_dominates
from autorev.plan import COMFORT
from autorev.profiler.advice.candidates import (
    WORTH,
    Candidate,
    allowed,
    at_largest_batch,
    candidates,
    is_faster,
    is_measured,
    same_loss,
    saves_too_little,
    without_chunks,
)
from autorev.profiler.advice.further import further
from autorev.profiler.points import largest_points
from autorev.profiler.record import Profile, Status

_Choice = tuple[Candidate, str]


def advise(profile: Profile) -> Recommendation:
    """The method for `profile.goal`, why, and what would help further; its method is the method's spec, or None.

    Predictions count only where nothing was measured, and the reason says so. A model without a sequence axis has no
    context to lengthen: its goal is taken as memory.
    """
    known = candidates(profile)
    usable = [candidate for candidate in known if allowed(profile, candidate.method)]
    if not usable:
        return Recommendation(None, "nothing is known yet: no method was measured or predicted; go on with --resume")
    room = _room(profile)
    fitting = [candidate for candidate in usable if room is None or candidate.peak_bytes <= room]
    at_batch = [c for c in at_largest_batch(profile, known) if allowed(profile, c.method)]
    goal = "memory" if profile.setting.sequence is None and profile.goal == "context" else profile.goal
    if goal == "context":
        chosen, why = _longest(profile, usable, room)
    elif not fitting and not (goal == "throughput" and at_batch):
        chosen, why = _nothing_fits(profile, usable, room or 0)
    elif goal == "throughput":
        chosen, why = _fastest(profile, fitting, at_batch, room)
    elif profile.budget_bytes is not None:
        chosen, why = _within(profile, fitting, profile.budget_bytes)
    else:
        chosen, why = _lowest(profile, fitting)
    if not is_measured(profile):
        why = f"predicted, nothing was measured: {why}"
    if not chosen.method.preserves_function:
        why += "; it does not keep a pretrained function, which matters not when training from scratch"
    own_size = next((c for c in known if c.method == chosen.method), chosen)
    fits = room is None or chosen.peak_bytes <= room
    advice = further(profile, own_size, chosen, known, room)
    return Recommendation(chosen.method.spec if fits else None, why, tuple(advice))


def _room(profile: Profile) -> int | None:
    if profile.budget_bytes is not None:
        return profile.budget_bytes
    return profile.device.memory_bytes if profile.device else None


# -- memory


def _lowest(profile: Profile, fitting: Sequence[Candidate]) -> _Choice:
    """Without a budget: the lowest peak, unless something simpler comes close."""
    best = min(fitting, key=lambda c: (c.peak_bytes, c.complexity))
    chosen = best
    for method in ("plain", "checkpoint"):
        simple = same_loss(fitting, method, best.method.loss)
        if simple is not None and saves_too_little(best, simple):
            chosen = simple
            break
    full = next((c for c in fitting if c.method.spec == without_chunks(chosen.method.spec)), chosen)
    if full is not chosen and saves_too_little(best, full):
        chosen = full
    if chosen is best and best.method.name == "plain":
        return best, f"do not convert: nothing measured lowers plain training's peak of {size(best.peak_bytes)}"
    if chosen is best:
        return best, f"{_imperative(best)}: the lowest peak, {size(best.peak_bytes)}{_than_plain(profile)}"
    saved = chosen.peak_bytes - best.peak_bytes
    no_more = f"{best.title}, the lowest, saves only {size(saved)} ({saved / chosen.peak_bytes:.1%}) more"
    if best.rate is not None and chosen.rate is not None:
        no_more += " and is no faster"
    if chosen.method.spec == "plain":
        return chosen, f"do not convert: plain training peaks at {size(chosen.peak_bytes)}, and {no_more}"
    enough = "checkpointing is enough" if chosen.method.spec == "checkpoint" else _imperative(chosen)
    return chosen, f"{enough}: it peaks at {size(chosen.peak_bytes)}{_than_plain(profile)}; {no_more}"


def _within(profile: Profile, fitting: Sequence[Candidate], budget: int) -> _Choice:
    """Under a budget: the fastest that fits."""
    chosen, tie = _simplest_of_fastest(fitting)
    why = f"{_imperative(chosen)}: it peaks at {size(chosen.peak_bytes)} of the {size(budget)} there are"
    if chosen.method.spec == "plain":
        why = f"do not convert: plain training peaks at {size(chosen.peak_bytes)} of the {size(budget)} there are"
    else:
        why += _than_plain(profile)
    if chosen.rate is not None:
        why += f", and nothing that fits is faster than its {_rate(profile, chosen)}{tie}"
    if chosen.peak_bytes > COMFORT * budget:
        why += "; it fits narrowly"
    return chosen, why


def _nothing_fits(profile: Profile, usable: Sequence[Candidate], room: int) -> _Choice:
    best, _ = _lowest(profile, usable)
    why = what_dominates(best.categories, best.peak_bytes)
    return best, f"nothing fits: even {best.title} needs {size(best.peak_bytes)} of {size(room)}; {why}"


# -- throughput


def _fastest(
    profile: Profile, fitting: Sequence[Candidate], at_batch: Sequence[Candidate], room: int | None
) -> _Choice:
    """The highest rate, each method at the batch where it is fastest."""
    best: dict[str, Candidate] = {}
    for candidate in (*fitting, *at_batch):
        spec = candidate.method.spec
        if spec not in best or (candidate.rate or 0) > (best[spec].rate or 0):
            best[spec] = candidate
    timed = [c for c in best.values() if c.rate is not None]
    if not timed:
        simplest = min(best.values(), key=lambda c: c.complexity)
        return simplest, f"{_imperative(simplest)}: it fits, and nothing was timed yet"
    chosen, tie = _simplest_of_fastest(timed)
    at_size = f" at a batch of {number(chosen.batch)}" if at_batch else ""
    peak = f"peaks at {size(chosen.peak_bytes)}" + (f" of {size(room)}" if room else "")
    if chosen.method.name == "plain":
        why = f"do not convert: plain training {peak}, and nothing is faster than its {_rate(profile, chosen)}"
    else:
        why = f"{_imperative(chosen)}: {_rate(profile, chosen)}, the most that fits; it {peak}"
    why += at_size + tie
    for method in ("plain", "checkpoint"):
        rival = same_loss(timed, method, chosen.method.loss)
        if rival is not None and rival.method != chosen.method:
            size_of_rival = f" at a batch of {number(rival.batch)}" if at_batch else ""
            why += f"; {rival.title} reaches {_rate(profile, rival)}{size_of_rival}"
    return chosen, why


def _simplest_of_fastest(found: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The simplest of those that the fastest does not beat by more than the spread, and a word on the difference."""
    timed = [c for c in found if c.rate is not None]
    if not timed:
        return min(found, key=lambda c: c.complexity), ""
    fastest = max(timed, key=lambda c: c.rate or 0)
    chosen = min((c for c in timed if not is_faster(fastest, c)), key=lambda c: c.complexity)
    if chosen is fastest:
        return chosen, ""
    assert fastest.rate is not None and chosen.rate is not None
    more = fastest.rate / chosen.rate - 1
    spread = max(fastest.spread, chosen.spread)
    return chosen, f" ({fastest.title} measured {more:.1%} more, within the spread of the samples, {spread:.1%})"


# -- context


def _longest(profile: Profile, usable: Sequence[Candidate], room: int | None) -> _Choice:
    """The longest sequence, swept or extrapolated; without room to fill, the least memory per token."""
    swept = largest_points(profile, "sequence")
    if swept:
        lengths = {c.method.spec: float(swept[c.method.spec].value) for c in usable if c.method.spec in swept}
        how = "measured in a sweep"
    else:
        lengths = {c.method.spec: _extrapolated(profile, c, room) for c in usable}
        how = "extrapolated on a straight line from the peak measured at this size; sweep the sequence to be sure"
    reached = [c for c in usable if lengths.get(c.method.spec)]
    if not reached:
        return _lowest(profile, usable) if room is None else _nothing_fits(profile, usable, room)
    best = min(reached, key=lambda c: (-lengths[c.method.spec], c.complexity))
    for method in ("plain", "checkpoint"):
        simple = same_loss(reached, method, best.method.loss)
        if simple is not None and lengths[simple.method.spec] >= (1 - WORTH) * lengths[best.method.spec]:
            best = simple
            break
    counted = bool(room or swept)
    within = f" in {size(room)}" if room else ""

    def told(c: Candidate) -> str:
        length = lengths[c.method.spec]
        # Without a budget the figure is tokens per byte, of which a person wants the reverse.
        return f"{number(int(length))} tokens{within}" if counted else f"{size(round(1 / length))} a token"

    why = f"{_imperative(best)}: {told(best)} at a batch of {number(profile.setting.batch)}, {how}"
    for method in ("plain", "checkpoint"):
        rival = same_loss(reached, method, best.method.loss)
        if rival is not None and rival.method != best.method:
            why += f"; {rival.title} {'reaches' if counted else 'takes'} {told(rival)}"
    return best, why


def _extrapolated(profile: Profile, candidate: Candidate, room: int | None) -> float:
    """Tokens per sample that `room` holds, or tokens a byte without one: what is not fixed grows with the tokens."""
    sequence = profile.setting.sequence or 1
    fixed, growing = candidate.fixed_bytes, candidate.peak_bytes
    if candidate.phase == "optimizer":
        # The peak that grows stands elsewhere, and how many gradients are alive in it is not known: none, to be safe.
        growing = max(candidate.phase_peaks.get(phase, 0) for phase in ("forward", "backward"))
        fixed -= candidate.categories.get(Category.GRADIENTS, 0)
    per_token = (growing - fixed) / sequence
    if per_token <= 0:
        return 0.0
    if room is None:
        return 1 / per_token
    if candidate.phase_peaks.get("optimizer", 0) > room:
        return 0.0
    return max(0.0, (room - fixed) // per_token)


# -- in words


def _imperative(candidate: Candidate) -> str:
    method = candidate.method
    if method.reversible:
        return f"convert with {method.title}"
    if method.spec == "plain":
        return "do not convert"
    return f"train with {candidate.title}"


def _rate(profile: Profile, candidate: Candidate) -> str:
    rate = candidate.rate or 0.0
    return f"{rate:,.3g} {profile.units} a second" if rate < 100 else f"{rate:,.0f} {profile.units} a second"


def _than_plain(profile: Profile) -> str:
    plain = profile.result("plain")
    if plain is None:
        return ""
    if plain.status is Status.OUT_OF_MEMORY:
        return ", where plain training does not fit"
    figures = plain.memory or (None if is_measured(profile) else plain.prediction)
    return f", where plain training needs {size(figures.peak_bytes)}" if figures else ""
