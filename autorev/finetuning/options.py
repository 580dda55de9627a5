"""What a fine-tuning can be asked for: the defaults, and what the record of a run that goes on says instead."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from autorev.conversion.schedule import Schedule
from autorev.errors import SettingError
from autorev.finetuning import world
from autorev.finetuning.data import TOPICS
from autorev.finetuning.record import Asked, FineTuning, Recipe
from autorev.given import is_count, is_number
from autorev.methods import Method
from autorev.models.quantization import KINDS
from autorev.models.resolve import EMBEDDED, recorded_model
from autorev.optimizers import Optimizer

DECAYS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"),
)
"""Of the learning rate: those of `transformers` that need no numbers of their own."""
_LEAST = {
    "steps": 1, "sequence": 2, "batch": 1, "accumulate": 1, "lora_rank": 1, "schedule_steps": 1, "warmup": 0, "seed": 0,
    "evaluate_every": 1, "save_every": 1, "validation_rows": 1,
}  # fmt: skip
"""Whole numbers."""
SHARDS = ("none", "fsdp")
_PATHS = ("model", "text", "validation")
_MAY_CHANGE = ("method", "learning_rate", "evaluate_every", "save_every", "shard")
"""Between the beginning of a run and what goes on with it; of the method, the grid alone."""


@dataclass(frozen=True, slots=True)
class Options:
    """By the names of `autorev.finetune`'s arguments; None: what follows from the others."""

    model: str | None = None
    text: str | None = None
    validation: str | None = None
    method: str = "momentum:k=3"
    lora_rank: int | None = None
    quantize: str | None = None
    distill: bool = False
    distill_weight: float | None = None
    schedule: str | None = None
    schedule_steps: int | None = None
    max_loss_increase: float | None = None
    steps: int = 100
    sequence: int = 256
    batch: int = 1
    accumulate: int = 1
    learning_rate: float | None = None
    decay: str = "linear"
    warmup: int | None = None
    clip: float | None = None
    optimizer: str = "adamw"
    autocast: str | None = None
    pack: bool = True
    seed: int = 0
    evaluate_every: int | None = None
    save_every: int | None = None
    validation_rows: int = 16
    shard: str = "none"

    @property
    def asked(self) -> Asked:
        """What the record of the run has of them beside the model and the recipe."""
        return Asked(**{field.name: getattr(self, field.name) for field in fields(Asked)})


def settled(given: dict[str, Any], before: FineTuning | None, record: Path) -> Options:
    """What was given (None: it was not), what the run `before` has, and the defaults, in this order.

    Args:
        given: by the names of `Options`.
        before: the run that is gone on with, if any.
        record: where its record lies.

    Raises:
        SettingError: the record does not say all that is needed.
        UntrustedCodeError: it names code that would make the model.
    """
    said = {name: value for name, value in given.items() if value is not None}
    said |= {name: str(said[name]) for name in _PATHS if name in said}
    if before is None:
        return replace(Options(), **said)
    begun = _of(before, record, said)
    _check_same(begun, said, record.parent)
    return replace(begun, **said)


def _check_same(begun: Options, said: dict[str, Any], folder: Path) -> None:
    """The model and the texts may be elsewhere now: what they hold is compared once it is read."""
    different = [
        f"`{name}={getattr(begun, name)}`, not {value}"
        for name, value in said.items()
        if name not in (*_PATHS, *_MAY_CHANGE) and value != getattr(begun, name)
    ]
    if different:
        raise SettingError(
            f"the run in {folder} was begun with {', '.join(different)}; leave out what differs, `resume` takes it "
            "from the run"
        )
    now, then = Method.parse(said.get("method", begun.method)), Method.parse(begun.method)
    if _without_grid(now) != _without_grid(then):
        raise SettingError(
            f"the run in {folder} trains as {then.title}, not as {now.title}; its checkpoints go on with the same "
            "coupling only"
        )


def _without_grid(method: Method) -> Method:
    return replace(method, fraction_bits=None)


def _passes(recipe: Recipe, folder: Path) -> int:
    """Of each process in a step: together they take the rows that the run was begun with, however many they are."""
    passes, rest = divmod(recipe.accumulate * recipe.processes, world.size())
    if rest:
        raise SettingError(
            f"a step of the run in {folder} is {recipe.accumulate * recipe.processes} x {recipe.batch} rows, which "
            f"{world.size()} processes cannot share evenly; go on with it in {recipe.processes}"
        )
    return passes


