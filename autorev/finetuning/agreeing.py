"""Between two steps of several processes: what each has found by its own rows becomes one for all."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from autorev.conversion.convert import chains_of
from autorev.couplings.arithmetic import FixedPoint
from autorev.finetuning import world

_WORST = ("peak_bytes", "drift")
"""Figures of which the largest of all processes is logged."""


class Agreeing(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """One grid, the coarsest that any process needed: the same row must not have two losses. And the worst figures."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Rows that outgrew the grid were in one process only."""
        found = world.gathered(grids(model))
        for chain in chains_of(model):
            bits = min((each[chain.name] for each in found if chain.name in each), default=None)
            if bits is not None:
                chain.begin_on(FixedPoint(bits))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Of the step."""
        if "loss" not in logs:
            return
        found = world.gathered({name: logs[name] for name in _WORST if name in logs})
        worst = {name: max(each[name] for each in found if name in each) for name in _WORST if name in logs}
        logs.update(worst)
        state.log_history[-1].update(worst)


def grids(model: nn.Module) -> dict[str, int]:
    """Fraction bits of the chains in exact arithmetic, by name."""
    chains = chains_of(model)
    return {c.name: c.arithmetic.fraction_bits for c in chains if isinstance(c.arithmetic, FixedPoint)}
