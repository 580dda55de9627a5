"""A plan as frozen data: how a model trains in the memory there is, what else was looked at, and what each step buys.

Sizes are bytes, times seconds by the roofline of a device: lower bounds, which are good for comparing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autorev.analysis import DeviceInfo, ModelInfo
from autorev.errors import ConversionError
from autorev.methods import Method
from autorev.records import Record
from autorev.setting import Setting


@dataclass(frozen=True, slots=True)
class Option:
    """One way to train, simulated."""

    method: Method
    """Its loss included."""
    peak_bytes: int
    host_bytes: int
    """On the host between forward and backward."""
    seconds: float
    """Of a step."""
    fits: bool
    optimizer: str = "adamw"
    """As `autorev.optimizers` spells it."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One step on the way from plain training to the plan."""

    what: str
    """In words: `checkpointing`, `a tile at a time`."""
    option: Option


@dataclass(frozen=True, slots=True)
class Reached:
    """How far one way to train gets along the axis that was asked for."""

    method: Method
    size: int
    """0: not even one fits."""
    optimizer: str = "adamw"


@dataclass(frozen=True, slots=True)
class Measured:
    """The plan, run: one warm step on this machine."""

    peak_bytes: int
    host_bytes: int
    seconds: float
    holds: bool
    """Is the peak within the memory?"""


@dataclass(frozen=True, slots=True)
class Plan(Record):
    """What `autorev.fit` found. `print` it."""

    model: ModelInfo
    setting: Setting
    """The batch and the sequence are those that were found, and so is the optimiser, where they were asked for."""
    device: DeviceInfo
    """Whose speed the times are of."""
    memory_bytes: int
    """What a step may take."""
    method: Method | None
    """The fastest that fits; None: nothing does."""
    why: str
    options: tuple[Option, ...]
    """All that were simulated, fastest first."""
    rungs: tuple[Rung, ...] = ()
    """From plain training to the plan."""
    longest: tuple[Reached, ...] = ()
    """Where a size was asked for: how far each way gets."""
    axis: str | None = None
    """batch or sequence, where it was asked for."""
    measured: Measured | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    kind: str = "plan"
    schema_version: int = 1

    @property
    def option(self) -> Option | None:
        """The figures of the plan."""
        planned = self.method, self.setting.optimizer
        return next((option for option in self.options if (option.method, option.optimizer) == planned), None)

    @property
    def frontier(self) -> tuple[Option, ...]:
        """Those that nothing else beats both in memory and in time, fastest first."""
        best: list[Option] = []
        for option in self.options:
            if not best or option.peak_bytes < best[-1].peak_bytes:
                best.append(option)
        return tuple(best)

    def __str__(self) -> str:
        from autorev.report.render import render_text

        return render_text(self)


def method_of(plan: Plan, model: Any) -> Method:
    """What `plan` says of `model`.

    Raises:
        ConversionError: nothing fitted, or it is a plan for another model.
    """
    if plan.method is None:
        raise ConversionError(f"the plan says that nothing fits ({plan.why}); there is nothing to convert")
    names = {type(part).__name__ for part in model.modules()}
    if plan.model.class_name not in names:
        raise ConversionError(
            f"the plan is for {plan.model.class_name}, and this is {type(model).__name__}; make one for this model"
        )
    return plan.method
