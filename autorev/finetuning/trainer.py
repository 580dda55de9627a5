"""`transformers.Trainer` with what a fine-tuning needs besides: distillation, one way to evaluate, safe checkpoints."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from autorev.conversion.convert import chains_of
from autorev.couplings.arithmetic import FixedPoint
from autorev.errors import FixedPointRangeError, TrainingError, message_of
from autorev.finetuning import world
from autorev.finetuning.agreeing import grids
from autorev.finetuning.checkpoints import checkpoints_of, clear_parts, part_of, put_in_place
from autorev.finetuning.evaluate import evaluate, logits_of
from autorev.finetuning.record import Evaluation
from autorev.finetuning.teacher import Teacher, divergence, shifted
from autorev.intact import Mark, read_mark, stored
from autorev.integrations.optimizers import step_in_backward
from autorev.integrations.peft import has_adapters
from autorev.models.weights import check_adapters, take_up_weights
from autorev.optimizers import Optimizer

GENTLER = "Lower the learning rate, or clip gradients"
"""What to do about numbers that grow."""


class FineTuner(Trainer):  # type: ignore[misc]  # transformers is untyped
    """`teacher`: to be distilled from, with `weight`; `examine(step)`: the evaluation; `spec`: of the coupling; `run`:
    whose checkpoints they are; `updates`: how the optimiser runs."""

    control: Any

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | None,
        weight: float,
        examine: Callable[[int], Evaluation],
        spec: str,
        run: str,
        updates: Optimizer,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self.weight = weight
        self.examine = examine
        self.spec = spec
        self.run = run
        self.updates = updates
        self._parts: dict[str, float] = {}
        if teacher is not None:
            self.loss_is_scaled_for_ga = True

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The library's, which steps in backward where that is asked for.

        Raises:
            SettingError: several GPUs train, whose gradients would have to be averaged first.
        """
        self.updates.check_step(processes=self.args.world_size * max(self.args.n_gpu, 1))
        new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if new and self.updates.step == "backward":
            step_in_backward(optimizer, self.model if model is None else model)
        return optimizer

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """None where every gradient is gone by now: the Trainer's own would be 0."""
        return None if self.updates.frees_gradients else super()._get_grad_norm(model, grad_norm)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss; one that is no number ends the run before it reaches the weights."""
        found = self._loss(*args, **kwargs)
        loss = (found[0] if isinstance(found, tuple) else found).detach()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of step {self.state.global_step + 1} is {float(loss)}, no number; the weights are those of "
                f"the step before. {self.last_good()} {GENTLER}"
            )
        return found

    def _loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; with a teacher, (1 - w) x cross entropy + w x KL(teacher, model) a learned token."""
        if self.teacher is None:
            return super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        theirs, _ = shifted(self.teacher.logits(batch), inputs["labels"])
        outputs = model(**batch, use_cache=False)
        ours, wanted = shifted(outputs.logits, inputs["labels"])
        # Without the count of the whole accumulated batch, each of its parts weighs the same. Processes are averaged.
        share = (
            wanted.numel() * self.args.gradient_accumulation_steps
            if num_items_in_batch is None
            else num_items_in_batch / self.args.world_size
        )
        text = F.cross_entropy(ours.float(), wanted, reduction="sum") / share
        distance = divergence(theirs, ours) / share
        for name, part in (("cross_entropy", text), ("divergence", distance)):
            self._parts[name] = self._parts.get(name, 0.0) + float(part.detach())
        loss = (1 - self.weight) * text + self.weight * distance
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Beside a step's loss, the parts that it is made of."""
        if "loss" in logs and self._parts:
            parts = world.gathered(self._parts)
            logs = {**logs, **{name: sum(part[name] for part in parts) / len(parts) for name in self._parts}}
            self._parts = {}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """On the held-out rows, token by token, as every evaluation of a run."""
        found = self._sound(lambda: self.examine(self.state.global_step))
        metrics = {"eval_loss": found.loss, "eval_standard_error": found.standard_error}
        self.log({name: value for name, value in metrics.items() if value is not None})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return {"eval_loss": found.loss}

    # -- checkpoints

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder, step = Path(self.args.output_dir), self.state.global_step
        written = part_of(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        row = self.eval_dataset.first(1)
        self._sound(lambda: evaluate(logits_of(self.model), row, self.data_collator, step))
        try:
            world.first(lambda: clear_parts(folder))
            world.each(lambda: super(FineTuner, self)._save_checkpoint(*args, **kwargs))
            world.first(lambda: put_in_place(folder, self.mark(written)))
        except TrainingError:
            raise
        except Exception as error:  # safetensors, torch and the system each have their own for a full disk
            why = message_of(error)
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {folder} ({why}). {self.last_good()} Free some "
                "space, and go on with `resume`"
            ) from error
        finally:
            if world.rank() == 0:
                clear_parts(folder)

    def mark(self, written: Path) -> Mark:
        """Of the weights that were written to a folder, which are those of the present step."""
        return Mark(self.run, self.state.global_step, stored(written), self.spec, grids(self.model))

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer writes: aside, until it is whole."""
        return str(part_of(Path(self.args.output_dir)))

    def _sound(self, examine: Callable[[], Evaluation]) -> Evaluation:
        """A step may break the weights while its own loss is a number still: nobody can go on from those."""
        try:
            found = examine()
            why = "" if isfinite(found.loss) else "the loss on the held-out text is no number"
        except FixedPointRangeError as error:
            why = str(error)
        if why:
            raise TrainingError(f"step {self.state.global_step} broke the weights: {why}. {self.last_good()} {GENTLER}")
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Every weight, or an error: the Trainer's own goes on with those of the start where names do not match."""
        into = self.model if model is None else model
        if has_adapters(into):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            check_adapters(into, resume_from_checkpoint)
        else:
            take_up_weights(into, resume_from_checkpoint)

    def take_up_grids(self, checkpoint: Path) -> None:
        """A grid that was coarsened in training goes on as it was."""
        mark = read_mark(checkpoint)
        for chain in chains_of(self.model):
            if mark is not None and chain.name in mark.grids:
                chain.begin_on(FixedPoint(mark.grids[chain.name]))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The schedule goes on where it was, with the learning rate that this run was given."""
        if checkpoint is not None:
            self._load_states(checkpoint)
        scheduler, rate = self.lr_scheduler, self.args.learning_rate
        if checkpoint is None or not hasattr(scheduler, "base_lrs"):
            return
        for group, before in zip(self.optimizer.param_groups, scheduler.base_lrs, strict=True):
            if before != rate:
                group["initial_lr"] = rate
                group["lr"] *= rate / before
        scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_states(self, checkpoint: str) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)

    def take_up_end(self, checkpoint: Path) -> None:
        """The weights and the log after the last step: the Trainer itself would take one more."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def last_good(self) -> str:
        """A sentence on the checkpoint that a run can go on from."""
        found = checkpoints_of(Path(self.args.output_dir), self.run)
        return f"The last good checkpoint is {found[-1]}." if found else "No checkpoint was written yet."


class StopWhenAsked(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """The first Ctrl-C or SIGTERM ends the run after the step at hand, with a checkpoint; the second one at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        """The signal."""
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen, where signals can be listened to: in the main thread."""

        def ask(number: int, frame: Any) -> None:
            self.asked = number
            self.release()

        with suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if asked to: all processes, if one of them is."""
        self.asked = max((asked for asked in world.gathered(self.asked) if asked is not None), default=None)
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As it was."""
        self.release()

    def release(self) -> None:
        """The signals mean again what they meant before."""
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before or signal.SIG_DFL)
