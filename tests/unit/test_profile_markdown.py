"""Profiles as GitHub's tables."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from autorev.profiler.record import Profile
from autorev.report.render import render_markdown
from tests.helpers import profile_examples as examples


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, without the line of marks."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    cells = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]
    return [[[cell.strip() for cell in row] for row in table[:1] + table[2:]] for table in cells]


def row(profile: Profile, name: str) -> dict[str, str]:
    """The cells of one method by their headings."""
    head, *rows = tables(render_markdown([profile]))[0]
    return next(dict(zip(head, cells, strict=True)) for cells in rows if cells[0].strip("*") == name)


def test_the_heading_says_what_was_run_where() -> None:
    """Model, what trains, size, dtype, machine and day, and the command below."""
    text = render_markdown([examples.lora()])
    assert text.startswith(
        "### SmolLM2-135M-Instruct, LoRA of rank 16, batch 4 x 256 tokens, fp32, Intel Xeon Platinum 8481C, 2026-11-26"
    )
    assert f"\n\n`{examples.lora().command}`\n\n" in text
    assert "batch 32, fp32" in render_markdown([examples.unequal()])


def test_a_row_per_method_in_numbers() -> None:
    """Peak, share of plain, kept, time, spread, throughput, fidelity, and the prediction against the measurement."""
    assert row(examples.smollm2(), "momentum k=3") == {
        "method": "momentum k=3",
        "peak": "2.09 GiB",
        "of plain": "59 %",
        "kept": "399 MiB",
        "s/step (median)": "8.57 s",
        "spread": "2.9%",
        "tokens/s": "120",
        "gradient error": "3.1e-07",
        "loss change": "+0.011",
        "predicted/measured peak": "0.995",
    }
    assert len(tables(render_markdown([examples.smollm2()]))[0]) == 1 + 9


def test_the_recommended_method_is_bold() -> None:
    """One row, and only that."""
    rows = tables(render_markdown([examples.smollm2()]))[0]
    assert [cells[0] for cells in rows if "*" in cells[0]] == ["**checkpoint**"]


def test_what_loses_the_function_says_so_of_a_pretrained_model() -> None:
    """From scratch it is no reproach."""
    assert row(examples.smollm2(), "leapfrog (from scratch only)")
    assert row(examples.deep(24), "leapfrog")


def test_what_was_not_measured_says_why() -> None:
    """Status instead of the peak, no figures, and the reasons below; doubtful times are marked."""
    profile = examples.unequal()
    plain = row(profile, "plain")
    assert plain.pop("peak") == "out of memory"
    assert set(plain.values()) == {"plain", "-"}
    assert row(profile, "hamiltonian (from scratch only)")["peak"] == "refused"
    assert row(profile, "momentum k=3")["spread"].endswith("%, in doubt")
    assert row(profile, "momentum k=3")["samples/s"] == "1.03"
    assert "\n- sac: failed; RuntimeError: the process ended with signal 9 in round 1\n" in render_markdown([profile])


def test_interrupted_and_predicted_records_are_told_apart() -> None:
    """A prediction is never shown as a measurement."""
    assert "The run is not complete" in render_markdown([examples.interrupted()])
    assert "The run is not complete" not in render_markdown([examples.smollm2()])
    assert row(examples.interrupted(), "offload")["peak"] == "pending"
    assert row(examples.interrupted(), "sac")["peak"] == "2.58 GiB"
    assert row(examples.predicted_only(), "offload")["peak"] == "2.06 GiB, predicted"


def test_throughput_at_the_largest_batch_over_depths() -> None:
    """Rows are methods, columns are depths in order, whatever the order of the records."""
    profiles = [examples.deep(96), examples.smollm2(), examples.deep(12)]
    text = render_markdown(profiles)
    assert "### Throughput at the largest batch\n\nIn tokens a second within +128MiB; the batch in brackets." in text
    head, *rows = tables(text)[-1]
    assert head == ["method", "12 blocks", "96 blocks"]
    assert rows[0] == ["plain", "330 (4)", "does not fit"]
    assert [cells[0] for cells in rows] == ["plain", "checkpoint", "momentum k=3", "leapfrog"]
    largest = next(p for p in examples.deep(96).points if p.largest and p.method == "checkpoint")
    assert largest.step_seconds is not None
    assert rows[1][2] == f"{largest.value * 64 / largest.step_seconds:.3g} ({largest.value})"


def test_records_of_one_depth_keep_apart() -> None:
    """They are told by their names, and a method that one did not sweep has no figure there."""
    fewer = tuple(point for point in examples.deep(12).points if point.method != "leapfrog")
    other = replace(examples.deep(12), name="other", points=fewer)
    head, *rows = tables(render_markdown([examples.deep(12), other]))[-1]
    assert head == ["method", "gpt2-512-12, 12 blocks", "other, 12 blocks"]
    assert rows[-1][0] == "leapfrog" and rows[-1][2] == "-"


def test_no_sweeps_no_table_and_no_records_nothing() -> None:
    """A sweep of the sequence is none of the batch."""
    assert "largest batch" not in render_markdown([examples.lora()])
    assert render_markdown([]) == ""


@pytest.mark.parametrize("profile", examples.all_examples(), ids=lambda profile: profile.name)
def test_names_break_no_table_and_open_no_tag(profile: Profile) -> None:
    """Every row has the heading's cells, and no markup or control character gets through."""
    text = render_markdown([profile, examples.hostile()])
    for table in tables(text):
        assert len({len(cells) for cells in table}) == 1
    bare = re.sub(r"`[^`\n]*`", "", text)
    assert "<" not in bare and "[red]" not in bare
    assert "\x1b" not in text and "\u202e" not in text
    assert len(re.findall(r"^#", text, re.MULTILINE)) == len(re.findall(r"^### ", text, re.MULTILINE))
