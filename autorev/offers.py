"""What would lower a peak: a pure function of what is alive at it and of how the model trains already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from autorev.analysis import Category, Setting
from autorev.format import format_bytes
from autorev.words import CATEGORY_TITLES

DOMINANT = 0.40
"""A category with this share of a peak is what the peak is about."""
LOGITS_WEIGH = 0.20
"""From this share of a peak on, logits are worth chunking."""
FIXED = (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
"""What neither the batch nor a way of storing activations changes."""
CHUNKED = "autorev.chunk_loss(model)"

Size = Callable[[int], str]
"""Bytes in words."""
Held = Mapping[Category, int]


@dataclass(frozen=True, slots=True)
class Offer:
    """One thing that would lower a peak."""

    name: str
    """chunked, lora, 8-bit, optimizer or smaller."""
    bytes: int
    """What it is about; what it saves is at most that."""
    text: str


@dataclass(frozen=True, slots=True)
class Possible:
    """What can be done with a model, whatever its memory."""

    chunked: bool = True
    """Has it a vocabulary head, whose loss can be computed in chunks?"""
    lora: bool = True
    """Has it weights worth keeping, and linear layers inside its blocks?"""
    command: str = ""
    """What trains it, or measures it, as converted; `{spec}` stands for the coupling. Empty: no command does."""


def what_dominates(categories: Mapping[str, int], peak_bytes: int, size: Size = format_bytes) -> str:
    """Why a peak of these categories does not fit, as the end of a sentence."""
    held = _held(categories)
    if sum(held[c] for c in FIXED) >= DOMINANT * peak_bytes:
        return f"{_fixed(held, size)} are there whatever is done with the activations"
    if held[Category.LOGITS_AND_LOSS] >= DOMINANT * peak_bytes:
        return f"your logits dominate with {size(held[Category.LOGITS_AND_LOSS])}"
    name = max(held, key=lambda category: held[category])
    if name is Category.WORKING_SET:
        return f"what a single block holds while it is computed takes {size(held[name])} of that"
    return f"{size(held[name])} of that are {CATEGORY_TITLES[name]}"


def offers(
    categories: Mapping[str, int],
    peak_bytes: int,
    phase: str,
    setting: Setting,
    whose: str,
    possible: Possible,
    size: Size = format_bytes,
    measured: bool = False,
) -> list[Offer]:
    """What would lower a peak of these categories that stands in `phase`, most effective first.

    Args:
        categories: bytes by `Category`.
        peak_bytes: their sum.
        phase: forward, backward or optimizer.
        setting: nothing is offered that it has already.
        whose: what the peak is called in the advice, such as `checkpointing's peak`.
        possible: nothing is offered that cannot be had.
        size: bytes in words.
        measured: name what does it in training, not the option that predicts it.
    """
    held = _held(categories)
    found: list[Offer] = []
    logits = held[Category.LOGITS_AND_LOSS]
    can_chunk = possible.chunked and setting.loss == "full" and setting.sequence is not None
    if can_chunk and logits and logits >= LOGITS_WEIGH * peak_bytes:
        how = CHUNKED if measured else "--loss chunked"
        text = f"your logits take {size(logits)} of {whose}: use the chunked loss ({how})"
        found.append(Offer("chunked", logits, text))
    fixed = sum(held[c] for c in FIXED)
    if setting.trains == "full" and (fixed >= DOMINANT * peak_bytes or phase == "optimizer"):
        found += _of_weights(held, setting, whose, possible, size, measured)
    if phase == "optimizer":
        found += _in_the_update(held, setting)
    working = held[Category.WORKING_SET]
    less = smaller_step(setting)
    if less and working and working >= DOMINANT * peak_bytes:
        text = f"one block's working set takes {size(working)}, whatever is done between the blocks: {less}"
        found.append(Offer("smaller", working, text))
    return sorted(found, key=lambda offer: -offer.bytes)


def smaller_step(setting: Setting) -> str:
    """How a step can be made smaller; empty where it holds one token of one sample."""
    if setting.batch > 1:
        return "a smaller batch with gradient accumulation lowers it"
    return "fewer tokens a sample lower it" if (setting.sequence or 0) > 1 else ""


def _of_weights(
    held: Held, setting: Setting, whose: str, possible: Possible, size: Size, measured: bool
) -> Iterator[Offer]:
    gradients, state = held[Category.GRADIENTS], held[Category.OPTIMIZER_STATE]
    if possible.lora and (gradients or state):
        what = _named({"gradients": gradients, "optimiser state": state}, size)
        text = (
            f"{_fixed(held, size)} are part of {whose}, which reversibility cannot lower: LoRA (--trains lora) frees "
            f"most of {what}"
        )
        yield Offer("lora", gradients + state, text)
    if setting.optimizer == "adamw" and state:
        # Two moments in the weights' dtype become one byte each.
        share, freed = ("three quarters", 3 * state // 4) if setting.dtype == "fp32" else ("half", state // 2)
        how = "" if measured else " (--optimizer adamw-8bit)"
        yield Offer("8-bit", freed, f"an 8-bit optimiser{how} frees {share} of {size(state)} of optimiser state")


def _in_the_update(held: Held, setting: Setting) -> Iterator[Offer]:
    ways = ["a fused optimiser"] if setting.optimizer == "adamw" and held[Category.OTHER] else []
    ways += ["one that steps during backward" if ways else "an optimiser that steps during backward"] * (
        held[Category.GRADIENTS] > 0
    )
    if ways:
        text = f"the peak stands in the optimiser step: {', or '.join(ways)}, lowers it"
        yield Offer("optimizer", held[Category.OTHER], text)


def _held(categories: Mapping[str, int]) -> dict[Category, int]:
    return {category: categories.get(category, 0) for category in Category}


def _fixed(held: Held, size: Size) -> str:
    """`15.0 GiB of weights, 15.0 GiB of gradients and 30.0 GiB of optimiser state`."""
    named = {
        "weights": held[Category.PARAMETERS],
        "gradients": held[Category.GRADIENTS],
        "optimiser state": held[Category.OPTIMIZER_STATE],
    }
    return _named(named, size)


def _named(counts: Mapping[str, int], size: Size) -> str:
    parts = [f"{size(count)} of {name}" for name, count in counts.items() if count]
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
