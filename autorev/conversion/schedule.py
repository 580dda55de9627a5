"""From the pretrained function to a coupling without side bits, while the model trains.

A branch goes on acting for 1 / (1 - |gamma|) blocks. That horizon grows from the start's to the depth of the chain by
the same factor in every step of the schedule, and then gamma is 1 (leapfrog) or -1 (midpoint): no side bits. All of it
is exact, whatever gamma is on the way. The homotopy is Dr2Net's, arXiv 2401.04105; in floats it cannot be undone near
its start.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from autorev.errors import SettingError

TARGETS = {"leapfrog": 1, "midpoint": -1}
"""Name of the coupling at the end to its gamma."""
_FINEST = 5
"""gamma moves in steps of 2^-5 at the end, and costs as many side bits on the way at most."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """gamma as a function of the optimiser step."""

    target: str
    """leapfrog or midpoint."""
    steps: int
    """Optimiser steps until gamma is there."""
    blocks: int
    """Steps of the longest chain."""
    start: Fraction = Fraction(1, 8)
    """|gamma| in the first step."""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise SettingError(f"a schedule leads to {' or '.join(TARGETS)}, not to {self.target!r}")
        if self.steps < 1:
            raise SettingError(f"a schedule takes 1 step or more, not {self.steps}; to jump, convert to {self.target}")
        if not 0 < self.start < 1:
            raise SettingError(f"a schedule starts at a gamma between 0 and 1, not at {self.start}")

    def gamma(self, step: int) -> Fraction:
        """That of optimiser step `step`, the first of which is 0."""
        sign = TARGETS[self.target]
        if step >= self.steps:
            return Fraction(sign)
        first = float(1 / (1 - self.start))
        horizon = first * (max(self.blocks, 2) / first) ** (step / self.steps)
        wanted = 1 - 1 / horizon
        bits = next((k for k in range(3, _FINEST) if 1 - wanted >= 2.0**-k), _FINEST)
        return sign * max(self.start, min(Fraction(round(wanted * 2**bits), 2**bits), 1 - Fraction(1, 2**_FINEST)))
