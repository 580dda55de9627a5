"""Step time and peak memory of a converted model beside plain autograd and per-block checkpointing.

    python -m benchmarks.step_time smollm2 > benchmarks/step_time_smollm2_MACHINE_DATE.md
    python -m benchmarks.step_time wide    > benchmarks/step_time_wide_MACHINE_DATE.md

All variants live in one process and take turns, so that what the machine does meanwhile hits them alike; `checkpoint`
runs twice as a control. A step is forward and backward; an optimiser would add the same to each.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from torch import nn

import autorev
from benchmarks.workloads import TEXT, peak_of, smollm2, step_of, tokens_of, wide_llama

ROUNDS = 7


def variants(make: Callable[[], nn.Module], ids: Any) -> dict[str, nn.Module]:
    """Models that differ in how they keep their activations; `keep_last` spends what is saved where a name says so."""
    plain = make().train()
    models: dict[str, nn.Module] = {"plain": plain}
    for name in ("checkpoint", "checkpoint again"):
        models[name] = copy.deepcopy(plain)
        models[name].gradient_checkpointing_enable()  # type: ignore[operator]  # a transformers method
    for name, how in {
        "momentum 1/8, exact": {},
        "leapfrog, float": {"coupling": "leapfrog", "arithmetic": "float"},
    }.items():
        models[name] = copy.deepcopy(plain)
        autorev.convert(models[name], **how)
    roof = peak_of(step_of(models["checkpoint"], ids))
    kept = 1
    equal = copy.deepcopy(plain)
    while True:  # as many stored blocks as checkpointing's peak has room for
        autorev.convert(equal, keep_last=kept + 1)
        if peak_of(step_of(equal, ids)) > roof:
            break
        autorev.revert(equal)
        kept += 1
    autorev.revert(equal)
    autorev.convert(equal, keep_last=kept)
    models[f"momentum 1/8, exact, keep_last={kept}"] = equal
    return models


def main() -> None:
    """Print a Markdown table."""
    which = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    if which == "smollm2":
        model, tokenizer = smollm2()
        ids = tokens_of(tokenizer, 0, 256)
    else:
        model = wide_llama()
        ids = tokens_of_bytes(256)
    models = variants(lambda: model, ids)
    steps = {name: step_of(m, ids) for name, m in models.items()}
    peaks = {name: peak_of(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        print(f"round {turn + 1} of {ROUNDS}", file=sys.stderr)
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    base = seconds["checkpoint"]
    print("| variant | s a step (median of 7) | of checkpointing (median of the rounds' ratios) | peak MiB |")
    print("|---|---:|---:|---:|")
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        print(f"| {name} | {statistics.median(times):.2f} | {ratio:.3f} | {peaks[name] / 2**20:.1f} |")


def tokens_of_bytes(count: int) -> Any:
    """Token ids below 256, for a model without a tokenizer."""
    import torch

    return torch.tensor([list(TEXT.encode()[:count])])


if __name__ == "__main__":
    main()
