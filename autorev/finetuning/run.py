"""`autorev.finetune`: convert, train with `transformers.Trainer`, follow the quality, and write down what happened.

Read this first: the order of everything in this folder. Several processes (`torchrun`) go through all of it alike, and
the first one writes (`world.py`). A run lives in a folder of its own: `run.json` (the record),
`checkpoint-N` while it trains, and in the end the model as `save_pretrained` writes it.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autorev.errors import SettingError
from autorev.files import path_of
from autorev.finetuning import world
from autorev.finetuning.folder import claimed
from autorev.finetuning.options import Options, check, settled
from autorev.finetuning.record import FILE, FineTuning, Recipe
from autorev.finetuning.setup import set_up
from autorev.given import no_function
from autorev.integrations.optimizers import check_runs
from autorev.integrations.quirks import quiet_files
from autorev.models.quantization import bitsandbytes_config, cannot_train
from autorev.optimizers import Optimizer
from autorev.packages import require
from autorev.profiler.environment import environment
from autorev.records import check_name

if TYPE_CHECKING:
    from autorev.finetuning.setup import Setup

RATES = {"full": 2e-5, "lora": 2e-4, "scratch": 1e-3}
"""Learning rates by what trains, where none is given."""
DISTILL_WEIGHT = 0.5
"""Of the distance to the original model in the loss, where distillation is asked for without a weight."""
_SHOWN = 12
"""Digits of a digest."""
Progress = Callable[[str, float], None]


def finetune(
    model: str | None = None,
    *,
    out: str | Path,
    text: str | Path | None = None,
    validation: str | Path | None = None,
    method: str | None = None,
    lora_rank: int | None = None,
    distill: bool | None = None,
    distill_weight: float | None = None,
    quantize: str | None = None,
    schedule: str | None = None,
    schedule_steps: int | None = None,
    max_loss_increase: float | None = None,
    steps: int | None = None,
    sequence: int | None = None,
    batch: int | None = None,
    accumulate: int | None = None,
    learning_rate: float | None = None,
    decay: str | None = None,
    warmup: int | None = None,
    clip: float | None = None,
    optimizer: str | None = None,
    autocast: str | None = None,
    pack: bool | None = None,
    seed: int | None = None,
    evaluate_every: int | None = None,
    save_every: int | None = None,
    validation_rows: int | None = None,
    shard: str | None = None,
    name: str | None = None,
    resume: bool = False,
    trust_remote_code: bool = False,
    callbacks: tuple[Any, ...] = (),
    command: str = "autorev.finetune(...)",
    progress: Progress = lambda what, fraction: None,
) -> FineTuning:
    """Fine-tune a causal language model, reversibly or not; train it from scratch where MODEL has no weights.

    What is None has its default (`autorev.finetuning.options`); of a run that is gone on with, what it was begun with.

    Args:
        model: what the command line calls MODEL; None: the embedded SmolLM2.
        out: the run's folder.
        text: a text file, or JSONL (`autorev.finetuning.data`); None: the language reference that CPython carries.
        validation: likewise; default: a tenth of the text.
        method: as `autorev.methods` spells them: `momentum:k=3`, `leapfrog`, `plain`, `checkpoint`, ...
        lora_rank: of PEFT's adapters; None: all weights train.
        quantize: nf4 or int8: the weights beside the adapters, by bitsandbytes; None: as they are.
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
        clip: the largest norm of the gradients; 0: any. Default: 1; any where the optimiser takes them one by one.
        optimizer: as `autorev.optimizers` spells it: adamw, adamw-fused, adamw-fused:step=backward, adamw-8bit, ...
        autocast: bf16 to compute in bfloat16 under autocast; None: in the weights' dtype.
        pack: several documents in one row.
        seed: of the data's order, of dropout, and of random weights.
        evaluate_every: steps between evaluations; default: a sixth of all.
        save_every: steps between checkpoints; default: a quarter of all.
        validation_rows: rows of the held-out text that are evaluated, spread over it.
        shard: none, or fsdp: the processes hold a part of each weight, gradient and state instead of all.
        name: of the record; default: the folder's.
        resume: go on with the run in `out` from its last checkpoint. The learning rate, the grid, `shard` and the
            number of processes may be others than it was begun with; whatever else is given and differs is an error.
        trust_remote_code: code that stands beside MODEL's config, or that the config names, may run.
        callbacks: more of `transformers`' TrainerCallbacks.
        command: what the record says made it.
        progress: is told what is being done, and the fraction done.

    Raises:
        AutorevError: an option makes no sense, the data or model cannot be had, or training had to stop; what was
            saved until then stays.
    """
    given = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
    folder = path_of(out)
    if wrong := no_function(progress=progress):
        raise SettingError(wrong)
    if not isinstance(callbacks, tuple | list):
        raise SettingError(f"callbacks are a tuple of TrainerCallbacks, not {callbacks!r}")
    if name is not None:
        check_name(name, "the run")
    world.join()
    with ExitStack() as stack:
        before = world.first(lambda: stack.enter_context(claimed(folder, resume)))
        asked = settled(given, before, folder / FILE)
        trained_by = check(asked)
        _check_installed()
        on = "cuda" if torch.cuda.is_available() else "cpu"
        check_runs(Optimizer.parse(asked.optimizer), on)
        from transformers import set_seed

        from autorev.finetuning.session import Run

        set_seed(asked.seed)
        progress("loading the model and the text", 0.0)
        texts = _path(asked.text), _path(asked.validation)
        quantization = bitsandbytes_config(asked.quantize, asked.autocast == "bf16")
        found = set_up(
            asked.model, *texts, asked.sequence, asked.validation_rows, asked.pack, trust_remote_code, quantization
        )
        recipe = _recipe(asked, found)
        record = FineTuning(
            name=name or folder.resolve().name,
            model=found.info,
            pretrained=found.pretrained,
            method=trained_by,
            recipe=recipe,
            corpus=found.texts.corpus,
            command=command,
            environment=environment(on, torch.get_num_threads()),
            asked=asked.asked,
            vocabulary=found.vocabulary,
            notes=(*found.notes, *_not_clipped(recipe)),
            run=world.gathered(secrets.token_hex(8))[0],
            base=found.base,
        )
        if before is not None:
            record = _continued(record, before, folder)
        stack.enter_context(quiet_files())
        run = Run(folder, found, record, progress)
        run.place(stack)
        run.begin()
        arguments = {
            "lr_scheduler_type": recipe.decay,
            "warmup_steps": recipe.warmup,
            "max_grad_norm": recipe.clip,
            "eval_steps": asked.evaluate_every or max(1, recipe.steps // 6),
            "save_steps": asked.save_every or max(1, recipe.steps // 4),
        }
        run.train(arguments, callbacks, resume)
        return run.finish()


def _recipe(asked: Options, found: Setup) -> Recipe:
    """How it is trained, with what follows from the rest."""
    trains = "scratch" if not found.pretrained else "full" if asked.lora_rank is None else "lora"
    if trains == "scratch" and (asked.lora_rank or asked.distill or asked.max_loss_increase is not None):
        raise SettingError(
            f"{found.info.name} has no weights, so there is nothing to adapt, distil or preserve; leave `lora_rank`, "
            "`distill` and `max_loss_increase` out"
        )
    if trains == "full" and found.quantised:
        raise cannot_train(found.info.name, found.quantised, "`lora_rank=16`")
    weight = DISTILL_WEIGHT if asked.distill_weight is None else asked.distill_weight
    return Recipe(
        trains=trains,
        lora_rank=asked.lora_rank,
        trained_parameters=found.info.parameters,
        sequence=asked.sequence,
        batch=asked.batch,
        accumulate=asked.accumulate,
        steps=asked.steps,
        learning_rate=RATES[trains] if asked.learning_rate is None else asked.learning_rate,
        dtype=asked.autocast or "fp32",
        optimizer=str(Optimizer.parse(asked.optimizer)),
        seed=asked.seed,
        distill_weight=weight if asked.distill else 0.0,
        schedule=asked.schedule,
        schedule_steps=(asked.schedule_steps or max(1, asked.steps * 2 // 3)) if asked.schedule else 0,
        max_loss_increase=asked.max_loss_increase,
        decay=asked.decay,
        warmup=max(1, asked.steps // 20) if asked.warmup is None else asked.warmup,
        clip=_clip(asked),
        quantize=asked.quantize,
        processes=world.size(),
        shard=asked.shard,
    )


def _clip(asked: Options) -> float:
    if asked.clip is not None:
        return asked.clip
    return 0.0 if Optimizer.parse(asked.optimizer).during_backward else 1.0


def _not_clipped(recipe: Recipe) -> tuple[str, ...]:
    if not Optimizer.parse(recipe.optimizer).during_backward:
        return ()
    return (f"gradients are not clipped: {recipe.optimizer} takes each as soon as it is there",)


def _continued(record: FineTuning, before: FineTuning, folder: Path) -> FineTuning:
    """`record` with what an earlier run of the same recipe found. Another learning rate or grid may be gone on with.

    Raises:
        SettingError: it was another recipe.
    """
    now, old = _compared(record), _compared(before)
    if record.base and record.base == before.base:  # the same weights, wherever they lie now
        for name in ("model's name", "model's source"):
            old[name] = now[name]
    elif not before.base:  # of a version that did not look
        now.pop("model's weights")
    if before.asked is None:  # likewise
        now.pop("validation_rows")
    if record.corpus.content == before.corpus.content:
        old["data's source"] = now["data's source"]
    rate, old_rate = now.pop("learning_rate"), old.pop("learning_rate")
    notes = before.notes
    if rate != old_rate:
        notes += (f"gone on with at a learning rate of {rate:g} instead of {old_rate:g}",)
    processes = record.recipe.processes
    if processes != before.recipe.processes:
        notes += (
            f"gone on with by {processes} instead of {before.recipe.processes} processes; dropout draws other numbers "
            "from there",
        )
    if record.recipe.shard != before.recipe.shard:
        notes += (f"gone on with by shard={record.recipe.shard} instead of {before.recipe.shard}",)
    same = before.method.spec == record.method.spec
    if not same:
        notes += (f"gone on with as {record.method.title} instead of {before.method.title}",)
    different = [f"{name} ({old[name]}, now {now[name]})" for name in now if now[name] != old[name]]
    if different:
        raise SettingError(
            f"the run in {folder} had another {', '.join(different)}; go on with the same model, on the same text"
        )
    commands = dict.fromkeys([*before.command.splitlines(), record.command])
    return replace(
        copy.copy(before),
        command="\n".join(commands),
        environment=record.environment,
        asked=record.asked,
        model=record.model,
        method=record.method,
        recipe=replace(
            before.recipe,
            learning_rate=rate,
            accumulate=record.recipe.accumulate,
            processes=processes,
            shard=record.recipe.shard,
        ),
        chains=before.chains if same else tuple(replace(chain, fraction_bits=None) for chain in before.chains),
        notes=notes,
    )


def _compared(record: FineTuning) -> dict[str, Any]:
    parts = {"model's ": asdict(record.model), "data's ": asdict(record.corpus), "": asdict(record.recipe)}
    found = {what + name: value for what, part in parts.items() for name, value in part.items()}
    found.pop("trained_parameters")  # not known before adapters are added
    for shared in ("accumulate", "processes", "shard"):  # what counts is what they make together
        found.pop(shared)
    found["rows in a step"] = record.recipe.rows
    found["model's weights"] = record.base[:_SHOWN]
    if record.asked is not None:
        found["validation_rows"] = record.asked.validation_rows
    return found


def _check_installed() -> None:
    require("fine-tuning", "accelerate", "transformers")  # which themselves say so later


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else path_of(given)
