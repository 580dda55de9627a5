"""What else would help, in numbers: the lines below a recommendation that rests on measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autorev.analysis import Category
from autorev.format import format_bytes as size
from autorev.format import plural
from autorev.methods import coupling_options
from autorev.offers import CHUNKED, Possible, offers, smaller_step
from autorev.plan import COMFORT, how
from autorev.profiler.advice.candidates import Candidate, same_loss, with_chunks
from autorev.profiler.record import Profile, Result, Status
from autorev.words import CATEGORY_TITLES


def further(
    profile: Profile, own: Candidate, chosen: Candidate, known: Sequence[Candidate], room: int | None
) -> Iterator[str]:
    """Advice for the chosen method, most effective first, then what the choice rests on.

    Args:
        own: the chosen method at the setting's size, where its memory is known by category.
        chosen: the same at the recommended size.
        known: every method at the setting's size.
        room: bytes to use, if there is a limit.
    """
    yield from (text for _, text in sorted(_savings(profile, own, known), key=lambda saving: -saving[0]))
    if room is not None and profile.budget_bytes is not None:  # who asked for the least memory wants to fill none
        yield from _keep_last(profile, chosen, known, room)
    yield from _what_binds(profile, own)
    rival = _rival(profile, own, known)
    yield rival if chosen.batch == own.batch else f"{rival}; all that at a batch of {own.batch:,}"
    yield from _doubts(profile)
    if chosen.method.reversible and (room is None or chosen.peak_bytes <= room):
        yield how(coupling_options(chosen.method), chosen.method.loss)


def _savings(profile: Profile, own: Candidate, known: Sequence[Candidate]) -> Iterator[tuple[int, str]]:
    measured = None if own.method.loss == "chunked" else _chunked_pair(own, known)
    if measured is not None:
        full, chunked = measured
        saved = full.peak_bytes - chunked.peak_bytes
        text = (
            f"the chunked loss lowers the peak of {full.title} from {size(full.peak_bytes)} to "
            f"{size(chunked.peak_bytes)}"
        )
        if full.rate and chunked.rate:
            text += f", at {full.rate / chunked.rate - 1:+.1%} in time"
        yield saved, f"{text} ({CHUNKED})"
    total = sum(own.categories.values())
    setting = profile.setting
    if not total:
        return
    # A measured saving says more than the size of the logits, and a chunked method has had it.
    chunked_already = measured is not None or own.method.loss == "chunked"
    possible = Possible(chunked=not chunked_already and _can_chunk(profile), lora=profile.pretrained)
    whose = f"the peak of {own.title}"
    for offer in offers(own.categories, total, own.phase, setting, whose, possible, measured=True):
        yield offer.bytes, offer.text


def _can_chunk(profile: Profile) -> bool:
    """Was it not refused?"""
    refused = (Status.REFUSED, Status.FAILED)
    return not any(result.method.loss == "chunked" and result.status in refused for result in profile.results)


def _chunked_pair(own: Candidate, known: Sequence[Candidate]) -> tuple[Candidate, Candidate] | None:
    """A method with full logits, the chosen one if possible, and the same with the chunked loss and a lower peak."""
    by_spec = {c.method.spec: c for c in known}
    for full in (own, *known):
        chunked = by_spec.get(with_chunks(full.method.spec))
        if chunked is not None and chunked.peak_bytes < full.peak_bytes:
            return full, chunked
    return None


def _keep_last(profile: Profile, chosen: Candidate, known: Sequence[Candidate], room: int) -> Iterator[str]:
    """Room that is left buys blocks that are not computed twice."""
    plain = next((c for c in known if c.method.spec == "plain"), None)
    left = int(COMFORT * room) - chosen.peak_bytes
    if not chosen.method.reversible or "keep_last=" in chosen.method.spec or plain is None or not plain.block_bytes:
        return
    # A stored block of a larger batch takes so much more.
    one = max(plain.block_bytes) * chosen.batch // plain.batch
    count = min(left // one, profile.blocks - 1) if one else 0
    if count > 0:
        yield (
            f"{size(left)} are left at this size: with keep_last={count} the last {plural(count, 'block')} of "
            f"{profile.blocks} keep {size(one)} each and are not computed twice"
        )


def _what_binds(profile: Profile, own: Candidate) -> Iterator[str]:
    total = sum(own.categories.values())
    if not total:
        return
    name = max(own.categories, key=lambda c: own.categories[c])
    category, count = Category(name), own.categories[name]
    yield (
        f"what binds: the peak of {own.title} stands in {own.phase}, and {count / total:.0%} of it "
        f"({size(count)}) is {CATEGORY_TITLES[category]}: {_move(profile, own, category)}"
    )


def _move(profile: Profile, own: Candidate, category: Category) -> str:
    """What would lower the category that binds."""
    setting = profile.setting
    lora = setting.trains == "full" and profile.pretrained
    small = setting.optimizer == "adamw-8bit"
    smaller = smaller_step(setting) or "only a smaller model lowers it"
    if category is Category.PARAMETERS:
        return (
            "a 16-bit dtype (--dtype bf16) halves it" if setting.dtype == "fp32" else "only a smaller model lowers it"
        )
    if category is Category.GRADIENTS:
        return f"{'LoRA (--trains lora), or ' if lora else ''}an optimiser that steps during backward, frees it"
    if category is Category.OPTIMIZER_STATE:
        if small:
            return "LoRA (--trains lora) frees most of it" if lora else "SGD (--optimizer sgd) keeps none"
        return f"{'LoRA (--trains lora) or ' if lora else ''}an 8-bit optimiser frees most of it"
    full = own.method.loss == "full" and setting.sequence is not None
    if category is Category.LOGITS_AND_LOSS and full and _can_chunk(profile):
        return f"the chunked loss ({CHUNKED}) lowers it"
    if category is Category.STORED_ACTIVATIONS and own.method.name == "plain":
        return "checkpointing or a reversible chain stores less"
    if category is Category.SIDE_BITS:
        return f"a larger gamma (a smaller k) keeps fewer bits, if the model bears it; {smaller}"
    if category is Category.OTHER and own.phase == "optimizer" and setting.optimizer == "adamw":
        return "a fused optimiser, or one that steps during backward, lowers it"
    return smaller


def _rival(profile: Profile, own: Candidate, known: Sequence[Candidate]) -> str:
    """How checkpointing compares; where it was chosen, how the best reversible method does."""
    if own.method.name == "checkpoint":
        reversible = [c for c in known if c.method.reversible and c.method.preserves_function]
        if not reversible:
            return "no reversible method that keeps the function was measured beside checkpointing"
        return _compared(profile, min(reversible, key=lambda c: c.peak_bytes), own)
    rival = same_loss(known, "checkpoint", own.method.loss)
    if rival is not None:
        text = _compared(profile, rival, own)
        if rival.method.loss != own.method.loss:
            text += f" (with {rival.method.loss} logits: measure checkpoint:loss={own.method.loss} for a fair match)"
        return text
    result = profile.result("checkpoint")
    if result is not None and result.status in (Status.OUT_OF_MEMORY, Status.REFUSED, Status.FAILED):
        return f"the rival: checkpoint, {result.status.value}: {result.reason}"
    return "checkpointing, the rival to beat, was not measured: add the method checkpoint before you decide"


def _compared(profile: Profile, rival: Candidate, own: Candidate) -> str:
    text = (
        f"the rival: {rival.title} peaks at {size(rival.peak_bytes)}, "
        f"{rival.peak_bytes / own.peak_bytes - 1:+.1%} against {own.title}'s {size(own.peak_bytes)}"
    )
    if rival.rate is None or own.rate is None:
        return f"{text}; not both were timed"
    difference = rival.rate / own.rate - 1
    spread = max(rival.spread, own.spread)
    text += f", at {rival.rate:,.4g} {profile.units} a second to {own.rate:,.4g} ({difference:+.1%}"
    # Either may be the faster one.
    within = max(rival.rate, own.rate) <= min(rival.rate, own.rate) * (1 + spread)
    return f"{text}, within the spread of {spread:.1%})" if within and spread else f"{text})"


def _doubts(profile: Profile) -> Iterator[str]:
    doubtful = [result for result in profile.results if result.samples and result.in_doubt]
    if not doubtful:
        return
    told = ", ".join(_doubt(result) for result in doubtful)
    yield f"times are in doubt for {told}: measure more rounds on a machine that does nothing else"


def _doubt(result: Result) -> str:
    if result.spread is None:
        return f"{result.method.title} ({plural(len(result.samples), 'sample')} only)"
    return f"{result.method.title} (quartiles {result.spread:.0%} apart)"
