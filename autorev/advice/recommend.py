"""What to train with, and why: a pure function of what is predicted or measured.

Every figure that a sentence names stands in the table of predictions or measurements, in the table's unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from autorev.advice.case import COMFORT, WORTH, Candidate, Case
from autorev.advice.further import further
from autorev.advice.savings import what_dominates
from autorev.analysis import Category, Recommendation
from autorev.format import format_integer, format_seconds

_Choice = tuple[Candidate, str]
_BASELINES = ("plain", "checkpoint")
"""What everything else is compared with."""


def recommend(case: Case) -> Recommendation:
    """The way to train for the case's goal, why, and what would help further; None where nothing fits.

    A model without a sequence axis has no context to lengthen: its goal is taken as memory.
    """
    usable = case.usable
    if not usable:
        return Recommendation(None, "nothing is known yet: no method was measured or predicted; go on with --resume")
    fitting = [c for c in usable if case.fits(c)]
    goal = "memory" if case.setting.sequence is None and case.goal == "context" else case.goal
    if goal == "context":
        chosen, why = _longest(case, usable)
    elif not fitting and not (goal == "throughput" and case.largest):
        chosen, why = _nothing_fits(case, usable)
    elif goal == "throughput":
        chosen, why = _highest_rate(case, fitting)
    elif case.to_be_filled:
        chosen, why = _fastest(case, fitting)
    else:
        chosen, why = _lowest(case, fitting)
    if not chosen.method.preserves_function:
        why += "; it does not keep a pretrained function, which does not matter when training from scratch"
    return Recommendation(chosen.name if case.fits(chosen) else None, why, tuple(further(case, chosen)))


# -- memory


def _fastest(case: Case, fitting: Sequence[Candidate]) -> _Choice:
    """The fastest that fits; of equally fast ones the simplest."""
    chosen, tie = _simplest_of_fastest(fitting)
    begin = "checkpointing is enough" if chosen.method.spec == "checkpoint" else _imperative(chosen)
    peaks = "plain training peaks" if chosen.method.spec == "plain" else "it peaks"
    why = f"{begin}: {peaks} at {case.size(chosen.peak_bytes)} of {case.there_is}"
    if chosen.rate is not None:
        why += f", and nothing that fits is faster than its {case.rate(chosen)}{tie}"
    others = [_against(case, other, chosen) for other in _rivals(case, chosen)]
    if case.failed.get("plain", "").startswith("out of memory"):
        others.insert(0, "plain training does not fit")
    if chosen.method.name != "plain" and case.irreversible:
        others.append(case.irreversible)
    if not case.fits(chosen, COMFORT):
        others.append("it fits narrowly")
    return chosen, "; ".join([why, *others])


def _lowest(case: Case, fitting: Sequence[Candidate]) -> _Choice:
    """The lowest peak, unless something simpler comes close."""
    best = min(fitting, key=lambda c: (c.peak_bytes, c.complexity))
    chosen = best
    for method in _BASELINES:
        simple = _same_loss(fitting, method, best.method.loss)
        if simple is not None and _saves_too_little(best, simple):
            chosen = simple
            break
    full = next((c for c in fitting if c.method.spec == _without_chunks(chosen.method.spec)), chosen)
    if full is not chosen and _saves_too_little(best, full):
        chosen = full
    if chosen is best and best.method.name == "plain":
        return best, f"do not convert: nothing measured lowers plain training's peak of {case.size(best.peak_bytes)}"
    if chosen is best:
        return best, f"{_imperative(best)}: the lowest peak, {case.size(best.peak_bytes)}{_than_plain(case)}"
    saved = chosen.peak_bytes - best.peak_bytes
    no_more = f"{best.title}, the lowest, saves only {case.size(saved)} ({saved / chosen.peak_bytes:.1%}) more"
    if best.rate is not None and chosen.rate is not None:
        no_more += " and is no faster"
    peak = case.size(chosen.peak_bytes)
    if chosen.method.spec == "plain":
        return chosen, f"do not convert: plain training peaks at {peak}, and {no_more}"
    enough = "checkpointing is enough" if chosen.method.spec == "checkpoint" else _imperative(chosen)
    return chosen, f"{enough}: it peaks at {peak}{_than_plain(case)}; {no_more}"


def _nothing_fits(case: Case, usable: Sequence[Candidate]) -> _Choice:
    best, _ = _lowest(case, usable)
    needs = f"even {best.title} needs {case.size(best.peak_bytes)} of {case.there_is}"
    return best, f"nothing fits: {needs}; {what_dominates(best.categories, best.peak_bytes, case.size)}"


def _rivals(case: Case, chosen: Candidate) -> Iterator[Candidate]:
    """Why not the others: those that are simpler, the best reversible one, and one that is lower and as fast."""
    same = [c for c in case.usable if c is not chosen and c.method.loss == chosen.method.loss]
    reversible = min((c for c in same if c.method.reversible), key=lambda c: c.peak_bytes, default=None)
    for other in sorted(same, key=lambda c: c.complexity):
        lower = case.fits(other) and other.peak_bytes < chosen.peak_bytes and not chosen.is_faster(other)
        if other is reversible:
            told = lower or chosen.method.name != "plain"
        else:
            told = other.method.name in (*_BASELINES, "offload") and (lower or other.complexity < chosen.complexity)
        if told:
            yield other


def _against(case: Case, other: Candidate, chosen: Candidate) -> str:
    peak = case.size(other.peak_bytes)
    if not case.fits(other):
        inputs = other.held(Category.STORED_ACTIVATIONS)
        text = f"{other.title} does not fit, at {peak}"
        if other.method.name == "checkpoint" and inputs >= 0.2 * other.peak_bytes:
            text += f", of which {case.size(inputs)} are stored, one input per block"
        return text
    if chosen.is_faster(other) and chosen.seconds and other.seconds:
        faster, slower = format_seconds(chosen.seconds), format_seconds(other.seconds)
        text = f"{other.title} takes longer, {slower} instead of {faster} a step"
    else:
        text = f"{other.title} is no faster" if other.rate is not None else f"{other.title} was not timed"
    lower = "at" if other.peak_bytes >= chosen.peak_bytes else "though at"
    host = ", and needs the host's memory" if other.method.name == "offload" else ""
    return f"{text}, {lower} {peak}{host}"


# -- throughput


def _highest_rate(case: Case, fitting: Sequence[Candidate]) -> _Choice:
    """Each at the batch where it is fastest."""
    best: dict[str, Candidate] = {}
    for candidate in (*fitting, *(c for c in case.largest if c.method.preserves_function or not case.pretrained)):
        if candidate.name not in best or (candidate.rate or 0) > (best[candidate.name].rate or 0):
            best[candidate.name] = candidate
    timed = [c for c in best.values() if c.rate is not None]
    if not timed:
        simplest = min(best.values(), key=lambda c: c.complexity)
        return simplest, f"{_imperative(simplest)}: it fits, and nothing was timed yet"
    chosen, tie = _simplest_of_fastest(timed)

    def size_of(candidate: Candidate) -> str:
        return f" at a batch of {format_integer(candidate.batch)}" if case.largest else ""

    peak = f"peaks at {case.size(chosen.peak_bytes)}" + (f" of {case.there_is}" if case.room else "")
    if chosen.method.name == "plain":
        why = f"do not convert: plain training {peak}, and nothing is faster than its {case.rate(chosen)}"
    else:
        why = f"{_imperative(chosen)}: {case.rate(chosen)}, the most that fits; it {peak}"
    rivals = _other_baselines(timed, chosen)
    reached = [f"{rival.title} reaches {case.rate(rival)}{size_of(rival)}" for rival in rivals]
    return chosen, "; ".join([f"{why}{size_of(chosen)}{tie}", *reached])


def _simplest_of_fastest(found: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The simplest of those that the fastest does not beat by more than the spread, and a word on the difference."""
    timed = [c for c in found if c.rate is not None]
    if not timed:
        return min(found, key=lambda c: c.complexity), ""
    fastest = max(timed, key=lambda c: c.rate or 0)
    chosen = min((c for c in timed if not fastest.is_faster(c)), key=lambda c: c.complexity)
    if chosen is fastest or chosen.rate == fastest.rate:
        return chosen, ""
    assert fastest.rate is not None and chosen.rate is not None
    more, spread = fastest.rate / chosen.rate - 1, max(fastest.spread, chosen.spread)
    return chosen, f" ({fastest.title} measured {more:.1%} more, within the spread of the samples, {spread:.1%})"


