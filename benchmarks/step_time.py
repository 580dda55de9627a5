"""Step time and peak memory of a converted model beside plain autograd and per-block checkpointing.

    python -m benchmarks.step_time smollm2 > benchmarks/step_time_smollm2_MACHINE_DATE.md
    python -m benchmarks.step_time wide    > benchmarks/step_time_wide_MACHINE_DATE.md

All methods live in one process and take turns, so that what the machine does meanwhile hits them alike; `checkpoint`
runs twice as a control. A step is forward and backward; an optimiser would add the same to each.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import autorev
from benchmarks.workloads import TEXT, peak_of, smollm2, step_of, tokens_of, wide_llama

ROUNDS = 21


def methods(plain: Any, ids: Any) -> dict[str, Any]:
    """Models that differ in how they keep their activations, and share their parameters."""
    plain.train()
    models = {"plain autograd": plain}
    for name in ("checkpoint", "checkpoint again"):
        models[name] = twin_of(plain)
        models[name].gradient_checkpointing_enable()
    for name, how in {
        "momentum 1/8, exact": {},
        "leapfrog, exact": {"method": "leapfrog"},
    }.items():
        models[name] = twin_of(plain)
        autorev.convert(models[name], **how)
    roof = peak_of(models["checkpoint"], step_of(models["checkpoint"], ids))
    least, too_many = 1, plain.config.num_hidden_layers + 1
    while too_many - least > 1:  # as many stored blocks as checkpointing's peak has room for
        kept = (least + too_many) // 2
        tried = twin_of(plain)
        autorev.convert(tried, keep_last=kept)
        fits = peak_of(tried, step_of(tried, ids)) <= 1.01 * roof
        least, too_many = (kept, too_many) if fits else (least, kept)
    equal = twin_of(plain)
    autorev.convert(equal, keep_last=least)
    models[f"momentum 1/8, exact, keep_last={least} (at checkpointing's peak)"] = equal
    return models


def twin_of(model: Any) -> Any:
    """A copy with the same parameters: their gradients would not fit six times."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def main() -> None:
    """Print a Markdown table."""
    which = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    if which == "smollm2":
        model, tokenizer = smollm2()
        ids = tokens_of(tokenizer, 0, 512)
    else:
        model = wide_llama()
        ids = tokens_of_bytes(256)
    models = methods(model, ids)
    steps = {name: step_of(m, ids) for name, m in models.items()}
    peaks = {name: peak_of(models[name], step) for name, step in steps.items()}
    print_beside_checkpointing(in_turns(steps, ROUNDS), peaks)


def in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def print_beside_checkpointing(seconds: dict[str, list[float]], peaks: dict[str, int]) -> None:
    """A Markdown table; ratios are taken in each round."""
    base = seconds["checkpoint"]
    heads = f"s a step (median of {len(base)}) | of checkpointing: median ratio"
    print(f"| method | {heads} | quartiles | peak MiB |")
    print("|---|---:|---:|---:|---:|")
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles((t / b for t, b in zip(times, base, strict=True)), n=4)
        figures = f"{statistics.median(times):.2f} | {middle:.3f} | {low:.3f} to {high:.3f}"
        print(f"| {name} | {figures} | {peaks[name] / 2**20:.1f} |", flush=True)


def tokens_of_bytes(count: int) -> Any:
    """Token ids below 256, for a model without a tokenizer."""
    import torch

    return torch.tensor([list(TEXT.encode()[:count])])


if __name__ == "__main__":
    main()
