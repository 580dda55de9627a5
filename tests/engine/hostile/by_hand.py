"""The oracle of these tests: the original code under the coupling's equations, by ordinary autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

Results = dict[str, torch.Tensor]

LEAPFROG = {"method": "leapfrog"}
"""gamma = c = 1: v = v + f(h), h = h + v."""


class Leapfrog:
    """The state of a chain: `x = step(out)` in the place of `x = out`, where `out` is x + f(x)."""

    def __init__(self) -> None:
        self.velocity: torch.Tensor | None = None

    def step(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x + v', with v' = v + (out - x)."""
        change = out - x
        self.velocity = change if self.velocity is None else self.velocity + change
        return x + self.velocity


def run_blocks(blocks: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Block modules under leapfrog."""
    state = Leapfrog()
    for block in blocks:
        x = state.step(x, block(x))
    return x


def results_of(model: nn.Module, forward: Callable[[], torch.Tensor]) -> Results:
    """The loss of what `forward` returns and all gradients."""
    model.zero_grad(set_to_none=True)
    loss = forward().square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_close(found: Results, expected: Results, tolerance: float = 2e-5) -> None:
    """Relative errors in norm, on the largest gradient for those that are next to nothing."""
    assert found.keys() == expected.keys()
    largest = max(float(t.norm()) for t in expected.values())
    assert largest > 0
    for name, right in expected.items():
        error = float((found[name].double() - right.double()).norm())
        assert error <= tolerance * max(float(right.norm()), 0.01 * largest), (name, error, float(right.norm()))
