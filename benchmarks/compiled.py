"""Compiled blocks: step time and peak of a reversible model beside plain autograd and checkpointing, compiled or not.

    python -m benchmarks.compiled > benchmarks/compiled_MACHINE_DATE.md

All methods live in one process, share their parameters and take turns, as in `benchmarks.step_time`; each is compiled
block by block (`block.compile()`) where it says so. `first step` is that of a fresh compiler, and includes compiling.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

import autorev
from benchmarks.step_time import in_turns, tokens_of_bytes, twin_of
from benchmarks.workloads import peak_of, step_of, wide_llama

ROUNDS, BLOCKS, WIDTH, TOKENS = 15, 16, 256, 1024


def methods(plain: Any) -> dict[str, Any]:
    """By name; every second one compiled."""
    plain.train()
    models = {}
    for name in ("plain autograd", "checkpoint", "reversible"):
        for compiled in (False, True):
            model = twin_of(plain)
            if name == "checkpoint":
                model.gradient_checkpointing_enable()
            if name == "reversible":
                autorev.convert(model)
            for block in model.model.layers if compiled else ():
                block.compile()
            models[f"{name}, compiled" if compiled else name] = model
    return models


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)  # others that want a core delay a step by less
    ids = tokens_of_bytes(TOKENS)
    models = methods(wide_llama(BLOCKS, WIDTH))
    steps = {name: step_of(model, ids) for name, model in models.items()}
    first, peaks = {}, {}
    for name, step in steps.items():
        print(name, file=sys.stderr)
        began = time.perf_counter()
        step()
        first[name] = time.perf_counter() - began
        peaks[name] = peak_of(models[name], step)
    seconds = in_turns(steps, ROUNDS)
    base = seconds["checkpoint, compiled"]
    print(f"Llama of {BLOCKS} blocks of width {WIDTH}, {TOKENS} tokens, fp32, random weights, one thread.")
    print(f"Drift: {autorev.drift(models['reversible'])}, compiled {autorev.drift(models['reversible, compiled'])}.\n")
    print(f"| method | fastest of {ROUNDS} | median | of compiled checkpoints | quartiles | first step | peak MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles((t / b for t, b in zip(times, base, strict=True)), n=4)
        figures = f"{min(times):.2f} s | {statistics.median(times):.2f} s | {middle:.3f} | {low:.3f} to {high:.3f}"
        print(f"| {name} | {figures} | {first[name]:.0f} s | {peaks[name] / 2**20:.1f} |")


if __name__ == "__main__":
    main()
