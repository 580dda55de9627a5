"""The command that trains what was predicted or, where `finetune` trains otherwise, the one that measures it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from autorev.analysis import Setting

SPEC = "{spec}"
"""Where the coupling stands in the command."""
_MEASURED = ("adamw", "sgd", "sgd-momentum")


def training_command(model: str, setting: Setting, can_be_finetuned: bool) -> str:
    """With `SPEC` in place of the coupling; empty where no command takes such a step.

    Args:
        model: MODEL, as the command line has it.
        setting: the predicted step.
        can_be_finetuned: is it a causal language model with weights?
    """
    program = "autorev" if Path(sys.argv[0]).name == "autorev" else "python cli.py"
    spec = SPEC + (",loss=chunked" if setting.loss == "chunked" else "")
    lora = "" if setting.lora_rank is None else str(setting.lora_rank)
    size = f"--batch {setting.batch}" + (f" --sequence {setting.sequence}" if setting.sequence else "")
    named = shlex.quote(model)
    fine_tuned = setting.dtype == "fp32" and setting.optimizer == "adamw" and setting.trains in ("full", "lora")
    if can_be_finetuned and fine_tuned and setting.sequence:
        return f"{program} finetune {named} --method {spec} {size}" + (f" --lora-rank {lora}" if lora else "")
    if setting.optimizer not in _MEASURED:
        return ""
    trains = f" --lora-rank {lora}" if lora else f" --trains {setting.trains}"
    how = f"--dtype {setting.dtype} --optimizer {setting.optimizer}{trains}"
    return f"{program} profile {named} --method {spec} {size} {how}"
