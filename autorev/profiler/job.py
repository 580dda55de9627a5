"""What one process measures: everything it needs to make the model again, as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from autorev.in_place import Blocks
from autorev.methods import Method
from autorev.profiler.readings import Fidelity, Memory, Round, Work
from autorev.profiler.record import Point, Status
from autorev.setting import Setting


@dataclass(frozen=True, slots=True)
class Source:
    """Where the model, its call and the text come from."""

    model: str | None
    """MODEL as on the command line; None: the embedded SmolLM2."""
    pickled: str | None
    """A file with a (model, args, kwargs) of the user's own, in place of MODEL."""
    depth: int | None
    """Blocks, where they are not what the config says."""
    tokens: str | None
    """A file with token ids [samples, length] of the text, of which batches are cut; None: random inputs."""
    on: str
    """cpu or cuda."""
    threads: int
    trust_remote_code: bool = False
    """May code run that stands beside MODEL's config, or that it names?"""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The sizes of a method that a process tries."""

    axis: str
    """batch, sequence or depth."""
    values: tuple[int, ...]
    """Tried in this order, up to the first that does not fit; empty: the largest that fits is looked for."""
    limit: int | None
    """The largest value that the model takes."""
    budget_bytes: int | None
    extra_bytes: int | None
    """The budget beside parameters, gradients and optimiser state, where it was given so."""
    steps: int
    """Timed steps at the largest value; one at every other."""
    longest_step: float
    """Seconds; where a step would take longer, the search ends."""


@dataclass(frozen=True, slots=True)
class Job:
    """One method, one process."""

    source: Source
    method: Method
    blocks: Blocks
    setting: Setting
    round: int
    warmup: int
    """Steps before the first timed one."""
    steps: int
    """Timed steps; 0: none."""
    passes: bool
    """Measure memory, work and fidelity, too?"""
    snapshot: str | None = None
    sweep: Sweep | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job."""

    status: Status
    reason: str = ""
    round: Round | None = None
    memory: Memory | None = None
    work: Work | None = None
    fidelity: Fidelity | None = None
    side_bits: int = 0
    points: tuple[Point, ...] = ()
