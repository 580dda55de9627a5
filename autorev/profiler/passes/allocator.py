"""The truth about a step's memory: what the allocator itself says it handed out.

On a CPU these are the allocator's events in `torch.profiler`, on a GPU the caching allocator's own counters. Neither
knows anything of autorev, and neither changes what the step does. The process's resident set is recorded beside it.
"""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from autorev.profiler.passes.step import TrainingStep, storage_bytes, synchronize
from autorev.profiler.passes.watch import hush_profiler
from autorev.profiler.readings import PHASES, Memory


def measure_memory(step: TrainingStep, snapshot: Path | None = None) -> Memory:
    """The memory of one step that is warm already. `snapshot`: where a GPU's allocation history is written."""
    on_gpu = step.device.type == "cuda"
    peaks, kept, reserved = _on_gpu(step, snapshot) if on_gpu else (*_on_cpu(step), None)
    phase = max(peaks, key=lambda name: peaks[name])
    return Memory(
        peak_bytes=peaks[phase],
        phase=phase,
        phase_peaks=peaks,
        kept_bytes=kept,
        process_bytes=_resident(),
        host_bytes=0,
        reserved_bytes=reserved,
        snapshot=str(snapshot) if on_gpu and snapshot else None,
    )


def _on_cpu(step: TrainingStep) -> tuple[dict[str, int], int]:
    """Highest bytes in each phase, and the bytes kept between forward and backward."""
    base = storage_bytes(step.standing())
    hush_profiler()
    gc.collect()  # an earlier model that is garbage still would count as freed by this step
    with torch.profiler.profile(profile_memory=True) as profile:
        step.run(torch.profiler.record_function)
    events = profile.profiler.kineto_results.events()
    starts = {e.name(): e.start_ns() for e in events if e.name() in PHASES}
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks = dict.fromkeys(PHASES, base)
    now, kept, order = base, 0, sorted(PHASES, key=lambda name: starts[name])
    for at, change in changes:
        if at < starts["forward"]:
            continue
        phase = [name for name in order if starts[name] <= at][-1]
        now += change
        peaks[phase] = max(peaks[phase], now)
        if phase == "forward":
            kept = now - base
    return peaks, kept


def _on_gpu(step: TrainingStep, snapshot: Path | None) -> tuple[dict[str, int], int, int]:
    device = step.device
    peaks: dict[str, int] = {}
    kept = [0]

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield
        synchronize(device)
        peaks[name] = torch.cuda.max_memory_allocated(device)
        if name == "forward":
            kept[0] = torch.cuda.memory_allocated(device) - before

    gc.collect()
    before = torch.cuda.memory_allocated(device)
    if snapshot is not None:
        torch.cuda.memory._record_memory_history(stacks="python")
    try:
        step.run(watch)
        if snapshot is not None:
            snapshot.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(snapshot))
    finally:
        if snapshot is not None:
            torch.cuda.memory._record_memory_history(enabled=None)
    return peaks, kept[0], torch.cuda.max_memory_reserved(device)


def _resident() -> int:
    """Largest resident set of this process so far."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
