"""The two-stream additive family: each step adds a function of one stream to the other, and they change places.

    forward    q <- q + F(p)                   inverse    p <- p - G(q)
               p <- p + G(q)                              q <- q - F(p)           q_0 = p_0 = the chain's input

    name          steps                 read-out        source
    hamiltonian   attention, MLP        p               Reversing Large Language Models, arXiv 2512.02056, eq. 2.8-2.9
    revnet        any number a block    (q + p) / 2     RevNet, Gomez et al. 2017, arXiv 1707.04585;
                                                        Reformer, Kitaev et al. 2020, arXiv 2001.04451

In the terms of `Coupling`: x is the stream that the branch reads and p the one that it is added to; afterwards the sum
is what the next branch reads, so (x, p) -> (p + f(x), x).

Function. Not preserved: each stream receives only half of the branches.
Error growth. 1 per layer, as no step divides; side bits: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autorev.couplings.arithmetic import Arithmetic
from autorev.couplings.coupling import Coupling, Gradient, State


@dataclass(frozen=True)
class Additive(Coupling):
    """One step of one branch."""

    def initial_state(self, stream: torch.Tensor) -> State:
        """q_0 = p_0."""
        return State(stream, stream.clone())

    def first_partner(self, stream: torch.Tensor) -> torch.Tensor | None:
        """The same input."""
        return stream

    def initial_residual(self, state: State) -> torch.Tensor:
        """p - q."""
        return state.stream - state.partner

    def step(self, state: State, out: torch.Tensor, value: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor | None:
        """(x, p) -> (p + f(x), x)."""
        total = arithmetic.add_branch(state.partner, out, value, 1.0)
        state.stream, state.partner = total, state.stream
        return None

    def recover_input(self, state: State, arithmetic: Arithmetic) -> None:
        """The branch's input is the partner, as it stands."""
        state.stream, state.partner = state.partner, state.stream

    def recover_output(self, state: State, arithmetic: Arithmetic) -> None:
        """They change places again."""
        self.recover_input(state, arithmetic)

    def recover_partner(
        self,
        state: State,
        out: torch.Tensor,
        value: torch.Tensor,
        side: torch.Tensor | None,
        arithmetic: Arithmetic,
    ) -> None:
        """p = p' - f(x)."""
        state.partner = arithmetic.subtract_branch(state.partner, out, value, 1.0)

    def vjp(self, grad_stream: Gradient, grad_partner: Gradient) -> tuple[Gradient, Gradient, Gradient]:
        """dp = dout = the sum's gradient; dx is its own less what `out` carries of x besides f."""
        if grad_stream is None:
            return grad_partner, None, None
        return (-grad_stream if grad_partner is None else grad_partner - grad_stream), grad_stream, grad_stream

    def equations(
        self, stream: torch.Tensor, partner: torch.Tensor | None, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The equations, written down."""
        return (stream if partner is None else partner) + (out - stream), stream
