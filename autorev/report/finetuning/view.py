"""Which runs a report of fine-tunings sets side by side, what they are called, and how they are drawn."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

from autorev.finetuning.record import Evaluation, FineTuning, Logged
from autorev.format import clean, format_integer, plural
from autorev.report.finetuning.numbers import bits_text, running_mean
from autorev.report.palette import Look, Looks

_LONGEST_LABEL = 44
"""Letters of a name in a figure."""


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Runs of one model that may stand in one table: all pretrained, or all from random weights."""

    model: str
    scratch: bool
    runs: tuple[FineTuning, ...]

    @property
    def title(self) -> str:
        """`SmolLM2-135M-Instruct, fine-tuned`."""
        return f"{clean(self.model)}, {'from scratch' if self.scratch else 'fine-tuned'}"


@dataclass(frozen=True, slots=True)
class Family:
    """Runs that differ in how they are trained, and in nothing that the loss could come from but that."""

    title: str
    runs: tuple[FineTuning, ...]


def groups(runs: Sequence[FineTuning]) -> list[RunGroup]:
    """By model, those from scratch apart; in the order of the records."""
    found: dict[tuple[str, bool], list[FineTuning]] = defaultdict(list)
    for run in runs:
        found[run.model.name, run.recipe.trains == "scratch"].append(run)
    return [RunGroup(model, scratch, tuple(members)) for (model, scratch), members in found.items()]


def families(runs: Sequence[FineTuning]) -> list[Family]:
    """By data and recipe, seeds together; in the order of the records."""
    found: dict[object, list[FineTuning]] = defaultdict(list)
    for run in runs:
        found[same_but_seed(run)].append(run)
    return [Family(recipe_title(members[0]), tuple(members)) for members in found.values()]


def same_but_seed(run: FineTuning) -> object:
    """What two runs have in common whose losses may be compared, over all seeds.

    The coupling is not in it, nor a schedule, a distillation or a budget for side bits: those are what is compared.
    """
    r = run.recipe
    size = (r.trains, r.lora_rank, r.sequence, r.batch, r.accumulate, r.processes, r.steps)
    return (run.model.name, run.model.parameters, run.corpus, *size, r.learning_rate, r.dtype, r.optimizer)


def plain_of(run: FineTuning, runs: Sequence[FineTuning]) -> FineTuning | None:
    """Plain training by the same recipe on the same data with the same seed, and complete; None: there is none."""
    if run.method.name == "plain":
        return None
    key = same_but_seed(run), run.recipe.seed
    found = [r for r in runs if r.method.name == "plain" and (same_but_seed(r), r.recipe.seed) == key and r.final]
    # Of two, the one with the same loss, distilled or not.
    return min(found, key=lambda r: r.recipe.distill_weight != run.recipe.distill_weight, default=None)


def against_plain(run: FineTuning, runs: Sequence[FineTuning]) -> float | None:
    """How much higher its final loss is than plain training's; None: one of the two is missing."""
    plain = plain_of(run, runs)
    return difference(run.final, plain.final if plain else None)


def difference(evaluation: Evaluation | None, other: Evaluation | None) -> float | None:
    """How much higher the first loss is; None where either is missing."""
    return evaluation.loss - other.loss if evaluation and other else None


def original_words(run: FineTuning) -> str:
    """What the model was before conversion: `original`, or `random weights` that nobody wants back."""
    return "original" if run.pretrained else "random weights"


def latest(run: FineTuning) -> Evaluation | None:
    """Under the coupling after as many steps as there are; None before the first evaluation."""
    return run.evaluations[-1] if run.evaluations else None


def steps_done(run: FineTuning) -> int:
    """Optimiser steps that the record knows of."""
    return max([row.step for row in run.logged] + [e.step for e in run.evaluations], default=0)


def side_bits_ends(run: FineTuning) -> tuple[float, float] | None:
    """Mean side bits at the start and at the end; what the chains have where no step is logged, None without chains."""
    first, last = run.side_bits(last=False), run.side_bits()
    if first is not None and last is not None:
        return first, last
    bits = [bits for chain in run.chains for bits in chain.side_bits]
    return (sum(bits) / len(bits),) * 2 if bits else None


def side_bits_words(run: FineTuning) -> str:
    """`3`, or `3 to 0` where a schedule moved them; the sign for nothing without chains."""
    first, last = side_bits_ends(run) or (None, None)
    return " to ".join(dict.fromkeys((bits_text(first), bits_text(last))))  # once, where both are shown alike


