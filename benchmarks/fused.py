"""The coupling's own cost: a step and its inverse, compiled into one pass each, beside single operators.

    python -m benchmarks.fused > benchmarks/fused_MACHINE_DATE.md

On a GPU if there is one, else on a CPU with one thread, where single operators are the default. Both take turns on the
same state, which every round leaves as it was. Times are of a block's step and inverse together; memory is the highest
number of bytes that they allocate beyond the state, side bits and the decoded stream included.
"""

from __future__ import annotations

import statistics
import sys
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
from autorev.prediction.training import DTYPES
from benchmarks.gpu.device import Device

ROUNDS = 15
SIZES = ((512, 576), (2048, 2048))
GRID, GAMMA = FixedPoint(16), Fraction(1, 8)
OPERATORS: frozenset[str] = frozenset()
"""Kinds of devices on which a step is fused: none."""


def there_and_back(
    coupling: Velocity, state: State, out: torch.Tensor, value: torch.Tensor, how: frozenset[str]
) -> torch.Tensor:
    """As a tape takes it: the step, the stream for the next block (returned), and the way back."""
    fused.FUSED_ON = how
    taken = step_on_grid(coupling, state, out, value, GRID, "block", at_once=False)
    new = GRID.decode(state.stream, out.dtype) if taken.new is None else taken.new
    coupling.recover_input(state, GRID)
    coupling.recover_partner(state, out, value, taken.side, GRID)
    return new


def compared(device: Device, tokens: int, width: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Single operators, then the compiled pass: seconds in each round and bytes; or why there is no compiled pass.

    Whether both have the same bits, and leave the state as it was, is looked at on this state, too.
    """
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(tokens, width, generator=generator).to(device.torch, DTYPES[dtype])
    out = value + torch.randn(tokens, width, generator=generator).to(device.torch, DTYPES[dtype]) / 8
    velocity = torch.randint(-9999, 9999, (tokens, width), generator=generator, dtype=torch.int32).to(device.torch)
    coupling, state = Velocity(GAMMA, 0.9375), State(GRID.encode(value), velocity)
    before = state.clone()
    ways = [partial(there_and_back, coupling, state, out, value, how) for how in (OPERATORS, frozenset({device.kind}))]
    first = device.seconds(ways[1])
    same = torch.equal(ways[0](), ways[1]()) and all(
        map(torch.equal, (state.stream, state.partner), (before.stream, before.partner))
    )
    if fused._said:
        return {"same": same, "first": first, "fallback": fused._said[0], "seconds": [[device.seconds(ways[0])]]}
    peaks = [device.highest(way) for way in ways]
    return {"same": same, "first": first, "peaks": peaks, "seconds": in_turns(ways, rounds, device)}


def in_turns(ways: list[Callable[[], Any]], rounds: int, device: Device) -> list[list[float]]:
    """Seconds of each way in each round."""
    return [[device.seconds(way) for way in ways] for _ in range(rounds)]


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    """Operators and fused in ms, ratio and quartiles, the first call, MiB of both."""
    both = list(zip(*found["seconds"], strict=True))
    medians = [f"{statistics.median(times) * 1e3:.2f}" for times in both]
    if "fallback" in found:
        return (*medians, f"single operators: {found['fallback']}", *[""] * 5)
    low, middle, high = statistics.quantiles((b / a for a, b in found["seconds"]), n=4)
    sizes = [f"{size / 2**20:.2f}" for size in found["peaks"]]
    return (*medians, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{found['first']:.0f}", *sizes)


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = Device(kind, kind, 0, 1)
    print(f"gamma = {GAMMA}, side bits included, on {kind}, {ROUNDS} rounds, interleaved.\n")
    print("| tokens x width | dtype | operators, ms | fused, ms | ratio, median | quartiles | first, s | MiB | fused |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for tokens, width in SIZES:
        for dtype in ("fp32", "bf16"):
            print(f"{tokens} x {width}, {dtype}", file=sys.stderr)
            found = compared(device, tokens, width, dtype, ROUNDS)
            print(f"| {tokens} x {width} | {dtype} | {' | '.join(cells(found))} |", flush=True)


if __name__ == "__main__":
    main()
