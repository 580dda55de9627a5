"""Fine-tunings as GitHub's tables.

Run: python -m pytest tests/unit/test_finetune_markdown.py
"""

from __future__ import annotations

import re

import pytest

from autorev.finetuning.record import FineTuning
from autorev.report.render import render_markdown
from tests.helpers import finetune_examples as examples
from tests.helpers.finetune_examples import ALL, many
from tests.unit.test_profile_markdown import tables


def row(runs: list[FineTuning], name: str, table: int = 0) -> dict[str, str]:
    """The cells of one run by their headings."""
    head, *rows = tables(render_markdown(runs))[table]
    return next(dict(zip(head, cells, strict=True)) for cells in rows if cells[0].split(":")[0] == name)


def test_a_heading_for_each_model_and_its_commands() -> None:
    """Model, what trains, machine and day; the commands below, each a line; then the table."""
    text = render_markdown(many())
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    where = "Intel Xeon Platinum 8481C, 2026-11-26"
    assert headings == [
        f"SmolLM2-135M-Instruct, all weights and LoRA of rank 16, {where}",
        f"gpt2-shape, from scratch, {where}",
    ]
    assert len(tables(text)) == 2
    for run in many():
        assert f"`{run.command}`" in text[: text.rindex("\n| ")]


def test_a_row_per_run_in_numbers() -> None:
    """What the README shows."""
    assert row([examples.plain(), examples.momentum(), examples.scheduled()], "momentum_k3") == {
        "run": "momentum_k3: momentum k=3, rate 5e-05, seed 0",
        "trains": "all weights",
        "steps": "40",
        "side bits": "3",
        "original": "2.900",
        "before training": "2.904 (+0.004)",
        "after training": "**2.731** (ppl 15.3)",
        "as the plain": "2.728 (-0.003)",
        "against plain training": "+0.002",
        "agreement": "66.4 % (KL 0.042)",
        "peak": "1.86 GiB",
        "tokens/s": "101 (1.90 s)",
        "teacher": "-",
    }


def test_from_scratch_by_coupling() -> None:
    """A table of its own."""
    found = row(many(), "midpoint", table=1)
    assert found["loss after training"] == "**4.340** (mean of 2 seeds)"
    assert found["against plain"] == "+0.120 (mean of 2 seeds)"
    assert found["each seed"] == "4.330 (0), 4.350 (1)"


def test_what_is_not_complete_says_so() -> None:
    """Nobody takes a half for the whole."""
    assert "Not complete: interrupted; `--resume` goes on with it." in render_markdown(many())
    assert "Not complete" not in render_markdown([examples.momentum()])
    assert row([examples.interrupted()], "interrupted")["after training"] == "- (2.779 at step 10)"
    assert render_markdown([]) == ""


@pytest.mark.parametrize("name", ALL)
def test_names_break_no_table_and_open_no_tag(name: str) -> None:
    """Every row has the heading's cells, and no markup or control character gets through."""
    text = render_markdown([ALL[name](), examples.hostile(), examples.plain()])
    for table in tables(text):
        assert len({len(cells) for cells in table}) == 1
    bare = re.sub(r"`[^`\n]*`", "", text)
    assert "<" not in bare and "[red]" not in bare
    assert "\x1b" not in text and "\u202e" not in text
    assert len(re.findall(r"^#", text, re.MULTILINE)) == len(re.findall(r"^### ", text, re.MULTILINE))
