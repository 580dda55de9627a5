"""Fine-tunings of the tiny language model in each of several processes, one run after the other.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.helpers.several FOLDER
"""

import sys
from pathlib import Path
from typing import Any

from autorev.errors import AutorevError
from autorev.finetuning import world
from tests.helpers.tiny_run import At, interrupt, tune

PAIRS = [{"prompt": f"say {n}", "completion": f" {n}" * (1 + n % 7)} for n in range(30)]
"""Some have more to be learned than others."""
RUNS: dict[str, dict[str, Any]] = {
    "padded": {"text": "pairs.jsonl", "pack": False, "max_loss_increase": 0.02},
    "distilled": {"text": "pairs.jsonl", "pack": False, "distill": True, "lora_rank": 4, "accumulate": 2},
    "checkpointed": {"method": "checkpoint"},
    "sharded": {"text": "pairs.jsonl", "pack": False, "shard": "fsdp", "accumulate": 2},
    "sharded-adapters": {"lora_rank": 4, "distill": True, "shard": "fsdp"},
    "sharded-autocast": {"shard": "fsdp", "autocast": "bf16", "learning_rate": 1e-3},
}


def _interrupt_the_last(model: Any) -> None:
    if world.rank() == world.size() - 1:
        interrupt(model)


def _break_the_last(model: Any) -> None:
    if world.rank() == world.size() - 1:
        next(model.parameters()).data.fill_(float("nan"))


def _main(folder: Path) -> None:
    for name, how in RUNS.items():
        tune(folder, out=name, steps=3, **how)
    tune(folder, out="begun-alone", resume=True, shard="fsdp")
    stopped = {
        "begun-sharded": {"shard": "fsdp", "callbacks": (At(3, _interrupt_the_last),)},
        "quantised": {"shard": "fsdp", "quantize": "int8", "lora_rank": 4},
        "interrupted": {"callbacks": (At(3, _interrupt_the_last),)},
        "stepping": {"optimizer": "adamw:step=backward"},
        "broken": {"callbacks": (At(3, _break_the_last),)},  # last: it ends the processes
    }
    for name, how in stopped.items():
        try:
            tune(folder, out=name, **how)
        except AutorevError as error:
            (folder / f"{name}.{world.rank()}").write_text(str(error))
            if name == "broken":
                sys.exit(3)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
