"""The paper's couplings, pretrained: python -m benchmarks.long_runs.couplings [--json] [RUN ...]

SmolLM2-135M is taken from k = 3 to leapfrog and midpoint under distillation, the blocks that bear it best first and
the next one once the loss allows it (`block_by_block.py`), against the direct jump in as many steps. midpoint(a) has
a gamma of its own in each block: the jump is to them at once, and block by block each is taken to its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.long_runs.block_by_block import BlockByBlock
from benchmarks.long_runs.saved import Lines
from benchmarks.long_runs.trainings import Training, command

RECORD, FOLDER = Path("profiles/recorded/long_runs/couplings.jsonl"), Path("runs/long_couplings")
STEPS = 2000
SHARED: dict[str, Any] = {
    "steps": STEPS,
    "sequence": 64,
    "learning_rate": 1e-4,
    "distill": True,
    "evaluate_every": 250,
    "save_every": 50,
    "validation_rows": 16,
}
TARGETS = ("leapfrog", "midpoint", "midpoint_a")


def trainings(lines: Lines) -> dict[str, Training]:
    """By name: each target both ways."""
    found: dict[str, Training] = {}
    for target in TARGETS:
        found[f"{target}_by_block"] = Training(
            {**SHARED, "method": "momentum:k=3"}, lambda folder, target=target: (BlockByBlock(target, folder, STEPS),)
        )
        # SmolLM2's activations reach 150,000, and the grid that is chosen has no room for 16 times that.
        jump = f"{target}:fraction_bits=8" if target == "midpoint_a" else target
        found[f"{target}_jump"] = Training({**SHARED, "method": jump})
    return found


if __name__ == "__main__":
    command((__doc__ or "").partition("\n")[0], trainings, RECORD, FOLDER)
