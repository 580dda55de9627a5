"""What would lower a peak: a function of what is alive at it and of how the model trains already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from autorev.advice.case import FIXED, Candidate, Case
from autorev.analysis import Category
from autorev.format import format_bytes
from autorev.optimizers import Optimizer
from autorev.setting import Setting
from autorev.words import CATEGORY_TITLES

DOMINANT = 0.40
"""A category with this share of a peak is what the peak is about."""
LOGITS_WEIGH = 0.20
"""From this share of a peak on, logits are worth chunking."""
CHUNKED = "autorev.chunk_loss(model)"

Size = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Saving:
    """One thing that would lower a peak."""

    name: str
    """chunked, lora, 8-bit, optimizer or smaller."""
    bytes: int
    """What it is about; what it saves is at most that."""
    text: str


def what_dominates(categories: Mapping[str, int], peak_bytes: int, size: Size = format_bytes) -> str:
    """Why a peak of these categories does not fit, as the end of a sentence."""
    held = {category: categories.get(category, 0) for category in Category}
    if sum(held[c] for c in FIXED) >= DOMINANT * peak_bytes:
        return f"{_named(held, size)} are there whatever is done with the activations"
    if held[Category.LOGITS_AND_LOSS] >= DOMINANT * peak_bytes:
        return f"your logits dominate with {size(held[Category.LOGITS_AND_LOSS])}"
    name = max(held, key=lambda category: held[category])
    if name is Category.WORKING_SET:
        return f"what a single block holds while it is computed takes {size(held[name])} of that"
    return f"{size(held[name])} of that are {CATEGORY_TITLES[name]}"


def savings(case: Case, own: Candidate, can_chunk: bool) -> list[Saving]:
    """What would lower the peak of `own`, most effective first. Nothing is offered that is there, or cannot be."""
    return sorted(_savings(case, own, can_chunk), key=lambda saving: -saving.bytes)


def _savings(case: Case, own: Candidate, can_chunk: bool) -> Iterator[Saving]:
    setting, size, total = case.setting, case.size, sum(own.categories.values())
    optimizer = Optimizer.parse(setting.optimizer)
    if not total:
        return
    # A measurement names what does it in training, a prediction the option that predicts it.
    logits = own.held(Category.LOGITS_AND_LOSS)
    if can_chunk and logits >= LOGITS_WEIGH * total:
        how = CHUNKED if case.measured else "--loss chunked"
        text = f"your logits take {size(logits)} of the peak of {own.title}: use the chunked loss ({how})"
        yield Saving("chunked", logits, text)
    gradients, state = own.held(Category.GRADIENTS), own.held(Category.OPTIMIZER_STATE)
    updating = own.phase == "optimizer"
    if setting.trains == "full" and (own.held(*FIXED) >= DOMINANT * total or updating):
        if case.possible.lora and (gradients or state):
            freed = {Category.GRADIENTS: gradients, Category.OPTIMIZER_STATE: state}
            text = (
                f"{_named({c: own.held(c) for c in FIXED}, size)} are part of the peak of {own.title}, which "
                f"reversibility cannot lower: LoRA (--trains lora) frees most of {_named(freed, size)}"
            )
            yield Saving("lora", gradients + state, text)
        if optimizer.momenta == 2 and not optimizer.is_8bit and state:
            # Two moments in the weights' dtype become one byte each.
            share, bytes_ = ("three quarters", 3 * state // 4) if setting.dtype == "fp32" else ("half", state // 2)
            how = "" if case.measured else " (`analyze --optimizer adamw-8bit` predicts it)"
            text = f"an 8-bit optimiser{how} frees {share} of {size(state)} of optimiser state"
            yield Saving("8-bit", bytes_, text)
    if updating:
        fused = "a fused optimiser" + ("" if case.measured else " (--optimizer adamw-fused)")
        ways = [fused] if optimizer.name == "adamw" and own.held(Category.OTHER) else []
        if gradients:
            how = "" if case.measured else " (its name with `:step=backward`)"
            ways.append(f"{'one' if ways else 'an optimiser'} that steps during backward{how}")
        if ways:
            text = f"the peak stands in the optimiser step: {', or '.join(ways)}, lowers it"
            yield Saving("optimizer", own.held(Category.OTHER), text)
    working, less = own.held(Category.WORKING_SET), _smaller_block(case, own) or smaller_step(setting)
    if less and working >= DOMINANT * total:
        text = f"one block's working set takes {size(working)}, whatever is done between the blocks: {less}"
        yield Saving("smaller", working, text)


def smaller_step(setting: Setting) -> str:
    """How a step can be made smaller; empty where it holds one token of one sample."""
    if setting.batch > 1:
        return "a smaller batch with gradient accumulation lowers it"
    return "fewer tokens a sample lower it" if (setting.sequence or 0) > 1 else ""


def _smaller_block(case: Case, own: Candidate) -> str:
    """How one block's working set can be made smaller."""
    tiled = own.method.tile is None and any(other.method.tile is not None for other in case.known)
    return "tiles (tile='auto') lower it" if tiled else ""


def move(case: Case, own: Candidate, category: Category, can_chunk: bool) -> str:
    """What would lower the category that binds."""
    setting, optimizer = case.setting, Optimizer.parse(case.setting.optimizer)
    lora = setting.trains == "full" and case.possible.lora
    smaller = smaller_step(setting) or "only a smaller model lowers it"
    if category is Category.PARAMETERS:
        bf16 = setting.dtype == "fp32"
        return "a 16-bit dtype (--dtype bf16) halves it" if bf16 else "only a smaller model lowers it"
    if category is Category.GRADIENTS:
        ways = ["LoRA (--trains lora)"] * lora
        ways += ["an optimiser that steps during backward"] * (not optimizer.frees_gradients)
        return f"{', or '.join(ways)}, frees it" if ways else smaller
    if category is Category.OPTIMIZER_STATE:
        if optimizer.is_8bit:
            return "LoRA (--trains lora) frees most of it" if lora else "SGD (--optimizer sgd) keeps none"
        return f"{'LoRA (--trains lora) or ' if lora else ''}an 8-bit optimiser frees most of it"
    if category is Category.LOGITS_AND_LOSS and can_chunk:
        return f"the chunked loss ({CHUNKED if case.measured else '--loss chunked'}) lowers it"
    if category is Category.STORED_ACTIVATIONS and own.method.name == "plain":
        return "checkpointing or a reversible chain stores less"
    if category is Category.WORKING_SET:
        return _smaller_block(case, own) or smaller
    if category is Category.SIDE_BITS:
        return f"a larger gamma (a smaller k) keeps fewer bits, if the model bears it; {smaller}"
    if category is Category.OTHER and own.phase == "optimizer" and optimizer.name == "adamw":
        return "a fused optimiser, or one that steps during backward, lowers it"
    return smaller


def _named(held: Mapping[Category, int], size: Size) -> str:
    """`15.0 GiB of weights, 15.0 GiB of gradients and 30.0 GiB of optimiser state`."""
    titles = ("weights", "gradients", "optimiser state")
    parts = [f"{size(held[c])} of {title}" for c, title in zip(FIXED, titles, strict=True) if held.get(c)]
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