# -- context


def _longest(case: Case, usable: Sequence[Candidate]) -> _Choice:
    """The longest sequence, swept or extrapolated; without room to fill, the least memory per token."""
    swept = {name: reach.longest_sequence for name, reach in case.reaches.items() if reach.longest_sequence}
    if swept:
        lengths = {c.name: float(swept[c.name]) for c in usable if c.name in swept}
        how = "measured in a sweep"
    else:
        lengths = {c.name: _extrapolated(case, c) for c in usable}
        how = "extrapolated on a straight line from the peak measured at this size; sweep the sequence to be sure"
    reached = [c for c in usable if lengths.get(c.name)]
    if not reached:
        return _lowest(case, usable) if case.room is None else _nothing_fits(case, usable)
    best = min(reached, key=lambda c: (-lengths[c.name], c.complexity))
    for method in _BASELINES:
        simple = _same_loss(reached, method, best.method.loss)
        if simple is not None and lengths[simple.name] >= (1 - WORTH) * lengths[best.name]:
            best = simple
            break
    counted = bool(case.room or swept)
    within = f" in {case.size(case.room)}" if case.room else ""

    def told(c: Candidate) -> str:
        length = lengths[c.name]
        # Without a budget the figure is tokens per byte, of which a person wants the reverse.
        return f"{format_integer(int(length))} tokens{within}" if counted else f"{case.size(round(1 / length))} a token"

    why = f"{_imperative(best)}: {told(best)} at a batch of {format_integer(case.setting.batch)}, {how}"
    verb = "reaches" if counted else "takes"
    rivals = [f"{rival.title} {verb} {told(rival)}" for rival in _other_baselines(reached, best)]
    return best, "; ".join([why, *rivals])


