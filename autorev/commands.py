"""The command that trains what was predicted or, where `finetune` trains otherwise, the one that measures it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from autorev.setting import Setting

SPEC = "{spec}"
"""Where the coupling stands in the command."""
_BESIDE = re.compile(r"(.*) \(from the command line: (.*)\)")
_QUANTISED = {None: "", "nf4-double": "nf4", "int8": "int8"}
"""What `finetune --quantize` calls what `Setting.weights` can be: of nf4 it quantises the scales, too."""


def beside(advice: str, command: str) -> str:
    """The advice with the command that follows it, if there is one."""
    return f"{advice} (from the command line: {command})" if command else advice


def apart(advice: str) -> tuple[str, str]:
    """What `beside` was given: a command is copied from a line of its own."""
    found = _BESIDE.fullmatch(advice)
    return (found[1], found[2]) if found else (advice, "")


def training_command(model: str, setting: Setting, can_be_finetuned: bool) -> str:
    """With `SPEC` in place of the coupling; empty where no command takes such a step.

    Args:
        model: MODEL, as the command line has it.
        setting: the predicted step.
        can_be_finetuned: is it a causal language model with weights?
    """
    if setting.gpus > 1:
        return ""
    program = "autorev" if Path(sys.argv[0]).name == "autorev" else "python cli.py"
    spec = SPEC + (",loss=chunked" if setting.loss == "chunked" else "")
    lora = "" if setting.lora_rank is None else str(setting.lora_rank)
    size = f"--batch {setting.batch}" + (f" --sequence {setting.sequence}" if setting.sequence else "")
    named = shlex.quote(model)
    fine_tuned = setting.dtype == "fp32" and setting.trains in ("full", "lora")
    fine_tuned = fine_tuned and setting.weights in _QUANTISED
    if can_be_finetuned and fine_tuned and setting.sequence and not setting.lora_dropout:
        accumulate = setting.accumulate if setting.accumulate > 1 else ""
        asked = {"--lora-rank": lora, "--quantize": _QUANTISED[setting.weights], "--accumulate": accumulate}
        asked["--optimizer"] = "" if setting.optimizer == "adamw" else setting.optimizer
        bf16 = " --autocast bf16" if setting.autocast else ""
        return f"{program} finetune {named} --method {spec} {size}{_options(asked)}{bf16}"
    if setting.accumulate > 1 or setting.weights:
        return ""
    how = {
        "--dtype": setting.dtype,
        "--autocast": setting.autocast,
        "--optimizer": setting.optimizer,
        "--lora-rank": lora,
        "--trains": "" if lora else setting.trains,
        "--lora-dropout": setting.lora_dropout,
        "--adapter-dtype": setting.adapter_dtype,
    }
    return f"{program} profile {named} --method {spec} {size}{_options(how)}"


def _options(given: Mapping[str, object]) -> str:
    return "".join(f" {name} {value}" for name, value in given.items() if value)
