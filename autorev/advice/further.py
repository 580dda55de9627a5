"""The lines below a recommendation: how to do it, what else would help, and what the choice rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autorev.advice.case import COMFORT, Candidate, Case
from autorev.advice.savings import CHUNKED, Saving, move, savings
from autorev.analysis import Category, Reach
from autorev.commands import SPEC, beside
from autorev.format import format_integer, plural
from autorev.methods import Method
from autorev.words import CATEGORY_TITLES

_USUAL = "momentum:k=3"
"""What convert does by itself."""
_AXES = {"largest_batch": "a batch of {}", "longest_sequence": "{} tokens"}


def further(case: Case, chosen: Candidate) -> Iterator[str]:
    """Advice for the chosen way to train: first what to do, then what would help, most effective first."""
    own = next((c for c in case.known if c.name == chosen.name), chosen)  # at the setting's size: by category
    filling = case.goal == "memory" and case.to_be_filled  # who asked for the least memory wants to fill none
    fits, narrow = case.fits(chosen), not case.fits(chosen, COMFORT)
    if (chosen.method.reversible or chosen.method.tile is not None) and fits:
        yield _how(case, chosen)
    if filling and fits and narrow:
        yield _roomier(case)
    if filling and chosen.method.name == "offload":
        yield from _beside(case)
    if filling and fits:
        yield from _more(case, chosen)
    smaller = [] if fits else list(_smaller(case))
    unhelpful = bool(smaller) or not (narrow or case.room is None)
    for saving in _all_savings(case, own):
        if saving.name != "smaller" or not unhelpful:
            yield saving.text
    if not fits:
        yield from smaller or ["use a device with more memory"]
    if case.room is not None and case.to_be_filled:
        yield from _keep_last(case, chosen, case.room)
    yield from _what_binds(case, own)
    if case.measured:
        rival = _rival(case, own)
        yield rival if chosen.batch == own.batch else f"{rival}; all that at a batch of {own.batch:,}"
    yield from case.remarks


def how(method: Method) -> str:
    """The calls that train as it was predicted, or measured."""
    spec = replace(method, loss="full").spec
    call = "autorev.convert(model)" if spec == _USUAL else f"autorev.convert(model, method={spec!r})"
    if method.loss == "chunked":
        call = f"{CHUNKED} and then {call}"
    checks = ", and autorev.verify(model) checks the gradients" if method.reversible else ""
    return f"{call} does it in user code{checks}"


def _how(case: Case, candidate: Candidate) -> str:
    command = case.possible.command.replace(SPEC, candidate.method.spec.removesuffix(",loss=chunked"))
    return beside(how(candidate.method), command)


# -- other ways that fit


def _roomier(case: Case) -> str:
    roomy = [c for c in case.usable if case.fits(c, COMFORT)]
    best = max(roomy, key=lambda c: c.rate or 0, default=None)
    if best is None:
        return "it fits narrowly" + ("" if case.measured else ": measure it before you rely on it")
    at = case.size(best.peak_bytes) + (f", at {case.rate(best)}" if best.rate else "")
    return f"it fits narrowly: {best.title} leaves room to spare with {at}"


def _beside(case: Case) -> Iterator[str]:
    """What there is for who has no host memory to spare."""
    reversible = [c for c in case.usable if c.method.reversible and case.fits(c)]
    beside = max(reversible, key=lambda c: c.rate or 0, default=None)
    if beside is not None:
        yield f"without the host's memory {beside.title} fits, too, with {case.size(beside.peak_bytes)}"
        yield _how(case, beside)


def _more(case: Case, chosen: Candidate) -> Iterator[str]:
    """How much further another way would get, when the chosen one is enough for now."""
    mine = case.reaches.get(chosen.name)
    for axis, words in _AXES.items():
        now, best = getattr(mine, axis, None), _farthest(case, axis)
        if now and best is not None and (most := getattr(best[1], axis)) > now:
            than = f"{words.format(format_integer(most))} instead of {format_integer(now)}"
            yield f"should you want more: {best[0].title} fits {than}"


def _smaller(case: Case) -> Iterator[str]:
    """How far the memory reaches, where nothing fits."""
    if best := _farthest(case, "largest_batch"):
        batch = best[1].largest_batch or 0
        if batch < case.setting.batch:
            yield f"{best[0].title} fits a batch of {format_integer(batch)}: accumulate gradients over several"
    if best := _farthest(case, "longest_sequence"):
        tokens = best[1].longest_sequence or 0
        if tokens < (case.setting.sequence or 0):
            yield f"{best[0].title} fits {plural(tokens, 'token')} a sample"


def _farthest(case: Case, axis: str) -> tuple[Candidate, Reach] | None:
    reached = [(c, r) for c in case.usable if (r := case.reaches.get(c.name)) and getattr(r, axis)]
    return max(reached, key=lambda found: getattr(found[1], axis), default=None)


# -- what would help


def _all_savings(case: Case, own: Candidate) -> list[Saving]:
    pair = None if own.method.loss == "chunked" else _chunked_pair(case, own)
    if pair is None:
        return savings(case, own, _can_chunk(case, own))
    # A measured saving says more than the size of the logits.
    full, chunked = pair
    text = f"the chunked loss lowers the peak of {full.title} from {case.size(full.peak_bytes)} to "
    text += case.size(chunked.peak_bytes)
    if full.rate and chunked.rate:
        text += f", at {full.rate / chunked.rate - 1:+.1%} in time"
    found = Saving("chunked", full.peak_bytes - chunked.peak_bytes, f"{text} ({CHUNKED})")
    return sorted([found, *savings(case, own, can_chunk=False)], key=lambda saving: -saving.bytes)


def _can_chunk(case: Case, own: Candidate) -> bool:
    """Is there a loss to chunk that is not chunked, and was chunking it not refused?"""
    chunked = own.method.loss == "chunked" or case.setting.loss == "chunked"
    refused = any("loss=chunked" in spec for spec, why in case.failed.items() if not why.startswith("out of memory"))
    return case.possible.chunked and not chunked and not refused and case.setting.sequence is not None


def _chunked_pair(case: Case, own: Candidate) -> tuple[Candidate, Candidate] | None:
    """A method with full logits, the chosen one if possible, and the same with the chunked loss and a lower peak."""
    for full in (own, *case.known):
        spec = full.method.spec
        chunked = case.find(f"{spec}{',' if ':' in spec else ':'}loss=chunked")
        if chunked is not None and chunked.peak_bytes < full.peak_bytes:
            return full, chunked
    return None


def _keep_last(case: Case, chosen: Candidate, room: int) -> Iterator[str]:
    """Room that is left buys blocks that are not computed twice."""
    plain = case.find("plain")
    left = int(COMFORT * room) - chosen.peak_bytes
    if not chosen.method.reversible or "keep_last=" in chosen.method.spec or plain is None or not plain.block_bytes:
        return
    # A stored block of a larger batch takes so much more.
    one = max(plain.block_bytes) * chosen.batch // plain.batch
    count = min(left // one, case.blocks - 1) if one else 0
    if count > 0:
        yield (
            f"{case.size(left)} are left at this size: with keep_last={count} the last {plural(count, 'block')} of "
            f"{case.blocks} keep {case.size(one)} each and are not computed twice"
        )


def _what_binds(case: Case, own: Candidate) -> Iterator[str]:
    total = sum(own.categories.values())
    if not total:
        return
    name = max(own.categories, key=lambda c: own.categories[c])
    category, count = Category(name), own.categories[name]
    yield (
        f"what binds: the peak of {own.title} stands in {own.phase}, and {count / total:.0%} of it "
        f"({case.size(count)}) is {CATEGORY_TITLES[category]}: {move(case, own, category, _can_chunk(case, own))}"
    )


# -- what the choice rests on


def _rival(case: Case, own: Candidate) -> str:
    """How checkpointing compares; where it was chosen, how the best reversible method does."""
    if own.method.name == "checkpoint":
        reversible = [c for c in case.known if c.method.reversible and c.method.preserves_function]
        if not reversible:
            return "no reversible method that keeps the function was measured beside checkpointing"
        return _compared(case, min(reversible, key=lambda c: c.peak_bytes), own)
    checkpoints = [c for c in case.known if c.method.name == "checkpoint"]
    rival = min(checkpoints, key=lambda c: c.method.loss != own.method.loss, default=None)
    if rival is not None:
        text = _compared(case, rival, own)
        if rival.method.loss != own.method.loss:
            text += f" (with {rival.method.loss} logits: measure checkpoint:loss={own.method.loss} for a fair match)"
        return text
    if "checkpoint" in case.failed:
        return f"the rival: checkpoint, {case.failed['checkpoint']}"
    return "checkpointing, the rival to beat, was not measured: add the method checkpoint before you decide"


def _compared(case: Case, rival: Candidate, own: Candidate) -> str:
    text = (
        f"the rival: {rival.title} peaks at {case.size(rival.peak_bytes)}, "
        f"{rival.peak_bytes / own.peak_bytes - 1:+.1%} against {own.title}'s {case.size(own.peak_bytes)}"
    )
    if rival.rate is None or own.rate is None:
        return f"{text}; not both were timed"
    spread = max(rival.spread, own.spread)
    text += f", at {rival.rate:,.4g} {case.units} a second to {own.rate:,.4g} ({rival.rate / own.rate - 1:+.1%}"
    # Either may be the faster one.
    within = max(rival.rate, own.rate) <= min(rival.rate, own.rate) * (1 + spread)
    return f"{text}, within the spread of {spread:.1%})" if within and spread else f"{text})"
