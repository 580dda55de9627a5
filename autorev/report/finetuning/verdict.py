"""What became of a run, in words with their numbers, and what to do with the model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import isfinite, log

from autorev.finetuning.change import Change, change
from autorev.finetuning.record import EXPORT_LIMIT, Evaluation, FineTuning
from autorev.format import format_error, format_integer, plural
from autorev.report.finetuning import view
from autorev.report.finetuning.numbers import change_text, loss_text, perplexity_text
from autorev.words import method_title

_FROM_RANDOM = (
    "It began from random weights, which is no model to fall back on: do not ship it before its loss is that of a "
    "trained one."
)
_NOTICED = 0.05
"""Nats by which the conversion alone must raise the loss before it is worth a sentence."""
_LARGEST_VOCABULARY = 1_000_000
"""Of a record that does not say how large it is."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A heading, and the sentences below it."""

    title: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """The sentences as one paragraph."""
        return " ".join(self.sentences)


def verdict(run: FineTuning) -> Verdict:
    """Is it done, how good is it, and in which form is it to be shipped?"""
    if not run.complete:
        return _unfinished(run)
    if run.final is None:
        return Verdict("Trained, and not evaluated", ("The record holds no validation loss.",))
    return Verdict(_title(run), tuple(s for s in (_losses(run), _compared(run), _conversion(run), _advice(run)) if s))


def export_gap(run: FineTuning) -> float | None:
    """How much higher the loss is in the plain architecture; None where it was not evaluated, or is plain."""
    return view.difference(run.vanilla, run.final) if run.method.reversible else None


def may_export(run: FineTuning) -> bool:
    """Is the plain architecture as good, by what `autorev export` asks?"""
    gap = export_gap(run)
    return not run.method.reversible or (gap is not None and gap <= EXPORT_LIMIT)


def drift_words(run: FineTuning) -> str:
    """Whether the backward passes rebuilt what the forward passes computed."""
    found = [row.drift for row in run.logged if row.drift is not None]
    if not found:
        return "Nothing was rebuilt: activations were kept or computed again." if run.logged else ""
    worst = max(found)
    if worst == 0:
        return f"Reconstruction drift 0: rebuilt bit for bit in all {plural(len(found), 'step')}."
    return f"Reconstruction drift up to {format_error(worst)} in {plural(len(found), 'step')}."


def memory_words(run: FineTuning) -> str:
    """In how many steps the peak was looked at."""
    count = len(view.with_peak(run))
    return (
        f"The peak was looked at in {plural(count, 'step')} of {format_integer(view.steps_done(run))}." if count else ""
    )


def _unfinished(run: FineTuning) -> Verdict:
    steps, now = view.steps_done(run), view.latest(run)
    where = f"It ended after {format_integer(steps)} of {plural(run.recipe.steps, 'step')}"
    if now is None:
        return Verdict(
            "This run is not complete", (f"{where}, without a validation loss.", "`--resume` goes on with it.")
        )
    start = run.evaluations[0]
    words = f"validation loss {loss_text(start.loss)}"
    if now.step:
        words += f" before training and {loss_text(now.loss)} after step {format_integer(now.step)}"
    return Verdict("This run is not complete", (f"{where}: {words}.", "`--resume` goes on with it."))


def _title(run: FineTuning) -> str:
    found = outcome(run)
    if found is Outcome.BROKEN:
        return "Do not ship it: its loss is no number"
    if not run.pretrained:
        return "Trained from random weights"
    if found is not Outcome.BETTER:
        return str(found.value)
    if not run.method.reversible:
        return "The plain architecture, trained"
    return "Ship it as the plain architecture" if may_export(run) else "Ship it reversible"


class Outcome(Enum):
    """What became of the model, in the form that it would be shipped in."""

    BROKEN = "Its loss is no number"
    GUESSING = "Do not ship it: it hardly does better than guessing"
    WORSE = "Worse than the original model"
    UNCLEAR = "Not distinguishable from the original yet"
    BETTER = "Better than the original model"


def outcome(run: FineTuning) -> Outcome:
    """Of a run that is complete and evaluated."""
    shipped, by = _shipped(run), change_of(run)
    if not isfinite(shipped.loss):
        return Outcome.BROKEN
    if shipped.loss > log(run.vocabulary or _LARGEST_VOCABULARY) - 1:
        return Outcome.GUESSING
    if by is None or not (by.better or by.worse):
        return Outcome.UNCLEAR
    return Outcome.BETTER if by.better else Outcome.WORSE


