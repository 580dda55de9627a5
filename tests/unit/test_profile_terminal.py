"""A profile on the screen of a terminal.

Run: python -m pytest tests/unit/test_profile_terminal.py
"""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from autorev.format import format_seconds
from autorev.profiler.record import Profile
from autorev.report.render import print_records, render_text
from tests.helpers import profile_examples as examples
from tests.unit.test_profile_report import ALL


def screen(profiles: list[Profile], width: int, color: bool = False) -> str:
    """What a terminal of `width` columns shows."""
    system = "truecolor" if color else None
    console = Console(file=io.StringIO(), width=width, color_system=system, force_terminal=color, _environ={})
    with console.capture() as capture:
        print_records(profiles, console)
    return capture.get()


class TestTerminal:
    """One screen a person wants to read."""

    def test_says_setting_machine_figures_and_what_to_do(self) -> None:
        """Nothing a reader needs is missing."""
        profile = examples.smollm2()
        text = " ".join(render_text(profile).split())
        for expected in (
            "SmolLM2-135M-Instruct LlamaForCausalLM, 135 M parameters",
            "batch 4, 256 tokens, fp32, AdamW, all weights, full logits",
            "On Intel Xeon Platinum 8481C, 2 threads, 2026-11-26T10:15:00+00:00",
            "Recommendation",
            "Note: LoRA rank has no effect",
        ):
            assert expected in text, expected
        row = next(line for line in render_text(profile).splitlines() if line.startswith("checkpoint "))
        each = profile.result("checkpoint")
        for figure in (f"{each.memory.peak_bytes / 2**30:.2f}", "60 %", "backward", format_seconds(each.step_seconds)):
            assert figure in row

    def test_reach_is_a_table_of_its_own(self) -> None:
        """Largest batch and throughput there."""
        profile = examples.deep(24)
        most = next(p for p in profile.points if p.largest and p.method == "leapfrog")
        row = [line for line in render_text(profile).splitlines() if line.strip().startswith("leapfrog ")][-1]
        assert row.split() == ["leapfrog", str(most.value), f"{most.value * 64 / most.step_seconds:.0f}"]

    def test_marks_have_their_meaning_below(self) -> None:
        """Doubt, budget, lost function; and the reason where there is no figure."""
        text = render_text(examples.unequal())
        row = next(line for line in text.splitlines() if line.startswith("momentum"))
        assert re.search(r"\d s~ ", row) and "~ the steps lie so far apart" in text
        assert "sac: failed: RuntimeError: the process ended with signal 9" in text
        assert "* a pretrained model does not keep its function" in text
        assert "*" not in render_text(examples.deep(24)), "a model from scratch has no function to lose"
        over = replace(examples.smollm2(), budget_bytes=3 * 2**30)
        assert "!3.56" in render_text(over) and "! over the budget" in render_text(over)

    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize("width", [80, 100, 120])
    @pytest.mark.parametrize("color", [False, True])
    def test_fits_the_screen(self, name: str, width: int, color: bool) -> None:
        """No line is longer than the terminal, and the screen is one screen."""
        for profiles in ([ALL[name]()], [ALL[name](), examples.deep(8)]):
            lines = re.sub(r"\x1b\[[0-9;]*m", "", screen(profiles, width, color)).splitlines()
            assert max(map(len, lines)) <= width
            if name != "hostile":
                assert len(lines) <= 50

    def test_names_cannot_steer_the_terminal(self) -> None:
        """Escape codes and rich markup are shown, not obeyed."""
        for text in (render_text(examples.hostile()), screen([examples.hostile(), examples.deep(8)], 100)):
            assert "\x1b" not in text and "\u202e" not in text
        assert "[red]" in render_text(examples.hostile())

    def test_several_profiles_are_one_table(self) -> None:
        """One line per record."""
        text = screen([examples.smollm2(), examples.deep(24), examples.interrupted()], 100)
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(lines) == 5 and "incomplete" in lines[-1]

    def test_str_is_the_screen(self) -> None:
        """`print(profile)` shows it."""
        assert str(examples.lora()) == render_text(examples.lora())
