"""Training steps within a memory limit: bytes alive in a step are counted, and one too many ends the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autorev.capture.quantised import held_by
from autorev.profiler.passes.watch import PeakWatch


class DoesNotFit(Exception):  # noqa: N818 - no error: what the limit is there for
    """A step's peak was above the limit."""

    def __init__(self, peak: int, limit: int) -> None:
        super().__init__(f"a step holds {peak / 2**20:.2f} MiB, and {limit / 2**20:.2f} are allowed")
        self.peak = peak


class Steps:
    """Optimiser steps of `model` with nothing above `limit` bytes: weights, gradients, AdamW's states, activations.

    Counted are the allocator's own events, of the second step of every shape and of every `WATCHED`th step: counting
    slows a step, and two steps of one shape allocate alike. What waits in the host's memory is not counted.
    """

    WATCHED = 25

    def __init__(self, model: nn.Module, rate: Callable[[int], float], limit: int | None) -> None:
        self.model, self.rate, self.limit = model, rate, limit
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.peak = 0
        """The highest that was seen."""
        self._seen: dict[Any, int] = {}

    def take(self, number: int, parts: list[dict[str, torch.Tensor]]) -> float:
        """Step `number`, the first of which is 0, on rows that pass one part after the other. Returns the mean loss.

        Raises:
            DoesNotFit: its peak was above the limit.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        shape = tuple(parts[0]["input_ids"].shape)
        count = self._seen[shape] = self._seen.get(shape, -1) + 1
        if count % self.WATCHED != 1:
            return self._take(parts)
        peak, loss = peak_of(lambda: self._take(parts), [*self._standing(), *parts[0].values()])
        self.peak = max(self.peak, peak)
        if self.limit is not None and peak > self.limit:
            raise DoesNotFit(peak, self.limit)
        return loss

    def _take(self, parts: list[dict[str, torch.Tensor]]) -> float:
        model: Any = self.model
        total, rows = 0.0, sum(len(part["input_ids"]) for part in parts)
        for part in parts:
            share = model(**part, use_cache=False).loss * (len(part["input_ids"]) / rows)
            share.backward()
            total += float(share.detach())
            del share
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _standing(self) -> list[torch.Tensor]:
        state = [t for held in self.optimizer.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
        return [*held_by(self.model), *state]


def peak_of(run: Callable[[], float], standing: list[torch.Tensor]) -> tuple[int, float]:
    """The most bytes alive while `run` runs, those of `standing` included, and what it returned."""
    watch = PeakWatch(torch.device("cpu"))
    watch.begin(standing)
    try:
        found = run()
    finally:
        peak = watch.end()
    return peak, found


def longest(peak_at: Callable[[int], int], limit: int, least: int, most: int) -> int | None:
    """The largest multiple of `least` up to `most` at which a step fits; None: not even `least` does.

    Peaks are nearly straight lines of the length: the next one to try lies where the last two meet the limit, and every
    other time half way between, as a curved one is approached from one side alone.
    """
    low, high = least, most
    below, above = peak_at(low), peak_at(high)
    if below > limit:
        return None
    if above <= limit:
        return most
    straight = False
    while high - low > least:
        straight = not straight
        guess = low + ((limit - below) * (high - low) // (above - below) if straight else (high - low) // 2)
        guess = min(max(guess // least * least, low + least), high - least)
        peak = peak_at(guess)
        if peak <= limit:
            low, below = guess, peak
        else:
            high, above = guess, peak
    return low
