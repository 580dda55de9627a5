"""Why a step's memory peaks where it does, in sentences that follow from the record."""

from __future__ import annotations

from collections.abc import Iterator

from autorev.analysis import Category
from autorev.format import clean, format_bytes
from autorev.optimizers import Optimizer
from autorev.profiler.readings import Memory
from autorev.profiler.record import Profile, Result
from autorev.report.profile import view
from autorev.words import CATEGORY_TITLES

_LEAST_SHARE = 0.15
"""Of the peak: a category below it is not worth a sentence."""


def explained(profile: Profile) -> list[tuple[Result, Memory]]:
    """The results of which the peak is explained: plain, and the recommended or else the first reversible one."""
    best = view.chosen(profile)
    plain = view.by_method(profile, "plain")
    second = best if best and best.memory and best is not plain else view.after(profile)
    found = [each for each in (plain, second) if each is not None]
    return [(each, each.memory) for each in found if each.memory]


def explain(profile: Profile, result: Result, memory: Memory) -> list[str]:
    """Where the peak stands, what it consists of, how much lower it could get, and what would lower it."""
    name = view.labels(profile)[result.method.spec]
    sentences = [f"The peak of {name}, {format_bytes(memory.peak_bytes)}, stands in {clean(memory.phase)}."]
    shares = _shares(memory)
    if shares:
        parts = [f"{_title(name)} {100 * share:.0f} %" for name, share in shares[:3] if share >= 0.01]
        sentences.append(f"It is made of {', '.join(parts)}{' and less of others' if len(shares) > 3 else ''}.")
    sentences += _bound(memory)
    for category, share in shares[:2]:
        mover = _mover(profile, result, category)
        if share >= _LEAST_SHARE and mover:
            sentences.append(mover)
    return sentences


def _shares(memory: Memory) -> list[tuple[str, float]]:
    whole = sum(memory.categories.values())
    found = [(name, size / whole) for name, size in memory.categories.items() if size]
    return sorted(found, key=lambda part: -part[1])


def _title(category: str) -> str:
    return next((title for known, title in CATEGORY_TITLES.items() if known == category), clean(category))


def _bound(memory: Memory) -> list[str]:
    """How much is gained before another phase is the highest."""
    others = {name: peak for name, peak in memory.phase_peaks.items() if name != memory.phase}
    if not others or not memory.peak_bytes:
        return []
    name = max(others, key=lambda each: others[each])
    gap = memory.peak_bytes - others[name]
    share = 100 * gap / memory.peak_bytes
    much = f"{share:.0f} %" if share >= 1 else "less than 1 %"
    return [
        f"Lowering {clean(memory.phase)} alone gains at most {format_bytes(max(0, gap))} ({much}): "
        f"then {clean(name)} is the highest."
    ]


def _mover(profile: Profile, result: Result, category: str) -> str:
    """What lowers a category, of what this run has not done already; empty where nothing is left to say."""
    ways = list(_ways(profile, result, category))
    return f"What lowers {_title(category)}: {', or '.join(ways)}." if ways else ""


def _ways(profile: Profile, result: Result, category: str) -> Iterator[str]:
    setting, optimizer = profile.setting, Optimizer.parse(profile.setting.optimizer)
    if category in (Category.PARAMETERS, Category.OTHER):
        return
    if category in (Category.OPTIMIZER_STATE, Category.GRADIENTS):
        if setting.trains == "full":
            yield "training fewer weights, as LoRA does"
        if category == Category.OPTIMIZER_STATE and optimizer.momenta == 2 and not optimizer.is_8bit:
            yield "an optimizer that keeps less, such as 8-bit AdamW"
        return
    if category == Category.STORED_ACTIVATIONS and not result.method.reversible:
        yield "a method that keeps less between forward and backward"
    if category == Category.LOGITS_AND_LOSS and setting.sequence is not None and result.method.loss != "chunked":
        yield "the chunked loss"
    if category == Category.SIDE_BITS:
        yield f"a coupling that keeps fewer than {result.side_bits} bits per element"
    yield "a smaller batch"
    if setting.sequence is not None:
        yield "a shorter sequence"
