"""`gradient_checkpointing_enable()` on a converted `transformers` model: explained, and not done twice.

A checkpoint around a reversible block would store its input, which the chain rebuilds anyway, and run it once more.
Trainers switch checkpointing on by an argument, so it is no error: the converted blocks leave it off and say so.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from autorev.integrations.transformers import CHECKPOINTING_METHODS, is_checkpointed, stop_checkpointing
from autorev.rewrite.block_forward import ReversibleForward
from autorev.rewrite.replacement import HANDLE

SWITCH_OFF = (
    "call model.gradient_checkpointing_disable() (it is PEFT's prepare_model_for_kbit_training that switches it on, "
    "unless it is given use_gradient_checkpointing=False)"
)


@dataclass(eq=False)
class CheckpointingEnable:
    """Stands in for the method of one `PreTrainedModel`."""

    model: nn.Module
    method: str
    told: bool = False
    """Trainers that switch checkpointing off for an evaluation switch it on again in every step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Switch checkpointing on in what is not reversible."""
        result = getattr(type(self.model), self.method)(self.model, *args, **kwargs)
        left_off = []
        for name, module in self.model.named_modules():
            reversible = any(isinstance(r, ReversibleForward) for r in module.__dict__.get(HANDLE, ()))
            if reversible and is_checkpointed(module):
                stop_checkpointing(module)
                left_off.append(name)
        if left_off and not self.told:
            self.told = True
            logging.getLogger("autorev").warning(
                "gradient checkpointing stays off for the %d reversible blocks %s to %s: they keep no activations that "
                "it could save; autorev.revert(model) first if you want checkpointing instead",
                len(left_off),
                left_off[0],
                left_off[-1],
            )
        return result


def checkpoints_itself(model: nn.Module) -> bool:
    """Is checkpointing switched on somewhere in the model?"""
    return any(map(is_checkpointed, model.modules()))


def intercept_checkpointing_enable(model: nn.Module) -> None:
    """Put `CheckpointingEnable` in the method's place, in `model` and in models inside it (adapters wrap them)."""
    for module, method in _pretrained(model):
        module.__dict__[method] = CheckpointingEnable(module, method)


def restore_checkpointing_enable(model: nn.Module) -> None:
    """Undo `intercept_checkpointing_enable`."""
    for module, method in _pretrained(model):
        if isinstance(module.__dict__.get(method), CheckpointingEnable):
            del module.__dict__[method]


def _pretrained(model: nn.Module) -> list[tuple[nn.Module, str]]:
    pairs = ((module, method) for module in model.modules() for method in CHECKPOINTING_METHODS)
    return [(module, method) for module, method in pairs if callable(getattr(type(module), method, None))]
