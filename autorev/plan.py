"""What to do about a model's memory, and why: a pure function of the predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autorev.analysis import Analysis, Category, Prediction, Reach, Recommendation, Setting
from autorev.report.format import format_bytes as size
from autorev.report.words import CATEGORY_TITLES

COMFORT = 0.9
"""Share of the device's memory up to which a step is said to fit without worry."""
WORTH = 0.05
"""Where checkpointing fits narrowly, a reversible chain has to beat its peak by this share to be worth a conversion."""
DOMINANT = 0.40
"""A category with this share of a peak is what the peak is about."""
LOGITS_WEIGH = 0.20
"""From this share of a peak on, logits are worth chunking."""
FIXED = (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
"""What neither the batch nor a way of storing activations changes."""

CHUNKED = "autorev.chunk_loss(model)"
HOW = "autorev.convert(model) does it in user code, and autorev.verify(model) checks the gradients"

_by_blocks = (Category.STORED_ACTIVATIONS, Category.STREAMS, Category.SIDE_BITS)


@dataclass(frozen=True, slots=True)
class Offer:
    """One thing that would lower a peak."""

    name: str
    """chunked, lora, 8-bit, fused or smaller batch."""
    bytes: int
    """What it is about; what it saves is at most that."""
    text: str


def recommend(analysis: Analysis, room: int) -> Recommendation:
    """The strategy for this setting on a device with `room` bytes to use, with its reason and further advice."""
    assert analysis.setting is not None and analysis.device is not None
    setting, device = analysis.setting, analysis.device
    plain = analysis.prediction("plain")
    assert plain is not None
    checkpoint = analysis.prediction("checkpoint") or plain
    reversible = analysis.prediction("momentum")
    offload = analysis.prediction("offload")
    advice = tuple(_advice(checkpoint, setting))

    if plain.peak_bytes <= COMFORT * room:
        why = (
            f"do not convert: plain training peaks at {size(plain.peak_bytes)} of {device.title}'s "
            f"{size(device.memory_bytes)}, and nothing is faster than keeping what fits"
        )
        return Recommendation("plain", why, (*_further(analysis, "plain"), *advice))

    enough = (
        f"checkpointing is enough: it peaks at {size(checkpoint.peak_bytes)} where plain training needs "
        f"{size(plain.peak_bytes)}, and {_why_no_more(checkpoint, reversible, analysis)}"
    )
    if checkpoint.peak_bytes <= COMFORT * room:
        return Recommendation("checkpoint", enough, (*_further(analysis, "checkpoint"), *advice))
    gain = 0.0 if reversible is None else 1 - reversible.peak_bytes / checkpoint.peak_bytes
    if reversible is not None and reversible.peak_bytes <= room and (gain >= WORTH or checkpoint.peak_bytes > room):
        fits = "fits narrowly:" if checkpoint.peak_bytes <= room else "does not fit:"
        why = (
            "convert with the momentum coupling (exact, gamma = 1/8): the peak falls to "
            f"{size(reversible.peak_bytes)}, where plain training needs {size(plain.peak_bytes)}; checkpointing {fits} "
            f"it needs {size(checkpoint.peak_bytes)}, of which {size(_share_of_blocks(checkpoint))} are one stored "
            "input per block"
        )
        return Recommendation("momentum", why, (*advice, HOW))
    if checkpoint.peak_bytes <= room:
        return Recommendation("checkpoint", enough, advice)
    if offload is not None and offload.peak_bytes <= room:
        why = (
            f"checkpoint and keep the blocks' inputs in host memory: {size(offload.peak_bytes)} fit, where "
            f"checkpointing on the device alone needs {size(checkpoint.peak_bytes)}"
        )
        return Recommendation("offload", why, advice)
    best = min((p for p in analysis.predictions if p.preserves_function), key=lambda p: p.peak_bytes)
    why = (
        f"nothing fits {device.title}: even {best.strategy} needs {size(best.peak_bytes)} of {size(room)} usable; "
        + what_dominates(best.categories, best.peak_bytes, setting)
    )
    return Recommendation(best.strategy, why, advice or ("use a larger device, a smaller batch or fewer tokens",))


def _why_no_more(checkpoint: Prediction, reversible: Prediction | None, analysis: Analysis) -> str:
    if reversible is None:
        if analysis.chains:
            return "no chain is long enough to reverse"
        return "no block of this model can be made reversible (see the refusals)"
    saved = checkpoint.peak_bytes - reversible.peak_bytes
    if saved <= 0:
        text = "reversing the chain would save nothing beyond it"
    else:
        text = f"reversing the chain would save {size(saved)} more, which nothing here needs"
        if saved < 0.1 * checkpoint.peak_bytes:
            text = f"reversing the chain would save only {size(saved)} more"
    dominant = _dominant(checkpoint)
    if dominant is not None and dominant not in _by_blocks and saved < 0.1 * checkpoint.peak_bytes:
        share = checkpoint.categories[dominant] / checkpoint.peak_bytes
        text += f", because {share:.0%} of the peak is {CATEGORY_TITLES[dominant]}"
    return text


def what_dominates(categories: Mapping[str, int], peak_bytes: int, setting: Setting) -> str:
    """Why a peak of these categories does not fit, as the end of a sentence."""
    fixed = sum(categories.get(c, 0) for c in FIXED)
    if fixed >= DOMINANT * peak_bytes:
        return (
            f"weights, gradients and optimiser state alone take {size(fixed)}, and no way of storing activations can "
            "help that"
        )
    logits = categories.get(Category.LOGITS_AND_LOSS, 0)
    if logits >= DOMINANT * peak_bytes:
        text = f"your logits dominate with {size(logits)}"
        return f"{text}: use the chunked loss" if setting.loss == "full" else text
    return "what a single block holds while it is computed is already too much"


def _advice(checkpoint: Prediction, setting: Setting) -> Iterator[str]:
    """What would lower the checkpointed peak further, most effective first."""
    found = offers(checkpoint.categories, checkpoint.peak_bytes, checkpoint.phase, setting, "checkpointing's peak")
    yield from (offer.text for offer in sorted(found, key=lambda offer: -offer.bytes))


def offers(
    categories: Mapping[str, int], peak_bytes: int, phase: str, setting: Setting, whose: str, measured: bool = False
) -> list[Offer]:
    """What would lower a peak of these categories that stands in `phase`.

    Args:
        categories: bytes by `Category`.
        whose: what the peak is called in the advice, such as `checkpointing's peak`.
        measured: name what does it in training, not the option that predicts it.
    """
    found: list[Offer] = []
    held = {category: categories.get(category, 0) for category in Category}
    logits = held[Category.LOGITS_AND_LOSS]
    if setting.loss == "full" and setting.sequence is not None and logits >= LOGITS_WEIGH * peak_bytes:
        how = CHUNKED if measured else "--loss chunked"
        text = f"your logits take {size(logits)} of {whose}: use the chunked loss ({how})"
        found.append(Offer("chunked", logits, text))
    fixed = sum(held[c] for c in FIXED)
    if setting.trains == "full" and (fixed >= DOMINANT * peak_bytes or phase == "optimizer"):
        saved = held[Category.GRADIENTS] + held[Category.OPTIMIZER_STATE]
        text = (
            f"weights, gradients and optimiser state take {size(fixed)} of {whose}, which reversibility "
            f"cannot lower: LoRA (--trains lora) frees most of {size(saved)}"
        )
        found.append(Offer("lora", saved, text))
        if setting.optimizer == "adamw":
            saved = held[Category.OPTIMIZER_STATE] * 3 // 4
            how = "" if measured else " (--optimizer adamw-8bit)"
            text = f"an 8-bit optimiser{how} frees up to {size(saved)}"
            found.append(Offer("8-bit", saved, text))
    if phase == "optimizer":
        text = "the peak stands in the optimiser step: a fused optimiser, or one that steps during backward, lowers it"
        found.append(Offer("fused", held[Category.OTHER], text))
    working = held[Category.WORKING_SET]
    if working >= DOMINANT * peak_bytes:
        text = (
            f"one block's working set takes {size(working)}, whatever is done between the blocks: a smaller batch with "
            "gradient accumulation lowers it"
        )
        found.append(Offer("smaller batch", working, text))
    return found


def _further(analysis: Analysis, strategy: str) -> Iterator[str]:
    """How much further another way of training would get, when `strategy` is enough for now."""
    reaches = {reach.strategy: reach for reach in analysis.frontier}
    mine = reaches[strategy]
    others = [reaches[name] for name in ("checkpoint", "momentum") if name in reaches and name != strategy]
    for axis in ("largest_batch", "longest_sequence"):
        now = getattr(mine, axis)
        best: Reach | None = max(others, key=lambda r: getattr(r, axis) or 0, default=None)
        most = getattr(best, axis) if best is not None else None
        if best is not None and now and most and most > now:
            what = f"a batch of {most:,}" if axis == "largest_batch" else f"{most:,} tokens"
            yield f"should you want more: {best.strategy} fits {what} instead of {now:,}"


def _dominant(prediction: Prediction) -> Category | None:
    name = max(prediction.categories, key=lambda c: prediction.categories[c])
    return Category(name) if prediction.categories[name] >= 0.25 * prediction.peak_bytes else None


def _share_of_blocks(prediction: Prediction) -> int:
    return sum(prediction.categories[c] for c in _by_blocks)
