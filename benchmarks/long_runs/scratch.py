"""From random weights for 3,000 steps, every architecture: python -m benchmarks.long_runs.scratch [--json] [RUN ...]

GPT-2-shaped models of two sizes, two seeds, against the residual baseline at equal steps and, once a size's
reversible runs are through, at equal memory: the baseline with as many rows a step as fit the memory of leapfrog's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from benchmarks.finetuning import ARCHITECTURES, gpt2_shape
from benchmarks.long_runs.limited import Steps, longest
from benchmarks.long_runs.saved import Lines
from benchmarks.long_runs.trainings import Training, command

RECORD, FOLDER = Path("profiles/recorded/long_runs/scratch.jsonl"), Path("runs/long_scratch")
SIZES = {"small": (8, 64), "large": (16, 128)}
"""Blocks and width."""
SEEDS = (0, 1)
BATCH, SEQUENCE = 8, 64
SHARED = {
    "steps": 3000,
    "sequence": SEQUENCE,
    "learning_rate": 1e-3,
    "decay": "cosine",
    "evaluate_every": 500,
    "save_every": 100,
}


def trainings(lines: Lines) -> dict[str, Training]:
    """By name; those at equal memory, once it is known."""
    found: dict[str, Training] = {}
    for seed in SEEDS:
        for size, (blocks, width) in SIZES.items():
            model = str(gpt2_shape(Path(f"runs/gpt2-{blocks}x{width}"), blocks, width))
            shared = {**SHARED, "model": model, "seed": seed}
            for method in ARCHITECTURES:
                found[f"{size}_{method}_{seed}"] = Training({**shared, "batch": BATCH, "method": method})
            memory = lines.by_name.get(f"{size}_leapfrog_{seed}", {})
            if memory.get("status") == "done":
                batch = rows_within(memory["peak_bytes"], Path(model))
                found[f"{size}_plain_equal_memory_{seed}"] = Training({**shared, "batch": batch, "method": "plain"})
    return found


@cache
def rows_within(limit: int, model: Path) -> int:
    """Rows that a plain step may have; 1 at least."""
    config = GPT2Config.from_pretrained(model)

    def peak_at(rows: int) -> int:
        ids = torch.zeros(rows, SEQUENCE, dtype=torch.long)
        steps = Steps(AutoModelForCausalLM.from_config(config).train(), lambda step: 1e-3, None)
        for number in range(2):
            steps.take(number, [{"input_ids": ids, "labels": ids}])
        return steps.peak

    return longest(peak_at, limit, 1, BATCH) or 1


if __name__ == "__main__":
    command((__doc__ or "").partition("\n")[0], trainings, RECORD, FOLDER)
