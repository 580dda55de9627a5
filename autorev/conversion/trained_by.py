"""A converted model notices who trains it: a trainer may hold a reference model beside it, which is not converted.

Every trainer calls `model.train()` or `model.eval()` before it calls the model. That is when its attributes are looked
at, and what is found there is left to `autorev.conversion.references`. A reference it may just call: of one that is
converted, beside a policy that is not, the passes without gradients are looked at, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(eq=False)
class Train:
    """Stands in for the method `train` of one converted model, which `eval` calls, too."""

    model: nn.Module

    def __call__(self, mode: bool = True) -> Any:
        """As the method, and then a look at the trainer that called it."""
        result = type(self.model).train(self.model, mode)
        from autorev.conversion.references import match_references

        for owner in _callers():
            if match_references(owner, self.model):
                break
        return result


def notice_trainers(model: nn.Module) -> None:
    """Put the look in the method's place."""
    model.__dict__["train"] = Train(model)


@dataclass(eq=False)
class Passes:
    """Is called before each pass of a converted model: who runs a reference need not have called its `train` or `eval`.

    That happens without gradients. Looking takes part of a millisecond, so that it is done in the first of such passes,
    in the second, the fourth, the eighth, ...
    """

    count: int = 0

    def __call__(self) -> None:
        if torch.is_grad_enabled():
            return
        self.count += 1
        if self.count & (self.count - 1):
            return
        from autorev.conversion.references import tell_of_plain_policy

        for owner in _callers():
            tell_of_plain_policy(owner)


def stop_noticing(model: nn.Module) -> None:
    """Undo `notice_trainers`, in `model` and in models inside it (adapters wrap them)."""
    for module in model.modules():
        if isinstance(module.__dict__.get("train"), Train):
            del module.__dict__["train"]


def _callers() -> Iterator[Any]:
    """The objects whose methods are running, the innermost first; a model's own `train` is none of interest."""
    frame = sys._getframe(2)
    seen: list[int] = []
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if owner is not None and id(owner) not in seen:
                seen.append(id(owner))
                yield owner
        frame = frame.f_back  # type: ignore[assignment]  # None at the outermost one