def change_of(run: FineTuning) -> Change | None:
    """From the original model to this one in the form that it would be shipped in; None: there is no original."""
    return change(_shipped(run), run.original) if run.original else None


def _shipped(run: FineTuning) -> Evaluation:
    """The plain architecture where it is as good as the coupled one."""
    found = run.vanilla if run.method.reversible and may_export(run) else run.final
    assert found is not None
    return found


def _losses(run: FineTuning) -> str:
    final = run.final
    assert final is not None
    start = run.original or run.zero_shot
    came = f" from {loss_text(start.loss)}" if start else ""
    steps = plural(run.recipe.steps, "step")
    how = f"under {view.how_words(run)}" if run.method.reversible else f"with {method_title(run.method.name)}"
    text = f"Validation loss{came} to {loss_text(final.loss)} in {steps} {how}"
    return f"{text}."


def _compared(run: FineTuning) -> str:
    """Better or worse than the original, by how much, and how surely."""
    found = outcome(run)
    if found is Outcome.BROKEN:
        return "Its weights are broken: lower the learning rate, or go back to an earlier checkpoint."
    if found is Outcome.GUESSING:
        perplexity = perplexity_text(_shipped(run).perplexity)
        tokens = f"one of {format_integer(run.vocabulary)} tokens" if run.vocabulary else "a token"
        return f"A perplexity of {perplexity} is hardly better than guessing {tokens}."
    by = change_of(run)
    if by is None or not run.pretrained:
        return ""
    form = " as the plain architecture" if run.method.reversible and may_export(run) else ""
    words = f"{abs(by.by):.3f}" if by.error is None else f"{abs(by.by):.3f} +- {by.error:.3f}"
    how = "not paired: the record has no losses of single sequences, which tell more"
    if by.sequences:
        how = f"paired over {plural(by.sequences, 'sequence')}"
    known = "of which no standard error is known" if by.error is None else f"standard error, {how}"
    if found is Outcome.UNCLEAR:
        way = "lower" if by.by < 0 else "higher"
        return (
            f"It is not distinguishable from the original{form}: {words} {way} ({known}). Train it longer, or hold out "
            "more text (`--validation-rows`)."
        )
    return f"It is {'better' if by.better else 'worse'} than the original{form} by {words} ({known})."


def _conversion(run: FineTuning) -> str:
    """What happened before any training, where that is much, and to the side bits."""
    raised, ends, parts = view.difference(run.zero_shot, run.original), view.side_bits_ends(run), []
    if run.pretrained and raised is not None and raised > _NOTICED and run.zero_shot:
        perplexity = perplexity_text(run.zero_shot.perplexity)
        loss = loss_text(run.zero_shot.loss)
        parts.append(f"The conversion alone had raised it to {loss} (perplexity {perplexity}).")
    if ends and ends[0] > 0 and ends[1] == 0:
        parts.append("At the end it needs no side bits.")
    return " ".join(parts)


def _advice(run: FineTuning) -> str:
    """The form to ship it in, with the loss in the plain architecture; of random weights, that there is none."""
    if not run.pretrained:
        return f"{_plain_loss(run)}{_FROM_RANDOM}"
    if not run.method.reversible:
        return "There is nothing to export: the saved model is the plain one."
    gap, better = export_gap(run), outcome(run) is Outcome.BETTER
    if gap is None or run.vanilla is None:
        found = "It was not evaluated in the plain architecture"
        return f"{found}; load it with `autorev.load`." if better else f"{found}."
    loss = loss_text(run.vanilla.loss)
    if not may_export(run):
        found = f"As the plain architecture it would lose {gap:.3g} nats ({loss})"
        return f"{found}: ship it reversible, with `autorev.load`." if better else f"{found}."
    found = f"As the plain architecture it has {loss} ({change_text(gap)})"
    if gap < -_NOTICED:
        # The weights are still those of the plain network: training has not made them the coupling's.
        found += ", better than under the coupling that it was trained with"
    return f"{found}: ship it with `autorev export`." if better else f"{found}."


def _plain_loss(run: FineTuning) -> str:
    gap = export_gap(run)
    if gap is None or run.vanilla is None:
        return ""
    return f"As the plain architecture it has {loss_text(run.vanilla.loss)} ({change_text(gap)}). "
