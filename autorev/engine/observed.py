"""What backward passes find, told to whoever began the forward passes: `verify`, above all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(eq=False)
class Observed:
    """What backward passes found, of forward passes that were made while this was in force in their thread."""

    rebuilt: dict[str, int] = field(default_factory=dict)
    """By chain: how many branches were run again."""
    drifts: dict[str, float] = field(default_factory=dict)


_observed: ContextVar[Observed | None] = ContextVar("autorev observed", default=None)


@contextmanager
def observing() -> Iterator[Observed]:
    """Tell apart what this thread's forward passes lead to from what others do with the same chains."""
    found = Observed()
    token = _observed.set(found)
    try:
        yield found
    finally:
        _observed.reset(token)


def observed_here() -> Observed | None:
    """What this thread's forward passes are to tell."""
    return _observed.get()
