"""For `transformers.Trainer` and everything built on it: gamma's schedule, and memory, speed and drift in its logs.

callback = ReversibleCallback(schedule=Schedule("leapfrog", steps=200, blocks=30))  # or plan=autorev.fit(...)
trainer = Trainer(model, args, train_dataset=dataset)
callback.attach(trainer)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from autorev.capture.quantised import held_by
from autorev.conversion.convert import chains_of, convert, drift
from autorev.conversion.recouple import recouple
from autorev.conversion.references import match_references
from autorev.conversion.schedule import Schedule
from autorev.couplings.velocity import Velocity
from autorev.engine.chain import ReversibleChain
from autorev.errors import ConversionError
from autorev.plan import Plan
from autorev.profiler.passes.watch import PeakWatch

_WARM = 1
"""Steps before memory is looked at: the first one makes the optimiser's state."""


class ReversibleCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Adds to every log entry with a loss: `seconds`, `tokens` (where the Trainer counts them,
    `include_num_input_tokens_seen`), `gamma` and `side_bits` (means over the chains' steps), `drift`, and `peak_bytes`
    of the latest step since the entry before in which memory was looked at: on a GPU in all of them; on a CPU, where
    looking slows a step, in the second one and in the first after each move of gamma.
    """

    def __init__(
        self, schedule: Schedule | None = None, beside: tuple[torch.Tensor, ...] = (), plan: Plan | None = None
    ) -> None:
        """`beside`: tensors that live beside the model, such as a teacher's, and count for its peak; `plan`: of
        `autorev.fit`, put in place when the trainer is made, or when the callback is attached to it.
        """
        self.schedule = schedule
        self.plan = plan
        self.beside = beside
        self._now: dict[str, Any] = {}
        self._began = 0.0
        self._tokens = 0
        self._taken = 0
        self._looked_at: Any = None
        self._watch: PeakWatch | None = None

    def attach(self, trainer: Trainer) -> None:
        """Before the callbacks that report (W&B, TensorBoard), so that they see these figures too.

        A reference model that the trainer holds beside a converted policy (`trl`'s DPO, GRPO, ...) is converted alike.

        Raises:
            ConversionError: it cannot be, or the plan cannot be put in place.
        """
        self._put_in_place(trainer.args, trainer.model)
        match_references(trainer)
        trainer.callback_handler.callbacks.insert(0, self)

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The trainer is made."""
        self._put_in_place(args, model)

    def _put_in_place(self, args: Any, model: Any) -> None:
        if self.plan is None:
            return
        if any(getattr(args, f"{which}_checkpointing", None) for which in ("gradient", "activation")):
            raise ConversionError(
                "the plan says which blocks run twice, and the trainer's own checkpointing would run all of them once "
                "more; leave it out of its arguments"
            )
        convert(model, self.plan)
        planned, batch = self.plan.setting.batch, args.per_device_train_batch_size
        self.plan = None
        if batch > planned:
            logging.getLogger("autorev").warning(
                "the plan is for a batch of %d, and the trainer takes %d: a step will need more memory than it says",
                *(planned, batch),
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing of an earlier run counts for this one."""
        self._taken, self._tokens, self._looked_at = 0, int(state.num_input_tokens_seen), None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move gamma; begin to measure."""
        if self.schedule is not None:
            gamma = self.schedule.gamma(state.global_step)
            if any(g.gamma != gamma for chain in chains_of(model) for g in _velocities(chain)):
                recouple(model, gamma=float(gamma))
        device = next(model.parameters()).device
        stage = [c for chain in chains_of(model) for c in chain.couplings]
        if self._taken >= _WARM and (device.type == "cuda" or stage != self._looked_at):
            self._looked_at = stage
            self._watch = PeakWatch(device)
            self._watch.begin([*held_by(model), *_state(kwargs.get("optimizer")), *self.beside])
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Read off what the step took."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        unlogged = {"peak_bytes": self._now["peak_bytes"]} if "peak_bytes" in self._now else {}
        self._now = {"seconds": time.perf_counter() - self._began, **unlogged}
        if self._watch is not None:
            self._now["peak_bytes"] = self._watch.end()
            self._watch = None
        seen = int(state.num_input_tokens_seen)
        if seen > self._tokens:
            self._now["tokens"] = seen - self._tokens
        self._tokens = seen
        self._taken += 1
        self._now |= chain_figures(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing is measured any more."""
        self.release()

    def release(self) -> None:
        """End what an exception in a step left running."""
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Put the figures of the last step beside its loss."""
        if isinstance(logs, dict) and "loss" in logs and self._now:
            logs.update(self._now)
            state.log_history[-1].update(self._now)
            self._now = {}


def chain_figures(model: nn.Module) -> dict[str, float]:
    """`gamma` and `side_bits` (means over steps) of a converted model, and its last `drift`; none for any other."""
    found: dict[str, float] = {}
    couplings = [coupling for chain in chains_of(model) for coupling in chain.couplings]
    if couplings:
        found["side_bits"] = sum(coupling.side_bits for coupling in couplings) / len(couplings)
        gammas = [float(coupling.gamma) for coupling in couplings if isinstance(coupling, Velocity)]
        if gammas:
            found["gamma"] = sum(gammas) / len(gammas)
    left = drift(model)
    return found | ({"drift": max(left.values())} if left else {})


def _velocities(chain: ReversibleChain) -> list[Velocity]:
    return [coupling for coupling in chain.couplings if isinstance(coupling, Velocity)]


def _state(optimizer: Any) -> list[torch.Tensor]:
    held = getattr(optimizer, "state", {}).values()  # torchao's, on a GPU, has none of its own
    return [t for state in held if isinstance(state, Mapping) for t in state.values() if isinstance(t, torch.Tensor)]
