"""By how much a model is better or worse than another one on the same text, and how surely.

The same sequences are read by both, some of which are harder than others for both: what counts is the spread of the
differences, which is far smaller than that of the losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

from autorev.finetuning.record import Evaluation

_NORMAL = 1.96
"""Of a normal distribution, 95 % lie within so many standard errors."""


@dataclass(frozen=True, slots=True)
class Change:
    """A difference of two losses on the same text."""

    by: float
    """Nats a token; below 0 it is the better one."""
    error: float | None
    """Its standard error; None: nothing says how large that is."""
    sequences: int
    """That it is paired over; 0: only the two losses' own standard errors are known, which say less."""

    @property
    def better(self) -> bool:
        """Beyond what chance would do?"""
        return self.by < -self._reach

    @property
    def worse(self) -> bool:
        """Beyond what chance would do? A loss that is no number is."""
        return self.by > self._reach or not isfinite(self.by)

    @property
    def _reach(self) -> float:
        if self.error is None:
            return inf
        return self.error * (_student(self.sequences - 1) if self.sequences else _NORMAL)


def _student(free: int) -> float:
    """Likewise of Student's t, whose tails are longer with few degrees of freedom (Cornish and Fisher's series)."""
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / free + second / free**2 + third / free**3


def change(now: Evaluation, before: Evaluation) -> Change:
    """From `before` to `now`, paired sequence by sequence where both records have them."""
    by = now.loss - before.loss
    count = len(now.losses)
    if count > 1 and now.tokens == before.tokens and len(now.tokens) == len(before.losses) == count:
        total = sum(now.tokens)
        # What each sequence adds to the difference of the means over all tokens, beyond its share.
        beyond = [n * (a - b - by) for a, b, n in zip(now.losses, before.losses, now.tokens, strict=True)]
        if all(map(isfinite, beyond)):
            return Change(by, (count / (count - 1) * sum(each * each for each in beyond)) ** 0.5 / total, count)
    errors = (now.standard_error, before.standard_error)
    known = [error for error in errors if error is not None]
    return Change(by, sum(error * error for error in known) ** 0.5 if len(known) == len(errors) else None, 0)
