"""What the CPU's allocator says of a step, as the tests of predictions and of measurements read it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

import torch


def changes_of(step: Callable[[], object]) -> list[int]:
    """Bytes of each event, in order. A model of an earlier test may be garbage still: freed while this step runs, it
    would count as the step's."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]  # set once the profile has ended
    return [e.nbytes() for e in sorted(results.events(), key=lambda event: event.start_ns()) if e.name() == "[memory]"]


def highest(step: Callable[[], object]) -> int:
    """The highest running sum."""
    return max(accumulate(changes_of(step)))
