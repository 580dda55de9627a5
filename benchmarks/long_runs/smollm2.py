"""SmolLM2-135M for a thousand steps, plain beside reversible: python -m benchmarks.long_runs.smollm2 [--json] [RUN ...]

LoRA and all weights, three seeds each, on CPython's language reference: validation loss, the loss of the exported
weights in the plain architecture, tokens a second, and multiple choice on held-out text (`quiz.py`). Rows are short,
so that steps are many. What is left goes on when the command is given again.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.long_runs.quiz import answers
from benchmarks.long_runs.saved import Lines
from benchmarks.long_runs.trainings import Training, command

RECORD, FOLDER = Path("profiles/recorded/long_runs/smollm2.jsonl"), Path("runs/long_smollm2")
SHARED = {"steps": 1000, "sequence": 64, "evaluate_every": 250, "save_every": 50, "validation_rows": 48}
TRAINED = {"lora": {"lora_rank": 16, "learning_rate": 2e-4}, "full": {"learning_rate": 2e-5}}
METHODS = {"momentum_k3": "momentum:k=3", "plain": "plain"}


def trainings(lines: Lines) -> dict[str, Training]:
    """By name; one seed of everything first."""
    return {
        f"{trains}_{name}_{seed}": Training({**SHARED, **how, "method": spec, "seed": seed}, questions=answers)
        for seed in range(3)
        for trains, how in TRAINED.items()
        for name, spec in METHODS.items()
    }


if __name__ == "__main__":
    command((__doc__ or "").partition("\n")[0], trainings, RECORD, FOLDER)
