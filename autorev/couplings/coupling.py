"""What every coupling is: a state of two streams, and a step that can be undone once its branch is known again.

    step               (x, p), f(x)  ->  (x', p')      forward
    recover_input      (x', p')      ->  x             the branch's input, before the branch has run again
    recover_partner    x, f(x)       ->  p             with the branch's output, the rest of the state before

The two halves of the inverse are apart because `recover_input` needs no branch: one evaluation of f in backward then
serves both the reconstruction and the gradient.
`vjp` is the same step as autograd sees it, a linear map that needs none of the values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from autorev.couplings.arithmetic import Arithmetic
from autorev.couplings.fused import Stepped

Gradient = torch.Tensor | None


@dataclass(eq=False)
class State:
    """A chain's two streams in their arithmetic: int32 grid points, or floats; in the shape of the model's stream."""

    stream: torch.Tensor
    """x: what the next branch reads, and what the model's own loop carries from block to block."""
    partner: torch.Tensor
    """p: the velocity, or the other stream."""

    def clone(self) -> State:
        """A state of its own."""
        return State(self.stream.clone(), self.partner.clone())


class Coupling(ABC):
    """One step of a reversible chain; immutable, so that any number of calls may share it."""

    @property
    def side_bits(self) -> int:
        """Bits per element that a step must keep besides the state, in exact arithmetic."""
        return 0

    @property
    def invertible(self) -> bool:
        """False for the residual step itself, whose activations have to be stored."""
        return True

    @property
    def growth(self) -> float:
        """Factor by which undoing a step enlarges a rounding error of the state."""
        return 1.0

    @property
    def random(self) -> bool:
        """Is it drawn anew for each forward pass in training?"""
        return False

    def sample(self, training: bool, seed: int) -> Coupling:
        """The coupling of one call; another than this where it is random. `seed`: any integer, the same for a forward
        pass that is run again."""
        return self

    def first_partner(self, stream: torch.Tensor) -> torch.Tensor | None:
        """The input of the chain that its first partner has its gradient from; None for a constant."""
        return None

    @property
    def multiplier(self) -> int:
        """What a step multiplies the partner with; the product has to fit into an int32."""
        return 1

    @abstractmethod
    def initial_state(self, stream: torch.Tensor) -> State:
        """The chain's first state."""

    @abstractmethod
    def initial_residual(self, state: State) -> torch.Tensor:
        """What is zero in the first state, and so again after a whole backward pass: the integrity check."""

    def max_abs(self, state: State) -> float:
        """The largest value that the grid has to hold for this state and the next step."""
        partner = float(state.partner.abs().max()) * abs(self.multiplier)
        return max(float(state.stream.abs().max()), partner / 2)

    @abstractmethod
    def step(self, state: State, out: torch.Tensor, value: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor | None:
        """Take the step whose branch gave `out = value + f(value)`; returns the packed side bits, if any."""

    def fused_step(
        self, state: State, out: torch.Tensor, value: torch.Tensor, arithmetic: Arithmetic
    ) -> Stepped | None:
        """`step` in one pass over the state; None, and nothing done, where there is no such thing."""
        return None

    @abstractmethod
    def recover_input(self, state: State, arithmetic: Arithmetic) -> None:
        """Make `state.stream` the input of the last step's branch again."""

    @abstractmethod
    def recover_output(self, state: State, arithmetic: Arithmetic) -> None:
        """Undo `recover_input`."""

    @abstractmethod
    def recover_partner(
        self,
        state: State,
        out: torch.Tensor,
        value: torch.Tensor,
        side: torch.Tensor | None,
        arithmetic: Arithmetic,
    ) -> None:
        """Undo the rest of the step whose input was recovered."""

    @abstractmethod
    def vjp(self, grad_stream: Gradient, grad_partner: Gradient) -> tuple[Gradient, Gradient, Gradient]:
        """Gradients of (x', p') -> gradients of (x, p, out), where `out = x + f(x)` is an input of its own."""

    @abstractmethod
    def equations(
        self, stream: torch.Tensor, partner: torch.Tensor | None, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x', p') by ordinary differentiable operations: the oracle. `partner` is None in the first state."""
