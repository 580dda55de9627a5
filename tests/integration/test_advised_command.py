"""The command that the advice of `analyze` names trains what was predicted.

python -m pytest tests/integration/test_advised_command.py
"""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import autorev
from autorev.advice.case import Possible
from autorev.advice.predicted import recommend_for
from autorev.cli import main
from autorev.commands import SPEC, apart, beside, training_command
from autorev.finetuning.record import FineTuning
from autorev.report.shared import advice_on_screen
from autorev.report.terminal import print_sections
from autorev.setting import Setting
from tests.helpers.comparing import comparing
from tests.helpers.tiny_llm import tiny_llm

SETTING = Setting(4, 96, "fp32", "adamw", "lora", 4, "full", "cpu")


def test_the_advised_command_has_the_predicted_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, sizes, adapters and `keep_last` are those of the prediction, and so is the allocator's peak."""
    monkeypatch.chdir(tmp_path)
    tiny_llm(tmp_path / "a model", blocks=6)
    with comparing("plain", "momentum", "bdia"):
        found = autorev.predict("a model", batch=4, sequence=96, dtype="fp32", device="cpu", trains="lora", lora_rank=4)
    assert found.setting == SETTING
    momentum = found.prediction("momentum")
    assert momentum is not None
    slow = replace(found, predictions=tuple(p for p in found.predictions if p.method in ("momentum", "bdia")))
    command = training_command("a model", SETTING, can_be_finetuned=True)
    advised = recommend_for(slow, Possible(command=command)).advice[0]
    typed = re.fullmatch(r"python cli\.py finetune (.*)", apart(advised)[1])
    assert typed is not None
    options = [*shlex.split(typed[1]), "--steps", "2", "--evaluate-every", "9", "--validation-rows", "1"]
    assert "momentum:k=3,keep_last=0" in options
    done = CliRunner().invoke(main, ["finetune", *options, "--json", "--out", "run"])
    assert done.exit_code == 0, done.output
    record = FineTuning.read(tmp_path / "run" / "run.json")
    assert record.peak_bytes == pytest.approx(momentum.peak_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (SETTING, "finetune m --method {spec} --batch 4 --sequence 96 --lora-rank 4"),
        (
            replace(SETTING, loss="chunked"),
            "finetune m --method {spec},loss=chunked --batch 4 --sequence 96 --lora-rank 4",
        ),
        (
            replace(SETTING, optimizer="adamw-8bit"),
            "finetune m --method {spec} --batch 4 --sequence 96 --lora-rank 4 --optimizer adamw-8bit",
        ),
        (
            replace(SETTING, dtype="bf16", trains="full", lora_rank=None),
            "profile m --method {spec} --batch 4 --sequence 96 --dtype bf16 --optimizer adamw --trains full",
        ),
        (
            replace(SETTING, sequence=None, optimizer="sgd"),
            "profile m --method {spec} --batch 4 --dtype fp32 --optimizer sgd --lora-rank 4",
        ),
    ],
)
def test_where_finetune_trains_otherwise_profile_measures(setting: Setting, told: str) -> None:
    """Other dtypes and optimisers, images."""
    assert training_command("m", setting, can_be_finetuned=True) == f"python cli.py {told}"
    assert "finetune" not in training_command("m", setting, can_be_finetuned=False)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_command_is_copied_from_one_line(width: int) -> None:
    """However narrow the terminal; a second line would be another command to a shell."""
    command = "python cli.py finetune 'a model' --method momentum:k=3,keep_last=0 --batch 8 --sequence 64 --lora-rank 4"
    screen = Console(file=io.StringIO(), width=width)
    advice = ("First of all", beside("convert it and so on", command), "Then this")
    print_sections([advice_on_screen("Use it", "because", advice)], screen)
    lines = [line.strip() for line in screen.file.getvalue().splitlines()]
    assert command in lines
    assert lines[lines.index(command) - 1].endswith("line:")
    assert beside("as it is", "") == apart("as it is")[0] == "as it is"


def test_what_no_command_takes_has_none() -> None:
    """Accumulated gradients of 16-bit weights are predicted, and not measured."""
    assert training_command("m", replace(SETTING, dtype="bf16", accumulate=2), can_be_finetuned=True) == ""
    assert SPEC == "{spec}"
