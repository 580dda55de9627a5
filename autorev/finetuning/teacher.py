"""The original model, for comparison while another one is made of it: to be distilled from, and to be measured against.

With adapters the base model is the original, and no second copy is needed; otherwise one is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from autorev.engine.eval_mode import eval_mode
from autorev.engine.mode import ORIGINAL, running
from autorev.finetuning.data import IGNORED
from autorev.integrations.peft import adapters_off


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model whose logits are the original's."""

    model: nn.Module
    own_bytes: int
    """Of a copy that is held for this alone; 0 where the trained model's own base serves."""

    @classmethod
    def within(cls, model: nn.Module) -> Teacher:
        """The original inside `model`: its vanilla blocks, without adapters."""
        return cls(model, 0)

    @classmethod
    def copied(cls, model: nn.Module) -> Teacher:
        """A frozen copy of `model`, made before it is converted or trained."""
        twin = copy.deepcopy(model).eval().requires_grad_(False)
        tensors = {id(t): t for t in [*twin.parameters(), *twin.buffers()]}
        return cls(twin, sum(t.numel() * t.element_size() for t in tensors.values()))

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[batch, tokens, vocabulary], without gradients."""
        device = next(self.model.parameters()).device
        with torch.no_grad(), as_original(self.model):
            found: torch.Tensor = self.model(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False).logits
        return found


@contextmanager
def as_original(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model` is in eval mode, runs its vanilla blocks, and its adapters are off."""
    with ExitStack() as stack:
        stack.enter_context(running(ORIGINAL))
        stack.enter_context(eval_mode(model))
        stack.enter_context(adapters_off(model))
        yield


def shifted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] and labels [n] of the positions that are learned: each predicts the token after it."""
    labels = labels[:, 1:]
    learned = labels != IGNORED
    return logits[:, :-1][learned], labels[learned]


def divergence(original: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """KL(original, model) in nats, summed over the positions of logits [n, vocabulary]; differentiable in `model`."""
    target = F.log_softmax(original.float(), -1)
    return F.kl_div(F.log_softmax(model.float(), -1), target, reduction="sum", log_target=True)
