"""A fine-tuning on the screen of a terminal.

Run: python -m pytest tests/unit/test_finetune_terminal.py
"""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from autorev.finetuning.record import FineTuning
from autorev.report.render import print_records, render_text
from tests.helpers import finetune_examples as examples
from tests.helpers.finetune_examples import ALL, many


def screen(runs: list[FineTuning], width: int, color: bool = False) -> str:
    """What a terminal of `width` columns shows."""
    system = "truecolor" if color else None
    console = Console(file=io.StringIO(), width=width, color_system=system, force_terminal=color, _environ={})
    with console.capture() as capture:
        print_records(runs, console)
    return capture.get()


def test_says_model_recipe_machine_losses_and_verdict() -> None:
    """Nothing a reader needs is missing."""
    text = " ".join(render_text(examples.momentum()).split())
    for expected in (
        "SmolLM2-135M-Instruct LlamaForCausalLM, 135 M parameters",
        "Under momentum k=3: All weights, 40 steps of 1 x 192 tokens at rate 5e-05",
        "On Intel Xeon Platinum 8481C, 2 threads, 2026-11-26T10:15:00+00:00",
        "step 40 2.731 0.110 15.3 -0.169 66.4 % 0.042",
        "Peak memory: 1.86 GiB",
        "Reconstruction drift 0: rebuilt bit for bit in all 40 steps.",
        "Verdict Ship it as the plain architecture",
        "ship it with autorev export.",
        "Note: 2 examples were longer",
    ):
        assert expected in text, expected


def test_an_interrupted_run_says_so() -> None:
    """Above and in the verdict."""
    text = render_text(examples.interrupted())
    assert "Incomplete: 17 of 40 steps; --resume goes on with it." in text and "This run is not complete" in text


def test_many_evaluations_leave_out_those_in_between() -> None:
    """It is one screen; the first ones and the last stay."""
    base = examples.momentum()
    long = replace(base, evaluations=tuple(replace(base.evaluations[1], step=step) for step in range(0, 400, 10)))
    lines = render_text(replace(long, complete=False)).splitlines()
    assert any(line.startswith("before training") for line in lines) and any("step 390" in line for line in lines)
    assert "32 evaluations in between are in the HTML report." in lines and len(lines) < 40


def test_several_runs_are_one_table_for_each_model() -> None:
    """A line per run, those from scratch by coupling, and what is not complete is marked."""
    text = screen(many(), 120)
    assert re.search(
        r"^momentum k=3, side bits calibrated +2.27 +2.900 +2.917 +2.735 +\+0.005 +\+0.006", text, re.MULTILINE
    )
    assert "2.779~" in text and "~ not complete; --resume goes on with it" in text
    assert re.search(r"^midpoint +0 +4.340 4.330 \(0\), 4.350 \(1\) +\+0.120 +\+2.200 +122 MiB", text, re.MULTILINE)
    assert "~" not in screen([examples.plain(), examples.momentum()], 100)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("color", [False, True])
def test_fits_the_screen(name: str, width: int, color: bool) -> None:
    """No line is longer than the terminal, and the screen is one screen."""
    for runs in ([ALL[name]()], [ALL[name](), examples.plain(), examples.scratch("midpoint")]):
        lines = re.sub(r"\x1b\[[0-9;]*m", "", screen(runs, width, color)).splitlines()
        assert max(map(len, lines)) <= width
        if name != "hostile":
            assert len(lines) <= 50


def test_names_cannot_steer_the_terminal() -> None:
    """Escape codes and rich markup are shown, not obeyed."""
    for text in (render_text(examples.hostile()), screen([examples.hostile(), examples.plain()], 100)):
        assert "\x1b" not in text and "\u202e" not in text
    assert "[red]" in render_text(examples.hostile())
