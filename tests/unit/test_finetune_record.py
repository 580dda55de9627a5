"""A fine-tuning's record: written whole, read back, refused when it is not what was written, and what follows from it.

Run: python -m pytest tests/unit/test_finetune_record.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from autorev.errors import RecordError
from autorev.finetuning.record import Evaluation, FineTuning
from autorev.records import kind_of
from tests.helpers import analysis_examples, profile_examples
from tests.helpers import finetune_examples as examples


def edited(run: FineTuning, find: str, put: str) -> str:
    """The record's text with one thing changed by hand."""
    text = run.to_json()
    assert find in text
    return text.replace(find, put, 1)


@pytest.mark.parametrize("name", examples.ALL)
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    """Every kind of run survives its JSON, control characters included, and nothing else is left in the folder."""
    run = examples.ALL[name]()
    assert FineTuning.from_json(run.to_json()) == run
    path = run.write(tmp_path / "new" / "run.json")
    assert FineTuning.read(path) == run
    assert [each.name for each in path.parent.iterdir()] == ["run.json"]


def test_order_and_white_space_are_no_edit() -> None:
    """A formatter may have gone over the file."""
    run = examples.calibrated()
    again = json.dumps(dict(reversed(json.loads(run.to_json()).items())), indent=4)
    assert FineTuning.from_json(again) == run


def test_truncated_is_said_with_its_line() -> None:
    """Half a file is no record."""
    text = examples.momentum().to_json()
    with pytest.raises(RecordError, match=r"^half\.json is not valid JSON \(line \d+, .*truncated"):
        FineTuning.from_json(text[: len(text) // 2], "half.json")


def test_a_loss_changed_by_hand_is_no_measurement() -> None:
    """The digest covers every number."""
    with pytest.raises(RecordError, match="digest does not match"):
        FineTuning.from_json(edited(examples.momentum(), '"loss": 2.728', '"loss": 2.628'))


def test_a_missing_or_unknown_field_is_named() -> None:
    """The shape is checked too, and the first problems are said."""
    for put, name in (("", "pretrained"), ('"pretrained": true, "extra": 1,', "extra")):
        with pytest.raises(RecordError, match=f"does not follow its schema: .*{name}"):
            FineTuning.from_json(edited(examples.momentum(), '"pretrained": true,', put))


def test_another_version_or_kind_is_refused() -> None:
    """An older schema is not guessed at, and a profile is no fine-tuning."""
    now, old = '"schema_version": 3', '"schema_version": 1'
    with pytest.raises(RecordError, match=r"has schema version 1, .* reads 3"):
        FineTuning.from_json(edited(examples.momentum(), now, old))
    with pytest.raises(RecordError, match="is no record of a fine-tuning"):
        FineTuning.from_json("{}")
    with pytest.raises(RecordError):
        FineTuning.from_json(profile_examples.lora().to_json())


def test_a_file_says_its_kind(tmp_path: Path) -> None:
    """Also a broken one, and none at all."""
    run = examples.momentum().write(tmp_path / "run.json")
    assert kind_of(run) == "fine-tuning"
    assert kind_of(profile_examples.lora().write_into(tmp_path)) == "profile"
    assert kind_of(analysis_examples.smollm2().write(tmp_path / "a.json")) == "analysis"
    (tmp_path / "list.json").write_text('["fine-tuning"]')
    (tmp_path / "half.json").write_text(run.read_text()[:200])
    for path in (tmp_path / "list.json", tmp_path / "half.json", tmp_path / "none.json"):
        assert kind_of(path) is None
    with pytest.raises(RecordError, match="cannot be read"):
        FineTuning.read(tmp_path / "none.json")


class TestProperties:
    """What is derived from the samples."""

    def test_the_first_evaluation_is_before_training_and_the_last_only_counts_when_it_is_complete(self) -> None:
        """An interrupted run has no final loss."""
        run = examples.momentum()
        assert run.zero_shot == run.evaluations[0] and run.final == run.evaluations[-1]
        assert examples.interrupted().final is None
        assert examples.interrupted().zero_shot == run.zero_shot
        assert replace(run, evaluations=run.evaluations[1:]).zero_shot is None
        assert replace(run, evaluations=()).final is None

    def test_steps_whose_memory_was_looked_at_do_not_count_for_time(self) -> None:
        """Looking slows them."""
        run = examples.momentum()
        timed = [row.seconds for row in run.logged if row.peak_bytes is None]
        assert len(timed) < len(run.logged)
        assert run.step_seconds == median(timed)
        assert run.tokens_per_second == pytest.approx(192 / median(timed))
        assert run.peak_bytes == max(row.peak_bytes for row in run.logged if row.peak_bytes)

    def test_side_bits_before_and_after(self) -> None:
        """A schedule moves them; plain training has none."""
        run = examples.scheduled()
        assert (run.side_bits(last=False), run.side_bits()) == (3.0, 0.0)
        assert examples.plain().side_bits() is None

    def test_nothing_follows_from_nothing(self) -> None:
        """A run that was stopped before its first step."""
        run = examples.begun()
        found = (run.zero_shot, run.final, run.peak_bytes, run.step_seconds, run.tokens_per_second, run.side_bits())
        assert found == (None,) * 6

    def test_perplexity_is_the_exponential_of_the_loss(self) -> None:
        """And infinite instead of an error."""
        assert Evaluation(0, 1.0).perplexity == pytest.approx(2.71828, abs=1e-5)
        assert Evaluation(0, 1000.0).perplexity == float("inf")
