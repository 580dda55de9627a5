"""One training step of a model, and how far two steps' gradients are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autorev.engine.mode import running

Gradients = dict[str, torch.Tensor | None]


def loss_of(returned: Any) -> torch.Tensor:
    """The loss of a `transformers` output, else a scalar that depends on every number of the tensor returned."""
    if isinstance(returned, torch.Tensor):
        return returned.float().square().mean()
    loss: torch.Tensor = returned.loss
    return loss


def gradients_of(model: nn.Module) -> Gradients:
    """A copy of every parameter's gradient by the parameter's name."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def one_step(
    model: nn.Module, *args: Any, mode: str = "reversible", loss: Any = loss_of, **kwargs: Any
) -> tuple[torch.Tensor, Gradients]:
    """(loss, gradients) of one forward and backward with the same random numbers each time."""
    model.zero_grad()
    with torch.random.fork_rng(), running(mode):
        torch.manual_seed(1)
        value = loss(model(*args, **kwargs))
        value.backward()
    return value.detach(), gradients_of(model)


def gap(found: Gradients, expected: Gradients) -> float:
    """The largest relative difference of a parameter's gradient, in the Euclidean norm.

    A gradient that is zero but for rounding (a key's bias) is measured by the largest of the others.
    """
    assert list(found) == list(expected)
    lacking = [name for name in found if (found[name] is None) != (expected[name] is None)]
    assert not lacking, f"a gradient on one side only: {lacking}"
    pairs = [(a.double(), b.double()) for a, b in zip(found.values(), expected.values(), strict=True) if a is not None]
    assert pairs, "no gradient at all"
    largest = max(float(b.norm()) for _, b in pairs)
    assert largest > 0, "all gradients are zero"
    return max(float((a - b).norm()) / max(float(b.norm()), 1e-6 * largest) for a, b in pairs)
