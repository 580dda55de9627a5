"""The coupling's own cost: a step and its inverse, compiled into one pass each, beside single operators.

    python -m benchmarks.fused > benchmarks/fused_MACHINE_DATE.md

On a GPU if there is one, else on a CPU with one thread, where single operators are the default. Both take turns on the
same state, which every round leaves as it was. Times are of a block's step and inverse together; memory is the highest
number of bytes that they allocate beyond the state, side bits and the decoded stream included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from autorev.couplings import fused
from autorev.couplings.arithmetic import FixedPoint
from autorev.couplings.coupling import State
from autorev.couplings.velocity import Velocity
from autorev.engine.grid import step_on_grid

ROUNDS = 15
SIZES = ((512, 576), (2048, 2048))
GRID, GAMMA = FixedPoint(16), Fraction(1, 8)


def there_and_back(coupling: Velocity, state: State, out: torch.Tensor, value: torch.Tensor, how: Any) -> None:
    """As a tape takes it: the step, the stream for the next block, and the way back."""
    fused.FUSED_ON = how
    taken = step_on_grid(coupling, state, out, value, GRID, "block", at_once=False)
    new = GRID.decode(state.stream, out.dtype) if taken.new is None else taken.new
    coupling.recover_input(state, GRID)
    coupling.recover_partner(state, out, value, taken.side, GRID)
    del new


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def highest(run: Callable[[], None], device: torch.device) -> int:
    """Bytes allocated at most while it runs."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here, coupling = frozenset({device.type}), Velocity(GAMMA, 0.9375)
    print(f"gamma = {GAMMA}, side bits included, on {device.type}, {ROUNDS} rounds, interleaved.\n")
    print("| tokens x width | dtype | operators, ms | fused, ms | ratio, median | quartiles | first, s | MiB | fused |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for tokens, width in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(0)
            value = torch.randn(tokens, width, generator=generator).to(device, dtype)
            out = value + torch.randn(tokens, width, generator=generator).to(device, dtype) / 8
            velocity = torch.randint(-9999, 9999, (tokens, width), generator=generator, dtype=torch.int32).to(device)
            state = State(GRID.encode(value), velocity)

            ways = [partial(there_and_back, coupling, state, out, value, how) for how in (frozenset(), here)]
            first = seconds(ways[1], device)
            memory = [highest(way, device) for way in ways]
            times: list[list[float]] = [[], []]
            for _ in range(ROUNDS):
                for into, way in zip(times, ways, strict=True):
                    into.append(seconds(way, device))
            low, middle, high = statistics.quantiles((b / a for a, b in zip(*times, strict=True)), n=4)
            both = " | ".join(f"{statistics.median(t) * 1e3:.2f}" for t in times)
            sizes = " | ".join(f"{size / 2**20:.2f}" for size in memory)
            name = str(dtype).removeprefix("torch.")
            ratio = f"{middle:.2f} | {low:.2f} to {high:.2f}"
            print(f"| {tokens} x {width} | {name} | {both} | {ratio} | {first:.0f} | {sizes} |")


if __name__ == "__main__":
    main()