def _of(before: FineTuning, record: Path, said: dict[str, Any]) -> Options:
    """As the run was begun."""
    recipe, asked = before.recipe, before.asked
    if asked is None:  # of an earlier version, which wrote down less
        if "text" not in said and before.corpus.source != TOPICS:
            raise SettingError(f"{record} does not say by which file it was trained; give `text`")
        asked = Asked(pack=before.corpus.packed)
    model = None
    if "model" not in said and before.model.source != EMBEDDED:
        model = recorded_model(before.model.source, record, "MODEL")
    return Options(
        model=model,
        text=asked.text,
        validation=asked.validation,
        method=before.method.spec,
        lora_rank=recipe.lora_rank,
        quantize=recipe.quantize,
        distill=recipe.distill_weight > 0,
        distill_weight=recipe.distill_weight or None,
        schedule=recipe.schedule,
        schedule_steps=recipe.schedule_steps or None,
        max_loss_increase=recipe.max_loss_increase,
        steps=recipe.steps,
        sequence=recipe.sequence,
        batch=recipe.batch,
        accumulate=_passes(recipe, record.parent),
        learning_rate=recipe.learning_rate,
        decay=recipe.decay,
        warmup=recipe.warmup,
        clip=recipe.clip,
        optimizer=recipe.optimizer,
        autocast="bf16" if recipe.dtype == "bf16" else None,
        pack=asked.pack,
        seed=recipe.seed,
        evaluate_every=asked.evaluate_every,
        save_every=asked.save_every,
        validation_rows=asked.validation_rows,
        shard=recipe.shard,
    )


def check(asked: Options) -> Method:
    """How it is to be trained, where the options make sense together.

    Raises:
        SettingError: they do not.
    """
    method = Method.parse(asked.method)
    for name, least in _LEAST.items():
        value = getattr(asked, name)
        if value is not None and not is_count(value, least):
            raise SettingError(f"{name} is a whole number, {least} or more, not {value!r}")
    if asked.seed >= 2**32:
        raise SettingError(f"the seed is below 2^32, not {asked.seed}")
    rate = asked.learning_rate
    if rate is not None and not (is_number(rate) and rate > 0):
        raise SettingError(f"the learning rate is a number above 0, not {rate!r}")
    if asked.clip is not None and not (is_number(asked.clip) and asked.clip >= 0):
        raise SettingError(f"the largest norm of the gradients is above 0, or 0 for any, not {asked.clip!r}")
    Optimizer.parse(asked.optimizer).check_step(asked.accumulate, asked.clip, world.size())
    if asked.autocast not in (None, "bf16"):
        raise SettingError(f"autocast is bf16 or none, not {asked.autocast!r}")
    if asked.decay not in DECAYS:
        raise SettingError(f"the decay of the learning rate is {', '.join(DECAYS)}, not {asked.decay!r}")
    if asked.quantize is not None and asked.quantize not in KINDS:
        raise SettingError(f"weights are quantised to {' or '.join(KINDS)}, not to {asked.quantize!r}")
    if asked.quantize is not None and asked.lora_rank is None:
        raise SettingError(
            f"`quantize={asked.quantize}` leaves weights that do not train: give `lora_rank`, too, and adapters beside "
            "them do; or leave it out, and all weights train"
        )
    world.check_launched(asked.autocast)
    _check_shard(asked)
    _check_distillation(asked, method)
    _check_coupling(asked, method)
    return method


def _check_shard(asked: Options) -> None:
    if asked.shard not in SHARDS:
        raise SettingError(f"shard is {' or '.join(SHARDS)}, not {asked.shard!r}")
    if asked.shard == "none":
        return
    if world.size() == 1:
        raise SettingError(
            f"`shard={asked.shard}` spreads the weights over processes, and this is the only one: start them with "
            "torchrun --nproc-per-node N, or give `shard=none`"
        )
    optimizer = Optimizer.parse(asked.optimizer)
    if optimizer.library != "torch":
        raise SettingError(
            f"{optimizer} takes whole weights, and `shard={asked.shard}` leaves each process a part of each; take "
            "adamw, adamw-fused or sgd, or `shard=none`"
        )
    if asked.quantize is not None:
        raise SettingError(
            f"weights that are quantised to {asked.quantize} cannot be sharded: parts of them are no numbers; leave "
            "`quantize` or `shard` out"
        )


def _check_distillation(asked: Options, method: Method) -> None:
    weight = asked.distill_weight
    if weight is not None and not asked.distill:
        raise SettingError("`distill_weight` is the share of `distill`; give both, or leave it out")
    if weight is not None and not (is_number(weight) and 0 < weight <= 1):
        raise SettingError(f"the weight of the distillation is above 0 and at most 1, not {weight!r}")
    if asked.distill and method.loss == "chunked":
        raise SettingError("distillation compares all logits, which a chunked loss never makes; leave loss=chunked out")


def _check_coupling(asked: Options, method: Method) -> None:
    schedule, budget = asked.schedule, asked.max_loss_increase
    free = method.name == "momentum" and method.arithmetic == "exact"
    if (schedule or budget is not None) and not free:
        raise SettingError(
            f"{method.title} has no gamma that can be moved; start from momentum in exact arithmetic, or leave "
            "`schedule` and `max_loss_increase` out"
        )
    if schedule and budget is not None:
        raise SettingError("`schedule` moves every gamma, `max_loss_increase` chooses them; give one of the two")
    if budget is not None and not (is_number(budget) and budget >= 0):
        raise SettingError(f"the loss may rise by 0 or more, not by {budget!r}")
    if asked.schedule_steps is not None and not schedule:
        raise SettingError("`schedule_steps` are those of a `schedule`; name one, or leave it out")
    if schedule:
        start = Fraction(method.gamma_of("") or 0)
        Schedule(schedule, asked.schedule_steps or 1, blocks=2, start=abs(start))  # says what it does not like
