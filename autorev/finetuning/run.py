"""`autorev.finetune`: convert, train with `transformers.Trainer`, follow the quality, and write down what happened.

Read this first: the order of everything in this folder. A run lives in a folder of its own: `run.json` (the record),
`checkpoint-N` while it trains, and in the end the model as `save_pretrained` writes it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Any

import torch

from autorev.capture.transformers_quirks import quiet_files
from autorev.errors import SettingError
from autorev.finetuning.record import FILE, FineTuning, Recipe
from autorev.finetuning.schedule import Schedule
from autorev.profiler.environment import environment
from autorev.profiler.record import Variant
from autorev.variants import coupling_options, parse_variant

RATES = {"full": 2e-5, "lora": 2e-4, "scratch": 1e-3}
"""Learning rates by what trains, where none is given."""
DISTILL_WEIGHT = 0.5
"""Of the distance to the original model in the loss, where distillation is asked for without a weight."""
DECAYS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"),
)
"""Of the learning rate: those of `transformers` that need no numbers of their own."""
Progress = Callable[[str, float], None]


def finetune(
    model: str | None = None,
    *,
    out: str | Path,
    data: str | Path | None = None,
    validation: str | Path | None = None,
    coupling: str = "momentum:k=3",
    lora: int | None = None,
    distill: bool = False,
    distill_weight: float | None = None,
    schedule: str | None = None,
    schedule_steps: int | None = None,
    max_loss_increase: float | None = None,
    steps: int = 100,
    sequence: int = 256,
    batch: int = 1,
    accumulate: int = 1,
    learning_rate: float | None = None,
    decay: str = "linear",
    warmup: int | None = None,
    clip: float = 1.0,
    bf16: bool = False,
    pack: bool = True,
    seed: int = 0,
    evaluate_every: int | None = None,
    save_every: int | None = None,
    validation_rows: int = 16,
    name: str | None = None,
    resume: bool = False,
    callbacks: tuple[Any, ...] = (),
    command: str = "autorev.finetune(...)",
    progress: Progress = lambda what, fraction: None,
) -> FineTuning:
    """Fine-tune a causal language model, reversibly or not; train it from scratch where MODEL has no weights.

    Args:
        model: what the command line calls MODEL; None: the embedded SmolLM2.
        out: the run's folder.
        data: a text file, or JSONL (`autorev.finetuning.data`); None: the language reference that CPython carries.
        validation: likewise; default: a tenth of the data.
        coupling: a spec as `autorev.variants` has them: `momentum:k=3`, `leapfrog`, `plain`, `checkpoint`, ...
        lora: rank of PEFT's adapters; None: all weights train.
        distill: add KL(original, model) to the loss.
        distill_weight: its weight w, by default 1/2; the text has 1 - w.
        schedule: leapfrog or midpoint: where gamma is moved to during training.
        schedule_steps: optimiser steps until it is there; default: two thirds of all.
        max_loss_increase: choose each block's side bits such that the loss before training rises by no more.
        steps: optimiser steps.
        sequence: tokens in a row.
        batch: rows in one forward pass.
        accumulate: forward passes in one optimiser step.
        learning_rate: default 2e-5 (all weights), 2e-4 (LoRA), 1e-3 (from scratch).
        decay: of the learning rate, by `transformers`' names: linear, cosine, constant, ...
        warmup: steps in which it rises; default: a twentieth of all.
        clip: the largest norm of the gradients.
        bf16: compute in bfloat16 under autocast.
        pack: several documents in one row.
        seed: of the data's order, of dropout, and of random weights.
        evaluate_every: steps between evaluations; default: a sixth of all.
        save_every: steps between checkpoints; default: a quarter of all.
        validation_rows: rows of the held-out text that are evaluated, spread over it.
        name: of the record; default: the folder's.
        resume: go on with the run in `out` from its last checkpoint.
        callbacks: more of `transformers`' TrainerCallbacks.
        command: what the record says made it.
        progress: is told what is being done, and the fraction done.

    Raises:
        AutorevError: an option makes no sense, the data or model cannot be had, or training had to stop; what was
            saved until then stays.
    """
    folder = Path(out)
    variant = parse_variant(coupling)
    _check_numbers(
        {
            "steps": (steps, 1), "sequence": (sequence, 2), "batch": (batch, 1), "accumulate": (accumulate, 1),
            "lora": (lora, 1), "schedule_steps": (schedule_steps, 1), "warmup": (warmup, 0), "seed": (seed, 0),
            "evaluate_every": (evaluate_every, 1), "save_every": (save_every, 1),
            "validation_rows": (validation_rows, 1),
        },
        learning_rate, clip, decay,
    )  # fmt: skip
    _check(variant, distill, distill_weight, schedule, schedule_steps, max_loss_increase)
    before = _record_in(folder, resume)
    _check_installed()
    from transformers import set_seed

    from autorev.finetuning.session import Run
    from autorev.finetuning.setup import set_up

    set_seed(seed)
    progress("loading the model and the text", 0.0)
    found = set_up(model, _path(data), _path(validation), sequence, validation_rows, pack)
    trains = "scratch" if not found.pretrained else "full" if lora is None else "lora"
    if trains == "scratch" and (lora or distill or max_loss_increase is not None):
        raise SettingError(
            f"{found.info.name} has no weights, so there is nothing to adapt, distil or preserve; leave --lora, "
            "--distill and --max-loss-increase out"
        )
    recipe = Recipe(
        trains=trains,
        lora_rank=lora,
        trained_parameters=found.info.parameters,
        sequence=sequence,
        batch=batch,
        accumulate=accumulate,
        steps=steps,
        learning_rate=RATES[trains] if learning_rate is None else learning_rate,
        dtype="bf16" if bf16 else "fp32",
        optimizer="adamw",
        seed=seed,
        distill_weight=(DISTILL_WEIGHT if distill_weight is None else distill_weight) if distill else 0.0,
        schedule=schedule,
        schedule_steps=(schedule_steps or max(1, steps * 2 // 3)) if schedule else 0,
        max_loss_increase=max_loss_increase,
        decay=decay,
        warmup=max(1, steps // 20) if warmup is None else warmup,
        clip=clip,
    )
    record = FineTuning(
        name=name or folder.resolve().name,
        model=found.info,
        pretrained=found.pretrained,
        variant=variant,
        recipe=recipe,
        corpus=found.texts.corpus,
        command=command,
        environment=environment("cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads()),
        notes=found.texts.notes,
    )
    if before is not None:
        record = _continued(record, before, folder)
    with ExitStack() as stack:
        stack.enter_context(quiet_files())
        run = Run(folder, found, record, progress)
        run.place(stack)
        run.begin()
        arguments = {
            "lr_scheduler_type": decay,
            "warmup_steps": recipe.warmup,
            "max_grad_norm": clip,
            "eval_steps": evaluate_every or max(1, steps // 6),
            "save_steps": save_every or max(1, steps // 4),
        }
        run.train(arguments, callbacks, resume)
        return run.finish()


def _check_numbers(whole: dict[str, tuple[Any, int]], learning_rate: float | None, clip: float, decay: str) -> None:
    for name, (value, least) in whole.items():
        if value is not None and (not isinstance(value, int) or value < least):
            raise SettingError(f"{name} is a whole number, {least} or more, not {value!r}")
    if whole["seed"][0] >= 2**32:
        raise SettingError(f"the seed is below 2^32, not {whole['seed'][0]}")
    if learning_rate is not None and not 0 < learning_rate < inf:
        raise SettingError(f"the learning rate is a number above 0, not {learning_rate:g}")
    if not 0 <= clip < inf:
        raise SettingError(f"the largest norm of the gradients is above 0, or 0 for any, not {clip:g}")
    if decay not in DECAYS:
        raise SettingError(f"the decay of the learning rate is {', '.join(DECAYS)}, not {decay!r}")


def _check(
    variant: Variant,
    distill: bool,
    weight: float | None,
    schedule: str | None,
    schedule_steps: int | None,
    budget: float | None,
) -> None:
    if weight is not None and not distill:
        raise SettingError("--distill-weight is the share of --distill; give both, or leave it out")
    if weight is not None and not 0 < weight <= 1:
        raise SettingError(f"the weight of the distillation is above 0 and at most 1, not {weight:g}")
    if distill and variant.loss == "chunked":
        raise SettingError("distillation compares all logits, which a chunked loss never makes; leave loss=chunked out")
    free = variant.strategy == "momentum" and "arithmetic=float" not in variant.spec
    if (schedule or budget is not None) and not free:
        raise SettingError(
            f"{variant.title} has no gamma that can be moved; start from momentum in exact arithmetic, or leave "
            "--schedule and --max-loss-increase out"
        )
    if schedule and budget is not None:
        raise SettingError("--schedule moves every gamma, --max-loss-increase chooses them; give one of the two")
    if budget is not None and not budget >= 0:  # NaN included
        raise SettingError(f"the loss may rise by 0 or more, not by {budget:g}")
    if schedule_steps is not None and not schedule:
        raise SettingError("--schedule-steps are those of a --schedule; name one, or leave it out")
    if schedule:
        start = Fraction(coupling_options(variant)["gamma"])
        Schedule(schedule, schedule_steps or 1, blocks=2, start=abs(start))  # says what it does not like


def _record_in(folder: Path, resume: bool) -> FineTuning | None:
    path = folder / FILE
    if resume:
        if not path.is_file():
            raise SettingError(f"{folder} holds no run to go on with ({FILE} is missing); leave --resume out")
        before = FineTuning.read(path)
        if before.complete:
            raise SettingError(f"the run in {folder} is complete; name another --out for a new one")
        return before
    if path.is_file():
        raise SettingError(f"{folder} is there already; go on with its run by --resume, or name another --out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingError(f"{folder} is there already, and holds no run; name another --out")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise SettingError(f"{folder} cannot be made: {above} cannot be written to; name another --out")
    return None


def _continued(record: FineTuning, before: FineTuning, folder: Path) -> FineTuning:
    """`record` with what an earlier run of the same recipe found. Another learning rate or grid may be gone on with.

    Raises:
        SettingError: it was another recipe.
    """
    if _without_grid(before.variant) != _without_grid(record.variant):
        raise SettingError(
            f"the run in {folder} trains as {before.variant.title}, not as {record.variant.title}; its checkpoints go "
            "on with the same coupling only"
        )
    now, old = _compared(record), _compared(before)
    rate, old_rate = now.pop("learning_rate"), old.pop("learning_rate")
    notes = before.notes
    if rate != old_rate:
        notes += (f"gone on with at a learning rate of {rate:g} instead of {old_rate:g}",)
    same = before.variant.spec == record.variant.spec
    if not same:
        notes += (f"gone on with as {record.variant.title} instead of {before.variant.title}",)
    different = [f"{name} ({old[name]}, now {now[name]})" for name in now if now[name] != old[name]]
    if different:
        raise SettingError(f"the run in {folder} had another {', '.join(different)}; go on with the same options")
    commands = dict.fromkeys([*before.command.splitlines(), record.command])
    return replace(
        copy.copy(before),
        command="\n".join(commands),
        environment=record.environment,
        variant=record.variant,
        recipe=replace(before.recipe, learning_rate=rate),
        chains=before.chains if same else tuple(replace(chain, fraction_bits=None) for chain in before.chains),
        notes=notes,
    )


def _without_grid(variant: Variant) -> Variant:
    """The variant whatever its fraction bits."""
    name, _, options = variant.spec.partition(":")
    kept = [option for option in options.split(",") if option and not option.startswith("fraction_bits=")]
    return parse_variant(":".join(filter(None, [name, ",".join(kept)])))


def _compared(record: FineTuning) -> dict[str, Any]:
    parts = {"model's ": asdict(record.model), "data's ": asdict(record.corpus), "": asdict(record.recipe)}
    found = {what + name: value for what, part in parts.items() for name, value in part.items()}
    found.pop("trained_parameters")  # not known before adapters are added
    return found


def _check_installed() -> None:
    try:
        import accelerate  # noqa: F401 - transformers' Trainer needs it, and says so later
        import transformers  # noqa: F401 - is it installed?
    except ImportError as error:
        raise SettingError(f"fine-tuning needs {error.name}: pip install autorev[finetune]") from None


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given).expanduser()