def _extrapolated(case: Case, candidate: Candidate) -> float:
    """Tokens per sample that the room holds, or tokens a byte without one: what is not fixed grows with the tokens."""
    fixed = candidate.held(Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
    growing = candidate.peak_bytes
    if candidate.phase == "optimizer":
        # The peak that grows stands elsewhere, and how many gradients are alive in it is not known: none, to be safe.
        growing = max(candidate.phase_peaks.get(phase, 0) for phase in ("forward", "backward"))
        fixed -= candidate.held(Category.GRADIENTS)
    per_token = (growing - fixed) / (case.setting.sequence or 1)
    if per_token <= 0:
        return 0.0
    if case.room is None:
        return 1 / per_token
    if candidate.phase_peaks.get("optimizer", 0) > case.room:
        return 0.0
    return max(0.0, (case.room - fixed) // per_token)


# -- comparisons and words


def _same_loss(found: Iterable[Candidate], method: str, loss: str) -> Candidate | None:
    """The candidate of `method` with that loss, or with any where there is none."""
    of_method = [candidate for candidate in found if candidate.method.name == method]
    return min(of_method, key=lambda candidate: candidate.method.loss != loss, default=None)


def _other_baselines(found: Sequence[Candidate], chosen: Candidate) -> list[Candidate]:
    rivals = (_same_loss(found, method, chosen.method.loss) for method in _BASELINES)
    return [rival for rival in rivals if rival is not None and rival.name != chosen.name]


def _saves_too_little(complicated: Candidate, simple: Candidate) -> bool:
    """Is a lower peak not worth what it takes: less than `WORTH` lower, and no faster?"""
    return 1 - complicated.peak_bytes / simple.peak_bytes < WORTH and not complicated.is_faster(simple)


def _without_chunks(spec: str) -> str:
    """The spec of the same method with full logits."""
    return spec.removesuffix("loss=chunked").removesuffix(",").removesuffix(":")


def _imperative(candidate: Candidate) -> str:
    if candidate.method.reversible:
        return f"convert with {candidate.title}"
    if candidate.method.spec == "plain":
        return "do not convert"
    if candidate.method.name == "offload":
        return "checkpoint, and keep the blocks' inputs in host memory"
    return f"train with {candidate.title}"


def _than_plain(case: Case) -> str:
    if case.failed.get("plain", "").startswith("out of memory"):
        return ", where plain training does not fit"
    plain = case.find("plain")
    return f", where plain training needs {case.size(plain.peak_bytes)}" if plain else ""
