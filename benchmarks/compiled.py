"""Compiled models: step time, peak and bytes kept of a reversible model beside plain autograd and checkpointing.

    python -m benchmarks.compiled > benchmarks/compiled_MACHINE_DATE.md
    python -m benchmarks.compiled --quick    # does it run?

All methods live in one process, share their parameters and take turns, as in `benchmarks.step_time`. Each runs eagerly,
compiled block by block (`compile="blocks"`, `block.compile()`), and as one graph (`compile="graph"`,
`model.compile(fullgraph=True)`). `first` is the first step, of a fresh compiler, and includes compiling. `kept`, MiB,
is counted in the tensors that autograd saves in the forward pass, weights left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from torch._dynamo.utils import counters

import autorev
from benchmarks.step_time import in_turns, tokens_of_bytes, twin_of
from benchmarks.workloads import peak_of, step_of, wide_llama

ROUNDS, BLOCKS, WIDTH, TOKENS = 15, 16, 256, 1024
QUICK = 1, 2, 64, 32


def methods(plain: Any) -> dict[str, Any]:
    """By name: as they are, compiled block by block, and as one graph."""
    plain.train()
    models = {}
    for name in ("plain autograd", "checkpoint", "reversible"):
        for how in (None, "blocks", "graph"):
            model = twin_of(plain)
            if name == "checkpoint":
                model.gradient_checkpointing_enable()
            if name == "reversible":
                found = autorev.convert(model, compile=how)
                assert found.compiled == how, found.why_not_graph
            elif how == "graph":
                model.compile(fullgraph=True)
            elif how == "blocks":
                for block in model.model.layers:
                    block.compile()
            models[{None: name, "blocks": f"{name}, compiled"}.get(how, f"{name}, one graph")] = model
    return models


def kept_by(model: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd saves in a forward pass, besides weights."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        total = sum(storage.nbytes() for key, storage in held.items() if key not in own)
    del loss
    return total


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)  # others that want a core delay a step by less
    rounds, blocks, width, tokens = QUICK if "--quick" in sys.argv else (ROUNDS, BLOCKS, WIDTH, TOKENS)
    ids = tokens_of_bytes(tokens)
    models = methods(wide_llama(blocks, width))
    steps = {name: step_of(model, ids) for name, model in models.items()}
    first, peaks, kept = {}, {}, {}
    for name, step in steps.items():
        print(name, file=sys.stderr)
        began = time.perf_counter()
        step()
        first[name] = time.perf_counter() - began
        peaks[name] = peak_of(models[name], step)
        kept[name] = kept_by(models[name], ids)
    breaks = sum(counters["graph_break"].values())
    seconds = in_turns(steps, rounds)
    base = seconds["checkpoint, compiled"]
    print(f"Llama of {blocks} blocks of width {width}, {tokens} tokens, fp32, random weights, one thread.")
    drifts = ", ".join(f"{name} {autorev.drift(models[name])}" for name in models if name.startswith("reversible"))
    print(f"Drift: {drifts}. Graph breaks, of all methods together: {breaks}.\n")
    print(f"| method | fastest of {rounds} | median | of compiled checkpoints | quartiles | first | peak MiB | kept |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4)
        figures = f"{min(times):.2f} s | {statistics.median(times):.2f} s | {middle:.3f} | {low:.3f} to {high:.3f}"
        print(f"| {name} | {figures} | {first[name]:.0f} s | {peaks[name] / 2**20:.1f} | {kept[name] / 2**20:.2f} |")


if __name__ == "__main__":
    main()
