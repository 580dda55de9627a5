"""One training step, as it is measured: forward with its loss, backward, optimiser, each by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autorev.capture.quantised import held_by
from autorev.integrations.optimizers import make_optimizer
from autorev.prediction.training import DTYPES, own_loss
from autorev.profiler.readings import PHASES

if TYPE_CHECKING:
    from autorev.workload import Call

LEARNING_RATE = 1e-5
"""Small: what is measured is a step, and the model should stay what it is."""


@dataclass(eq=False)
class TrainingStep:
    """A model, a call of it, and an optimiser; `run` takes one step."""

    model: nn.Module
    call: Call
    optimizer: torch.optim.Optimizer
    autocast: str | None = None
    """What the forward pass computes in, where that is not the weights' dtype."""

    def run(self, phase: Callable[[str], Any] = lambda name: nullcontext(), update: bool = True) -> float:
        """One step from no gradients; each phase runs inside `phase(name)`. Returns the loss."""
        autocast = torch.autocast(self.device.type, DTYPES.get(self.autocast or ""), enabled=self.autocast is not None)
        with phase("forward"), autocast:
            loss = own_loss(self.model, self.call)
        with phase("backward"):
            loss.backward()
        value = float(loss.detach())
        del loss
        if update:
            with phase("optimizer"):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def timed(self) -> dict[str, float]:
        """Seconds of each phase of one step."""
        seconds: dict[str, float] = {}

        @contextmanager
        def clock(name: str) -> Iterator[None]:
            synchronize(self.device)
            began = time.perf_counter()
            yield
            synchronize(self.device)
            seconds[name] = time.perf_counter() - began

        self.run(clock)
        return {name: seconds[name] for name in PHASES}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def standing(self) -> list[torch.Tensor]:
        """What is alive before a step begins: parameters, buffers, inputs, optimiser state."""
        state = [t for held in self.optimizer.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
        return [*held_by(self.model), *tensors_of(self.call), *state]


def optimizer_for(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """The optimiser of that spelling, of the parameters that train."""
    return make_optimizer(model, name, LEARNING_RATE)


def tensors_of(structure: Any) -> list[torch.Tensor]:
    """Every tensor in a nested structure."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor)]


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
