"""One run while it lasts: the model in its present form, and the record as far as it is known.

place       copy the teacher, convert, add adapters
begin       what is known before any training
train       all steps, or those that are left
finish      the final evaluations, and the model as a folder
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from autorev.conversion.convert import chains_of
from autorev.conversion.recouple import recouple
from autorev.conversion.schedule import Schedule
from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.velocity import Velocity
from autorev.errors import FixedPointRangeError, SettingError, Terminated, TrainingError, is_out_of_memory, message_of
from autorev.finetuning import world
from autorev.finetuning.agreeing import Agreeing
from autorev.finetuning.calibrate import calibrate
from autorev.finetuning.callback import ReversibleCallback
from autorev.finetuning.checkpoints import (
    check_room,
    checkpoints_of,
    clear_parts,
    discard,
    last_checkpoint,
    move_in,
    part_of,
    step_of,
)
from autorev.finetuning.evaluate import evaluate, logits_of, vanilla_logits
from autorev.finetuning.progress import Told
from autorev.finetuning.record import FILE, HELD_OUT, ChainState, Evaluation, FineTuning, Logged
from autorev.finetuning.setup import Setup
from autorev.finetuning.sharded import ShardedFineTuner
from autorev.finetuning.teacher import Teacher
from autorev.finetuning.trainer import GENTLER, FineTuner, StopWhenAsked
from autorev.in_place import NotApplicable, in_place
from autorev.integrations.optimizers import trainer_options
from autorev.integrations.peft import wrap
from autorev.models.load import load_model
from autorev.optimizers import Optimizer
from autorev.records import write_whole

Progress = Callable[[str, float], None]
CALIBRATED_ON, CHECKED_ON = 4, 24
"""Rows of the training text on which one block after the other is given fewer side bits, and all of them together."""


class Run:
    """One run while it lasts: the model in its present form, and the record as far as it is known."""

    def __init__(self, folder: Path, found: Setup, record: FineTuning, progress: Progress) -> None:
        self.folder, self.found, self.record, self.progress = folder, found, record, progress
        self.model: nn.Module = found.model
        self.teacher: Teacher | None = None
        self.trainer: FineTuner | None = None

    def place(self, stack: ExitStack) -> None:
        """Copy the teacher, convert the model, add adapters."""
        recipe, record = self.record.recipe, self.record
        if recipe.distill_weight:
            self.teacher = Teacher.copied(self.model) if recipe.trains == "full" else None
        grids = {chain.name: chain.fraction_bits for chain in record.chains if chain.fraction_bits is not None}
        try:
            stack.enter_context(in_place(self.model, record.method, self.found.blocks, self.found.call, grids or None))
        except NotApplicable as error:
            raise SettingError(f"{record.model.name} cannot be trained as {record.method.title}: {error}") from None
        if recipe.lora_rank is not None:
            self.model = wrap(self.model, self.found.adapters(recipe.lora_rank))
            if recipe.distill_weight:
                self.teacher = Teacher.within(self.model)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.record = replace(
            record,
            recipe=replace(recipe, trained_parameters=trained),
            teacher_bytes=self.teacher.own_bytes if self.teacher else 0,
        )

    def begin(self) -> None:
        """What is known before any training: the original's loss, the side bits of each block, the loss under them."""
        if self.record.evaluations:  # a run that goes on
            self._take_up_gammas()
            self._keep_held_out()
            return
        whose = "original model" if self.record.pretrained else "random weights"
        self.progress(f"evaluating the {whose}", 0.0)
        original = Teacher.within(self.model).logits
        first = self._evaluate(original, 0)
        budget = self.record.recipe.max_loss_increase
        if budget is not None:
            few, more = (self.found.texts.training.first(count) for count in (CALIBRATED_ON, CHECKED_ON))
            here, collator = logits_of(self.model), self.found.texts.collator
            calibration = calibrate(
                self.model,
                lambda: evaluate(here, few, collator, 0).loss,
                check=lambda: evaluate(here, more, collator, 0).loss,
                max_loss_increase=budget,
                tokens=more.learned,
                progress=self.progress,
            )
            self.record = replace(self.record, calibration=calibration)
        self.progress("evaluating the converted model", 0.0)
        zero_shot = self._evaluate(logits_of(self.model), 0, original)
        chains = chain_states(self.model)
        found = replace(self.record, original=first, evaluations=(zero_shot,), chains=chains)
        self.record = world.gathered(found)[0]
        self._take_up_gammas()  # on other GPUs, another choice may have been made
        self._write()  # first: from here on, whatever happens, the folder is this run's
        self._keep_held_out()

    def train(self, arguments: dict[str, Any], callbacks: tuple[Any, ...], resume: bool) -> None:
        """All steps, or those that are left.

        Raises:
            TrainingError: it had to stop; what was saved stays.
        """
        recipe = self.record.recipe
        interrupt = StopWhenAsked()
        config: Any = self.found.model.config
        caches = config.use_cache
        together = [Agreeing()] if world.size() > 1 else []
        optimizer = Optimizer.parse(recipe.optimizer)
        optim, made = trainer_options(optimizer, recipe.learning_rate)
        fine_tuner: Any = FineTuner
        if recipe.shard == "fsdp":
            blocks = [self.found.model.get_submodule(path) for path in self.found.blocks.paths]
            fine_tuner = partial(ShardedFineTuner, blocks=blocks)
        trainer: FineTuner
        self.trainer = trainer = fine_tuner(
            model=self.model,
            args=TrainingArguments(
                output_dir=str(self.folder),
                max_steps=recipe.steps,
                per_device_train_batch_size=recipe.batch,
                gradient_accumulation_steps=recipe.accumulate,
                learning_rate=recipe.learning_rate,
                seed=recipe.seed,
                data_seed=recipe.seed,
                bf16=recipe.dtype == "bf16",
                optim=optim,
                logging_steps=1,
                logging_nan_inf_filter=False,
                eval_strategy="steps",
                save_strategy="steps",
                remove_unused_columns=False,
                include_num_input_tokens_seen="all",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
                **arguments,
            ),
            train_dataset=self.found.texts.training,
            eval_dataset=self.found.texts.validation,
            data_collator=self.found.texts.collator,
            optimizer_cls_and_kwargs=made,
            callbacks=[*together, Told(self.progress, self._save), interrupt, *callbacks],
            teacher=self.teacher,
            weight=recipe.distill_weight,
            examine=lambda step: self._evaluate(logits_of(self.model), step),
            spec=self.record.method.spec,
            run=self.record.run,
            updates=optimizer,
        )
        beside = () if self.teacher is None or not self.teacher.own_bytes else tuple(self.teacher.model.parameters())
        trainer.remove_callback(PrinterCallback)  # `Told` says it in words
        schedule = self._schedule()
        watching = ReversibleCallback(schedule, beside)
        watching.attach(trainer)
        checkpoint = last_checkpoint(self.folder, self.record.run) if resume else None
        saved = {*range(0, recipe.steps, arguments["save_steps"]), recipe.steps}
        done = 0 if checkpoint is None else step_of(checkpoint)
        check_room(self.folder, self.record.run, sorted(step for step in saved if step > done))
        if checkpoint is not None:
            if self.record.method.fraction_bits is None:
                trainer.take_up_grids(checkpoint)
            if step_of(checkpoint) >= recipe.steps:  # stopped after training
                trainer.take_up_end(checkpoint)
                if schedule is not None:
                    recouple(self.model, gamma=float(schedule.gamma(recipe.steps - 1)))
                return
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except FixedPointRangeError as error:
            raise TrainingError(
                f"step {trainer.state.global_step + 1}: {error}. {trainer.last_good()} {GENTLER}"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"step {trainer.state.global_step + 1} found no memory. {trainer.last_good()} A new run with a smaller "
                "`batch` and more `accumulate`, a shorter `sequence`, `lora_rank` or loss=chunked needs less"
            ) from error
        finally:
            config.use_cache = caches  # which the Trainer switched off, for whoever saves the model
            interrupt.release()
            watching.release()
        how_far = f"after step {trainer.state.global_step} of {recipe.steps}. {trainer.last_good()} Go on with `resume`"
        if interrupt.asked == signal.SIGTERM:
            raise Terminated(f"ended by SIGTERM {how_far}")
        if trainer.state.global_step < recipe.steps:
            raise TrainingError(f"interrupted {how_far}")

    def finish(self) -> FineTuning:
        """The final evaluations, and the model as a folder."""
        assert self.trainer is not None
        self._save()
        steps = self.record.recipe.steps
        self.trainer.optimizer = self.trainer.lr_scheduler = None  # frees its state before a second model comes
        self.progress("evaluating the trained model", 1.0)
        original = self._original()
        final = self._evaluate(logits_of(self.model), steps, original)
        vanilla = self._evaluate(vanilla_logits(self.model), steps) if self.record.chains else final
        kept = tuple(e for e in self.record.evaluations if e.step < steps)
        found = replace(self.record, evaluations=(*kept, final), vanilla=vanilla, complete=True)
        self.record = world.gathered(found)[0]
        self._write_all()
        return self.record

    # --

    def _write_all(self) -> None:
        """The model, and last the record, which says that it is there."""
        trainer = self.trainer
        assert trainer is not None
        part = part_of(self.folder) / "model"
        try:
            world.first(lambda: clear_parts(self.folder))
            world.each(lambda: trainer.save_model(str(part)))  # all, where each has but a part of the weights
            world.first(lambda: self._complete(part))
        except Exception as error:  # safetensors and the system each have their own for a full disk
            why = message_of(error)
            raise TrainingError(
                f"the trained model could not be written to {self.folder} ({why}). {trainer.last_good()} Free "
                "some space, and go on with `resume`"
            ) from error
        finally:
            if world.rank() == 0:
                clear_parts(self.folder)
        world.first(self._put_away)

    def _complete(self, part: Path) -> None:
        """The model that lies in the parts is moved to its place, with what belongs to it."""
        assert self.trainer is not None
        self.found.tokenizer.save_pretrained(part)
        for name in ("README.md", "training_args.bin"):  # PEFT's empty model card; `run.json` says more
            (part / name).unlink(missing_ok=True)
        shutil.copy(self.folder / HELD_OUT, part)
        move_in(self.folder, self.trainer.mark(part))

    def _put_away(self) -> None:
        """Not before the record says that nobody needs them, the checkpoints."""
        self.record.write(self.folder / FILE)
        for checkpoint in checkpoints_of(self.folder, self.record.run):
            discard(checkpoint)

    def _save(self) -> None:
        """The record, with what the trainer has logged so far."""
        assert self.trainer is not None
        history = self.trainer.state.log_history
        logged = tuple(Logged.from_history(row) for row in history if "loss" in row)
        found = {row["step"]: row for row in history if "eval_loss" in row}
        later = tuple(
            Evaluation(step, row["eval_loss"], row.get("eval_standard_error")) for step, row in sorted(found.items())
        )
        first = tuple(e for e in self.record.evaluations if e.step == 0)
        self.record = replace(self.record, logged=logged, evaluations=(*first, *later), chains=chain_states(self.model))
        self._write()

    def _write(self) -> None:
        if world.rank() == 0:
            self.record.write(self.folder / FILE)

    def _keep_held_out(self) -> None:
        if world.rank() == 0:
            write_whole(self.folder / HELD_OUT, self.found.texts.validation.to_json())

    def _take_up_gammas(self) -> None:
        """Those that were calibrated."""
        gammas = {
            p: g
            for chain in self.record.chains
            if chain.gamma
            for p, g in zip(self._paths(chain), chain.gamma, strict=True)
        }
        if gammas and self.record.calibration is not None:
            recouple(self.model, gamma=gammas)

    def _evaluate(self, logits: Any, step: int, original: Any = None) -> Evaluation:
        texts = self.found.texts
        return evaluate(logits, texts.validation, texts.collator, step, original)

    def _original(self) -> Any:
        """The logits of the model before training: from the teacher, from below the adapters, or loaded anew."""
        if self.teacher is not None:
            return self.teacher.logits
        if self.record.recipe.trains == "lora":
            return Teacher.within(self.model).logits
        if self.record.recipe.trains == "scratch":
            return None
        self.progress("loading the original model once more", 1.0)

        source, trusted = self.found.info.source, self.found.trust_remote_code
        loaded = load_model(source, torch.float32, 1, None, trust_remote_code=trusted)
        return Teacher.within(loaded.model.to(next(self.model.parameters()).device)).logits

    def _schedule(self) -> Schedule | None:
        recipe = self.record.recipe
        if recipe.schedule is None:
            return None
        start = Fraction(self.record.method.gamma_of("") or 0)
        blocks = max(len(chain.couplings) for chain in chains_of(self.model))
        return Schedule(recipe.schedule, recipe.schedule_steps, blocks, abs(start))

    def _paths(self, state: ChainState) -> list[str]:
        return next(chain.paths for chain in chains_of(self.model) if chain.name == state.name)


def chain_states(model: nn.Module) -> tuple[ChainState, ...]:
    """The numbers of a converted model's chains as they are."""
    return tuple(
        ChainState(
            name=chain.name,
            gamma=tuple(float(c.gamma) for c in chain.couplings if isinstance(c, Velocity)),
            c=tuple(c.c for c in chain.couplings if isinstance(c, Velocity)),
            side_bits=tuple(c.side_bits for c in chain.couplings),
            fraction_bits=chain.arithmetic.fraction_bits if isinstance(chain.arithmetic, FixedPoint) else None,
        )
        for chain in chains_of(model)
    )
