"""Step time and peak of SmolLM2 with LoRA, with and without tiles: checkpointing and reversible blocks.

    python -m benchmarks.tiled_time 1024 2048 > benchmarks/tiled_time_MACHINE_DATE.md

All methods live in one process, share their parameters and take turns, as in `benchmarks.step_time`; the loss is in
chunks everywhere. `at checkpointing's peak` stores as many blocks as fit below that.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import autorev
from benchmarks.step_time import in_turns, print_beside_checkpointing, twin_of
from benchmarks.workloads import peak_of, smollm2, step_of, tokens_of

ROUNDS, RANK = 7, 16
METHODS = (
    "checkpoint",
    "checkpoint:tile=auto",
    "momentum:k=3,keep_last=0",
    "momentum:k=3,keep_last=0,keep=attention",
    "momentum:k=3,keep_last=0,tile=auto",
)


def trained_by(plain: Any, method: str, batch: dict[str, Any]) -> Any:
    """A twin of the model that trains so."""
    model = twin_of(plain)
    autorev.chunk_loss(model)
    autorev.convert(model, batch, method=method)
    return model


def filled(plain: Any, batch: dict[str, Any], method: str, roof: int) -> tuple[str, Any]:
    """The same method with as many stored blocks as fit below `roof`."""
    low, high = 0, plain.config.num_hidden_layers + 1
    while high - low > 1:
        middle = (low + high) // 2
        spec = method.replace("keep_last=0", f"keep_last={middle}")
        tried = trained_by(plain, spec, batch)
        fits = peak_of(tried, step_of(tried, batch["input_ids"])) <= roof
        low, high = (middle, high) if fits else (low, middle)
    spec = method.replace("keep_last=0", f"keep_last={low}")
    return f"{spec} (at checkpointing's peak)", trained_by(plain, spec, batch)


def main(lengths: tuple[int, ...]) -> None:
    """Print a Markdown table for each length."""
    model, tokenizer = smollm2()
    adapters = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    plain = get_peft_model(model, adapters).train()
    for length in lengths:
        ids = tokens_of(tokenizer, 0, length)
        batch = {"input_ids": ids, "labels": ids}
        print(f"preparing {length} tokens", file=sys.stderr)
        models = {method: trained_by(plain, method, batch) for method in METHODS}
        steps = {name: step_of(twin, ids) for name, twin in models.items()}
        peaks = {name: peak_of(models[name], step) for name, step in steps.items()}
        name, twin = filled(plain, batch, METHODS[-1], peaks["checkpoint"])
        models[name], steps[name] = twin, step_of(twin, ids)
        peaks[name] = peak_of(twin, steps[name])
        print(f"\n## {length} tokens\n")
        print_beside_checkpointing(in_turns(steps, ROUNDS), peaks)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(tuple(map(int, sys.argv[1:])) or (1024, 2048))
