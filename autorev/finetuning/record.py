"""A fine-tuning run as frozen data: what was trained on what, every step's figures, and what became of the quality.

Nothing here needs torch: a report is rendered from these objects, or from their JSON, on any machine. Losses are nats a
token, sizes bytes, times seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from statistics import median
from typing import Any

from autorev.analysis import ModelInfo
from autorev.methods import Method
from autorev.optimizers import Optimizer
from autorev.profiler.record import Environment
from autorev.records import Record

FILE = "run.json"
"""The record in its run's folder."""
HELD_OUT = "validation.json"
"""The rows that every evaluation of the run is on: `export` compares on the same."""
EXPORT_LIMIT = 0.05
"""Nats: a model whose loss rises by more in the plain architecture is not exported unless that is forced."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is trained on, and what is held out."""

    source: str
    """In words: `CPython's pydoc_data.topics`, or a file's name."""
    documents: int
    training_tokens: int
    """That count for the loss."""
    validation_tokens: int
    truncated: int
    """Documents that did not fit a sequence and lost their end."""
    packed: bool
    """Several documents in one sequence, each seeing itself alone; otherwise one each, padded."""
    content: str = ""
    """A digest of all tokens."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How it is trained."""

    trains: str
    """full, lora or scratch."""
    lora_rank: int | None
    trained_parameters: int
    sequence: int
    batch: int
    """Sequences in one forward pass."""
    accumulate: int
    """Forward passes in one optimiser step."""
    steps: int
    """Optimiser steps."""
    learning_rate: float
    dtype: str
    """fp32, or bf16 for autocast."""
    optimizer: str
    """As `autorev.optimizers` spells it."""
    seed: int
    distill_weight: float = 0.0
    """w of (1 - w) x cross entropy + w x KL(original, model); 0: no distillation."""
    schedule: str | None = None
    """leapfrog or midpoint, where gamma is moved to during training; None: it stays."""
    schedule_steps: int = 0
    """Steps until it is there."""
    max_loss_increase: float | None = None
    """The budget that the side bits of each block were chosen under; None: they are the coupling's."""
    decay: str = "linear"
    """Of the learning rate, by `transformers`' names."""
    warmup: int = 0
    """Steps in which it rises."""
    clip: float = 1.0
    """The largest norm of the gradients; 0: any."""
    quantize: str | None = None
    """nf4 or int8, which the weights were quantised to when they were loaded; None: they are as they were saved."""
    processes: int = 1
    """That train together, each with `batch` sequences in a pass."""
    shard: str = "none"
    """What they share out beside the rows: none, or fsdp: weights, gradients and the optimiser's states, by FSDP2."""

    def __post_init__(self) -> None:
        Optimizer.parse(self.optimizer)

    @property
    def rows(self) -> int:
        """Sequences in one optimiser step, of all processes."""
        return self.batch * self.accumulate * self.processes


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for beside the recipe: whoever goes on with the run need not say it again."""

    text: str | None = None
    """A file, as it was named; None: the language reference that CPython carries."""
    validation: str | None = None
    """Likewise; None: a part of the data."""
    pack: bool = True
    validation_rows: int = 16
    evaluate_every: int | None = None
    """Steps; None: as many as follow from the number of all."""
    save_every: int | None = None
    """Likewise."""


@dataclass(frozen=True, slots=True)
class Logged:
    """One optimiser step."""

    step: int
    """The first one is 1."""
    loss: float
    """What was minimised."""
    learning_rate: float
    gradient_norm: float | None
    seconds: float | None
    tokens: int | None
    """That went through the model, in all processes."""
    drift: float | None
    """Of the reconstruction: 0 in exact arithmetic; None where nothing is rebuilt."""
    gamma: float | None
    """Mean over the chains' steps; None for a model without."""
    side_bits: float | None
    """Mean over the chains' steps."""
    peak_bytes: int | None
    """By the allocator, in the process that needed most; None for a step in which it was not looked at."""
    cross_entropy: float | None = None
    """The part of the loss that the text makes, with distillation."""
    divergence: float | None = None
    """KL(original, model) of the step's batch, with distillation."""

    @classmethod
    def from_history(cls, row: dict[str, Any]) -> Logged:
        """Of a row of the Trainer's `log_history`, with what was logged beside."""
        names = ("seconds", "tokens", "drift", "gamma", "side_bits", "peak_bytes", "cross_entropy", "divergence")
        return cls(
            step=row["step"],
            loss=float(row["loss"]),
            learning_rate=float(row["learning_rate"]),
            gradient_norm=None if row.get("grad_norm") is None else float(row["grad_norm"]),
            **{name: row.get(name) for name in names},
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The model on the validation text at one moment."""

    step: int
    """After so many optimiser steps."""
    loss: float
    standard_error: float | None = None
    """Of the loss, over the sequences; None for a single one."""
    agreement: float | None = None
    """Share of positions where the likeliest next token is the original model's; None: not compared."""
    divergence: float | None = None
    """KL(original, model)."""
    losses: tuple[float, ...] = ()
    """Of each sequence, nats a token: two models on the same text are compared sequence by sequence."""
    tokens: tuple[int, ...] = ()
    """Of each sequence, those that are learned."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is no number."""
        return exp(self.loss) if self.loss < 700 else float("inf")


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One block at another gamma than the rest."""

    block: str
    gamma: float
    side_bits: int
    increase: float
    """Of the loss, against all blocks at the smallest gamma."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A gamma for every block, and what it did to the loss before any training."""

    side_bits: float
    """Mean over the steps."""
    increase: float
    """Measured, against the original model."""
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Calibration:
    """How the side bits of each block were chosen."""

    budget: float
    """The increase of the loss that was allowed."""
    tokens: int
    """That the assignments were measured on."""
    sensitivities: tuple[Sensitivity, ...]
    assignments: tuple[Assignment, ...]
    """That were measured as a whole, by descending side bits."""


@dataclass(frozen=True, slots=True)
class ChainState:
    """A chain at the end. Tuples over its steps."""

    name: str
    gamma: tuple[float, ...]
    c: tuple[float, ...]
    side_bits: tuple[int, ...]
    fraction_bits: int | None


@dataclass(frozen=True, slots=True)
class FineTuning(Record):
    """Everything that `autorev finetune` did and found."""

    name: str
    model: ModelInfo
    pretrained: bool
    method: Method
    """How it was trained: plain, checkpoint, a coupling."""
    recipe: Recipe
    corpus: Corpus
    command: str
    """What made it; one line for each run that went on with it."""
    environment: Environment
    asked: Asked | None = None
    """None: of a version that did not write it down."""
    vocabulary: int | None = None
    """Tokens that the model chooses from."""
    original: Evaluation | None = None
    """The model before conversion."""
    evaluations: tuple[Evaluation, ...] = ()
    """Under the coupling; the first, at step 0, before any training."""
    vanilla: Evaluation | None = None
    """The trained weights in the plain architecture."""
    logged: tuple[Logged, ...] = ()
    chains: tuple[ChainState, ...] = ()
    calibration: Calibration | None = None
    teacher_bytes: int = 0
    """Of the copy of the original model that distillation needs; 0 with LoRA, whose base is the original."""
    complete: bool = False
    notes: tuple[str, ...] = ()
    run: str = ""
    """A random name: the marks of its checkpoints and of its model have it. Earlier versions gave none."""
    base: str = ""
    """A digest of the weights that it began with; empty where they were random."""
    kind: str = "fine-tuning"
    schema_version: int = 3

    @property
    def zero_shot(self) -> Evaluation | None:
        """Under the coupling before any training."""
        return next((e for e in self.evaluations if e.step == 0), None)

    @property
    def final(self) -> Evaluation | None:
        """Under the coupling after the last step; None while it is not complete."""
        return self.evaluations[-1] if self.complete and self.evaluations else None

    @property
    def peak_bytes(self) -> int | None:
        """The highest of all steps that were looked at."""
        return max((row.peak_bytes for row in self.logged if row.peak_bytes is not None), default=None)

    @property
    def step_seconds(self) -> float | None:
        """The median over the steps, but for those whose memory was looked at, which slows them."""
        samples = [row.seconds for row in self.logged if row.seconds is not None and row.peak_bytes is None]
        return median(samples) if samples else None

    @property
    def tokens_per_second(self) -> float | None:
        """At the median step."""
        counts = [row.tokens for row in self.logged if row.tokens is not None]
        seconds = self.step_seconds
        return median(counts) / seconds if counts and seconds else None

    def side_bits(self, last: bool = True) -> float | None:
        """Mean over the chains' steps, after the last step or before the first; None where nothing is logged."""
        rows = [row.side_bits for row in self.logged if row.side_bits is not None]
        return rows[-1 if last else 0] if rows else None

    def __str__(self) -> str:
        from autorev.report.render import render_text

        return render_text(self)
