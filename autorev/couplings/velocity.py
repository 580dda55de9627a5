"""The velocity family: one stream h with a velocity v. Nearly every reversible residual network is one of these.

    forward    v' = gamma v + c f(h)           inverse    h = h' - v'
               h' = h + v'                                v = (v' - c f(h)) / gamma         v_0 = 0

    name          gamma    c           source
    leapfrog      1        h^2         Reversing Large Language Models, arXiv 2512.02056, eq. 2.6
    midpoint      -1       2 h         the same, eq. 2.4
    midpoint_a    -a       h           the same, eq. 3.6; a = +-1 + U(-1/2, 1/2), drawn once per block
    momentum      g        1 - g       Momentum Residual Networks, Sander et al. 2021, arXiv 2102.07870;
                                       by default c is 1 - g/2, and 1 at both ends of a chain: see presets.py
    bdia          -g       1 + g       BDIA, Zhang et al. 2024, arXiv 2407.09093; g = +-1/2, in eval mode 0
    residual      0        1           the network as it was: not invertible

(`p_{l+1} = a p_{l-1} + b p_l + c f(p_l)` with a + b = 1 is this with v = p_l - p_{l-1} and gamma = -a.)

Function. A pretrained network was trained with gamma = 0, c = 1; it is preserved as far as gamma is near 0.

Error growth. Undoing a step divides by gamma: 1/|gamma| per layer in floating point, which only |gamma| = 1 survives at
depth. In fixed point, gamma = n / 2^k loses the remainder of a division by 2^k, k side bits an element, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from autorev.couplings.arithmetic import Arithmetic, side_bits_of
from autorev.couplings.coupling import Coupling, Gradient, State
from autorev.couplings.fused import Stepped, fused_for


@dataclass(frozen=True)
class Velocity(Coupling):
    """One step with its two numbers."""

    gamma: Fraction
    c: float

    @property
    def side_bits(self) -> int:
        """k of gamma = n / 2^k."""
        return side_bits_of(self.gamma)

    @property
    def invertible(self) -> bool:
        """gamma is not 0."""
        return self.gamma != 0

    @property
    def growth(self) -> float:
        """1 / |gamma|."""
        return math.inf if self.gamma == 0 else 1 / abs(float(self.gamma))

    def initial_state(self, stream: torch.Tensor) -> State:
        """v_0 = 0."""
        return State(stream, torch.zeros_like(stream))

    @property
    def multiplier(self) -> int:
        """n of gamma = n / 2^k."""
        return self.gamma.numerator

    def initial_residual(self, state: State) -> torch.Tensor:
        """v."""
        return state.partner

    def step(self, state: State, out: torch.Tensor, value: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor | None:
        """v' = gamma v + c f; h' = h + v'."""
        if self.gamma == 0:
            velocity, side = state.partner.zero_(), None
        else:
            velocity, side = arithmetic.scale(state.partner, self.gamma)  # gamma v_BTD, and its remainder
        state.partner = arithmetic.add_branch(velocity, out, value, self.c)  # v'_BTD, int32 in exact arithmetic
        state.stream = arithmetic.add(state.stream, state.partner)  # h'_BTD
        return side

    def fused_step(
        self, state: State, out: torch.Tensor, value: torch.Tensor, arithmetic: Arithmetic
    ) -> Stepped | None:
        """The same, compiled."""
        fused = fused_for(arithmetic, self.gamma, state.stream, state.partner, out, value)
        return None if fused is None else fused.step(state.stream, state.partner, out, value, self.gamma, self.c)

    def recover_input(self, state: State, arithmetic: Arithmetic) -> None:
        """h = h' - v'."""
        state.stream = arithmetic.subtract(state.stream, state.partner)

    def recover_output(self, state: State, arithmetic: Arithmetic) -> None:
        """h' = h + v'."""
        state.stream = arithmetic.add(state.stream, state.partner)

    def recover_partner(
        self,
        state: State,
        out: torch.Tensor,
        value: torch.Tensor,
        side: torch.Tensor | None,
        arithmetic: Arithmetic,
    ) -> None:
        """v = (v' - c f) / gamma."""
        fused = fused_for(arithmetic, self.gamma, state.partner, out, value)
        if fused is not None:
            fused.back(state.partner, out, value, side, self.gamma, self.c)
            return
        # gamma v_BTD, without its remainder: what is taken off are the very integers of the forward pass.
        scaled = arithmetic.subtract_branch(state.partner, out, value, self.c)
        state.partner = arithmetic.unscale(scaled, self.gamma, side)  # v_BTD

    def vjp(self, grad_stream: Gradient, grad_partner: Gradient) -> tuple[Gradient, Gradient, Gradient]:
        """With w = dh' + dv': dout = c w, dv = gamma w, dh = dh' - c w; h also reaches the loss through `out`."""
        if grad_partner is None:
            assert grad_stream is not None
            total = grad_stream if grad_stream.dtype is torch.float64 else grad_stream.float()
        else:
            total = grad_partner if grad_stream is None else grad_partner + grad_stream
        grad_out = total if self.c == 1 else total * self.c
        grad_in = -grad_out if grad_stream is None else grad_stream - grad_out
        grad_velocity = total if self.gamma == 1 else total * float(self.gamma)
        return grad_in, grad_velocity, grad_out

    def equations(
        self, stream: torch.Tensor, partner: torch.Tensor | None, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The equations, written down."""
        velocity = self.c * (out - stream)
        if partner is not None:
            velocity = float(self.gamma) * partner + velocity
        return stream + velocity, velocity


@dataclass(frozen=True)
class Bdia(Velocity):
    """BDIA: in training gamma is +-1/2 with equal odds, drawn for each call of a block; in eval mode it is 0."""

    @property
    def random(self) -> bool:
        """In its sign."""
        return True

    def sample(self, training: bool, seed: int) -> Coupling:
        """The coupling of one call."""
        if not training:
            return Velocity(Fraction(0), 1.0)
        sign = 2 * (seed & 1) - 1
        return Velocity(sign * self.gamma, 1 - float(sign * self.gamma))


def compensated(gammas: Sequence[Fraction]) -> list[float]:
    """A c for each step of a chain whose gammas differ, such that a pretrained network stays nearest to itself.

    A branch adds c f at once, and c f S over all the layers to come, S_j = 1 + gamma_{j+1} S_{j+1}. With c = 1 it is
    f for the next block, with c = 1 / S it is f in the end; as in `presets.py`, the middle is best: c = 2 / (1 + S).
    On SmolLM2-135M that is a tenth of a nat better at gamma = 1/2 and 1.5 at 1, and 0.1 to 0.7 worse at 3/4 and 7/8
    (benchmarks/zero_shot_*.md).
    """
    totals = [1.0]
    for gamma in reversed(gammas[1:]):
        totals.append(1 + float(gamma) * totals[-1])
    return [2 / (1 + total) for total in reversed(totals)]
