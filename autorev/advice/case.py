"""What advice is given on: a training step, the memory there is for it, and what is known of every way to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from autorev.analysis import Category, Reach
from autorev.format import format_bytes, format_seconds
from autorev.methods import Method
from autorev.setting import Setting

WORTH = 0.05
"""A peak has to be lower by this share to be worth a conversion."""
COMFORT = 0.9
"""Share of the memory up to which a step is said to fit without worry."""
FIXED = (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
"""What neither the batch nor a way of storing activations changes."""
SIMPLEST = ("plain", "checkpoint", "sac", "compile", "offload", "momentum")
"""What PyTorch does by itself comes before a conversion."""
TITLES = {"plain": "plain training", "checkpoint": "checkpointing", "offload": "offloaded checkpointing"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to train at one size, predicted or measured."""

    name: str
    """What the recommendation calls it."""
    title: str
    """What a sentence calls it."""
    method: Method
    peak_bytes: int
    phase: str = ""
    categories: Mapping[str, int] = field(default_factory=dict)
    """At the peak; empty where they are not known."""
    phase_peaks: Mapping[str, int] = field(default_factory=dict)
    block_bytes: tuple[int, ...] = ()
    seconds: float | None = None
    """Of a step."""
    rate: float | None = None
    """Tokens (or samples) a second."""
    spread: float = 0.0
    """Of the samples of the rate, relative to their median; 0 for a prediction."""
    batch: int

    @property
    def complexity(self) -> tuple[int, int]:
        """The simpler of two is recommended where nothing else decides."""
        order = SIMPLEST.index(self.method.name) if self.method.name in SIMPLEST else len(SIMPLEST)
        return order, len(self.method.spec)

    def held(self, *categories: Category) -> int:
        """Bytes of these categories at the peak."""
        return sum(self.categories.get(category, 0) for category in categories)

    def is_faster(self, other: Candidate) -> bool:
        """By more than the samples of either spread."""
        if self.rate is None or other.rate is None:
            return False
        return self.rate > other.rate * (1 + max(self.spread, other.spread))


@dataclass(frozen=True, slots=True)
class Possible:
    """What can be done with a model, whatever its memory."""

    chunked: bool = True
    """Has it a vocabulary head, whose loss can be computed in chunks?"""
    lora: bool = True
    """Has it weights worth keeping, and linear layers inside its blocks?"""
    command: str = ""
    """What trains it, or measures it, as converted; `{spec}` stands for the coupling. Empty: no command does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The question, with all that is known: predictions, or measurements where there are any."""

    setting: Setting
    known: tuple[Candidate, ...]
    """At the setting's size."""
    measured: bool
    room: int | None
    """Bytes there are, where there is a limit."""
    there_is: str = ""
    """The same in words: `the 78.6 GiB to use on NVIDIA H100`."""
    to_be_filled: bool = True
    """Is what fits good enough, so that the fastest of it is best? Else less memory is always better."""
    goal: str = "memory"
    """memory, throughput or context."""
    pretrained: bool = True
    """Does the model have a function that must be kept?"""
    blocks: int = 0
    largest: tuple[Candidate, ...] = ()
    """Each at the largest batch that fits it, where that was timed."""
    reaches: Mapping[str, Reach] = field(default_factory=dict)
    """How far each gets, by its name."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Why there is no figure of a method, by its spec."""
    remarks: tuple[str, ...] = ()
    """What else has to be known of the figures."""
    irreversible: str = ""
    """Why no reversible chain is among what is known, where that is the model's doing."""
    units: str = "tokens"
    possible: Possible = Possible()
    size: Callable[[int], str] = format_bytes
    """Bytes in words, in the unit of the table that the advice stands under."""

    @property
    def usable(self) -> list[Candidate]:
        """A pretrained model has to keep its function."""
        return [c for c in self.known if c.method.preserves_function or not self.pretrained]

    def fits(self, candidate: Candidate, share: float = 1.0) -> bool:
        """Into `share` of the memory."""
        return self.room is None or candidate.peak_bytes <= share * self.room

    def find(self, spec: str) -> Candidate | None:
        """At the setting's size."""
        return next((c for c in self.known if c.method.spec == spec), None)

    def rate(self, candidate: Candidate) -> str:
        """How fast, as the table has it: a prediction's seconds, a measurement's tokens a second."""
        if not self.measured and candidate.seconds is not None:
            return f"{format_seconds(candidate.seconds)} a step"
        rate = candidate.rate or 0.0
        return f"{rate:,.3g} {self.units} a second" if rate < 100 else f"{rate:,.0f} {self.units} a second"
