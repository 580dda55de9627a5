"""The peak of a stretch of a program that somebody else runs, such as a step of `transformers.Trainer`."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch

from autorev.profiler.passes.step import storage_bytes, synchronize


class PeakWatch:
    """`begin(standing)`, then whatever is measured, then `end()`.

    On a CPU the allocator's own events, which slow the stretch a little; on a GPU the caching allocator's counter.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._profile: Any = None
        self._base = 0

    def begin(self, standing: list[torch.Tensor]) -> None:
        """`standing`: what is alive already, which a CPU's allocator says nothing of."""
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self._base = storage_bytes(standing)
        hush_profiler()
        gc.collect()  # an earlier model that is garbage still would count as freed by this stretch
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def end(self) -> int:
        """The highest number of bytes since `begin`."""
        if self.device.type == "cuda":
            synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()
        self._profile = None
        now = highest = self._base
        for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            now += change
            highest = max(highest, now)
        return highest


def hush_profiler() -> None:
    """PyTorch's profiler writes a line whenever it starts or stops, at the highest of its levels, unless its library is
    asked not to before it is first used.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