def moved(run: FineTuning) -> bool:
    """Did gamma change while it trained?"""
    return len({row.gamma for row in run.logged if row.gamma is not None}) > 1


def with_peak(run: FineTuning) -> list[tuple[Logged, int]]:
    """The steps whose memory was looked at."""
    return [(row, row.peak_bytes) for row in run.logged if row.peak_bytes is not None]


def training_loss(row: Logged) -> float:
    """The part of a step's loss that the text makes: without distillation, all of it."""
    return row.loss if row.cross_entropy is None else row.cross_entropy


def smoothed_training(run: FineTuning) -> list[tuple[int, float]]:
    """(step, training loss) with each a mean over its neighbours: many runs in one figure would hide each other."""
    rows = [row for row in run.logged if finite(training_loss(row))]
    losses = running_mean([training_loss(row) for row in rows], max(5, len(rows) // 10) | 1)
    return [(row.step, loss) for row, loss in zip(rows, losses, strict=True)]


def finite(value: float | None) -> bool:
    """Can it be drawn?"""
    return value is not None and isfinite(value)


def trains_words(run: FineTuning) -> str:
    """`all weights`, `LoRA of rank 16 on nf4 weights`, `from scratch, bf16 autocast`."""
    recipe = run.recipe
    words = {"full": "all weights", "scratch": "from scratch"}.get(recipe.trains, clean(recipe.trains))
    if recipe.trains == "lora":
        words = "LoRA" if recipe.lora_rank is None else f"LoRA of rank {recipe.lora_rank}"
        words += "" if recipe.quantize is None else f" on {clean(recipe.quantize)} weights"
    return words + (", bf16 autocast" if recipe.dtype == "bf16" else "")


def how_words(run: FineTuning) -> str:
    """The coupling, and what came with it: `momentum k=3, moved to leapfrog, distilled`."""
    recipe = run.recipe
    parts = [clean(run.method.title) or clean(run.method.spec)]
    parts += [f"moved to {clean(recipe.schedule)}"] if recipe.schedule else []
    parts += ["side bits calibrated"] if recipe.max_loss_increase is not None else []
    parts += ["distilled"] if recipe.distill_weight else []
    return ", ".join(parts)


def recipe_title(run: FineTuning) -> str:
    """`All weights, 40 steps of 1 x 192 tokens at rate 5e-05`, `... in 2 processes at rate ...`."""
    r = run.recipe
    rows = format_integer(r.rows)
    words = f"{trains_words(run)}, {plural(r.steps, 'step')} of {rows} x {format_integer(r.sequence)} tokens"
    words += f" in {format_integer(r.processes)} processes" if r.processes > 1 else ""
    words += " that share the weights" if r.shard == "fsdp" else ""
    return f"{words[0].upper()}{words[1:]} at rate {r.learning_rate:g}"


def labels(runs: Sequence[FineTuning]) -> list[str]:
    """What each run is called where there is no room for more; two are never called the same."""
    names = [short(how_words(run)) for run in runs]
    for words in (trains_words, _steps_words, _seed_words, lambda run: short(run.name)):
        more = [words(run) for run in runs]
        alike: dict[str, set[str]] = defaultdict(set)
        for name, word in zip(names, more, strict=True):
            alike[name].add(word)
        # Only what tells them apart is worth its room.
        names = [f"{n}, {word}" if len(alike[n]) > 1 else n for n, word in zip(names, more, strict=True)]
    counts, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = f"{name} ({seen[name]})" if counts[name] > 1 else name
    return names


def looks(runs: Sequence[FineTuning]) -> list[Look]:
    """Colour by the coupling that a run ends with, seeds alike; others of one colour differ in symbol and dash."""
    found = Looks()
    return [found.of(ends_as(run), how_words(run)) for run in runs]


def ranked(runs: Sequence[FineTuning]) -> list[FineTuning]:
    """Plain training first, then by the loss after training; what has none comes last."""

    def place(run: FineTuning) -> tuple[bool, float]:
        return run.method.name != "plain", run.final.loss if run.final and finite(run.final.loss) else inf

    return sorted(runs, key=place)


def ends_as(run: FineTuning) -> str:
    """The coupling that a run ends with: where its schedule leads, or its own."""
    return run.recipe.schedule or run.method.name


def short(text: str, limit: int = _LONGEST_LABEL) -> str:
    """`text` on one line of at most `limit` letters."""
    text = clean(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _seed_words(run: FineTuning) -> str:
    return f"seed {run.recipe.seed}"


def _steps_words(run: FineTuning) -> str:
    return plural(run.recipe.steps, "step")
