"""Pieces of one computation that are alike: who only counts runs a few of them, one of which stands for the others.

A stream is computed with a slice at a time, and a module may run on a tile of positions at a time. All pieces but the
last are of one size, and none leaves anything behind that the first two do not. Where they become more work from one to
the next (causal attention), all are counted as the latest is: a causal mask does not halve what is counted elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_counted: ContextVar[list[int] | None] = ContextVar("autorev pieces", default=None)
"""For how many pieces what runs now stands; None: all of them run."""


@contextmanager
def few_of_them() -> Iterator[None]:
    """While it lasts, this thread runs few pieces."""
    token = _counted.set([1])
    try:
        yield
    finally:
        _counted.reset(token)


def standing_for() -> int:
    """For how many pieces what runs now stands."""
    counted = _counted.get()
    return 1 if counted is None else counted[0]


def stand_for(number: int) -> None:
    """From now on it is that many."""
    counted = _counted.get()
    if counted is not None:
        counted[0] = number


def typical(count: int) -> Iterator[int]:
    """Which of `count` pieces to run: all, or the first, the last but one for all between, and the last."""
    before, few = standing_for(), _counted.get() is not None and count > 3
    for number in (0, count - 2, count - 1) if few else range(count):
        stand_for(before * (count - 2 if few and number == count - 2 else 1))
        try:
            yield number
        finally:
            stand_for(before)
