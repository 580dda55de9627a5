"""A profile's record: written whole, read back, and refused when it is not what was written."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from autorev.errors import RecordError
from autorev.profiler.readings import Round
from autorev.profiler.record import Point, Profile, Result, Status
from tests.helpers import profile_examples as examples


def timed(*seconds: float) -> Result:
    """A result with steps of these lengths, a fifth of each in the optimiser."""
    parts = [tuple(share * s for s in seconds) for share in (0.3, 0.5, 0.2)]
    return Result(examples.METHODS["plain"].method, Status.MEASURED, rounds=(Round(0, *parts),))


def edited(profile: Profile, find: str, put: str) -> str:
    """The record's text with one thing changed by hand."""
    text = profile.to_json()
    assert find in text
    return text.replace(find, put, 1)


@pytest.mark.parametrize("number", range(len(examples.all_examples())))
def test_what_is_written_is_read_back(number: int, tmp_path: Path) -> None:
    """Every kind of profile survives its JSON, floats and control characters included."""
    profile = examples.all_examples()[number]
    assert Profile.from_json(profile.to_json()) == profile
    assert Profile.read(profile.write_into(tmp_path)) == profile


def test_order_and_white_space_are_no_edit() -> None:
    """A formatter may have gone over the file."""
    profile = examples.unequal()
    data = json.loads(profile.to_json())
    again = json.dumps(dict(reversed(data.items())), indent=4)
    assert Profile.from_json(again) == profile


def test_truncated_is_said_with_its_line() -> None:
    """Half a file is no record."""
    text = examples.unequal().to_json()
    with pytest.raises(RecordError, match=r"^half\.json is not valid JSON \(line \d+, .*truncated"):
        Profile.from_json(text[: len(text) // 2], "half.json")


def test_a_figure_changed_by_hand_is_no_measurement() -> None:
    """The digest covers every number."""
    profile = examples.unequal()
    peak = next(r.memory.peak_bytes for r in profile.results if r.memory)
    with pytest.raises(RecordError, match="digest does not match"):
        Profile.from_json(edited(profile, f'"peak_bytes": {peak}', f'"peak_bytes": {peak - 1}'))


def test_a_missing_or_unknown_field_is_named() -> None:
    """The shape is checked too, and the first problems are said."""
    with pytest.raises(RecordError, match=r"does not follow its schema: .*pretrained"):
        Profile.from_json(edited(examples.unequal(), '"pretrained": true,', ""))
    with pytest.raises(RecordError, match=r"does not follow its schema: .*extra"):
        Profile.from_json(edited(examples.unequal(), '"pretrained": true,', '"pretrained": true, "extra": 1,'))


def test_another_version_is_refused_with_both_numbers() -> None:
    """An older schema is not guessed at."""
    now, old = '"schema_version": 3', '"schema_version": 1'
    with pytest.raises(RecordError, match=r"has schema version 1, .* reads 3"):
        Profile.from_json(edited(examples.unequal(), now, old))


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"model": {}}'])
def test_other_json_is_no_record(text: str) -> None:
    """Valid JSON of something else."""
    with pytest.raises(RecordError, match="is no record of a profile"):
        Profile.from_json(text)


def test_an_unreadable_file_is_named_with_its_reason(tmp_path: Path) -> None:
    """Missing, a folder, not text."""
    with pytest.raises(RecordError, match=r"none\.json cannot be read: No such file"):
        Profile.read(tmp_path / "none.json")
    with pytest.raises(RecordError, match="cannot be read: Is a directory"):
        Profile.read(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="cannot be read: it is not text"):
        Profile.read(tmp_path / "bytes.json")


def test_writing_replaces_the_record_and_leaves_nothing_else(tmp_path: Path) -> None:
    """Folders are made, the old record goes, and no part of a file stays."""
    folder = tmp_path / "new" / "folder"
    first = examples.unequal()
    path = first.write_into(folder)
    assert replace(first, notes=("again",)).write_into(folder) == path == folder / "vit-base.json"
    assert Profile.read(path).notes == ("again",)
    assert [each.name for each in folder.iterdir()] == ["vit-base.json"]


def test_a_write_that_breaks_off_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads meanwhile sees the old record, whole."""
    profile = examples.unequal()
    path = profile.write_into(tmp_path)
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"vit-base\.json cannot be written: No space left on device"):
        replace(profile, notes=("lost",)).write_into(tmp_path)
    assert path.read_bytes() == before


def test_links_in_a_circle_cannot_be_written_to(tmp_path: Path) -> None:
    """Told in one line, like any file that cannot be."""
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(RecordError, match=r"loop\.json cannot be written: .*symbolic links"):
        examples.unequal().write(loop)


def test_median_and_spread_are_of_all_rounds() -> None:
    """The quartiles of 1, 2, 3, 4, 5 are 2 and 4, so that the spread is 2/3 of the median."""
    result = timed(1, 2, 3, 4, 5)
    assert result.step_seconds == pytest.approx(3)
    assert result.spread == pytest.approx(2 / 3)
    assert result.phase_seconds("backward") == pytest.approx(1.5)
    two = replace(result, rounds=(*timed(1, 1).rounds, *timed(3, 3).rounds))
    assert two.samples == pytest.approx((1, 1, 3, 3))
    assert two.step_seconds == pytest.approx(2)


@pytest.mark.parametrize(
    ("seconds", "doubtful"), [((1, 1), True), ((1.0, 1.0, 1.0), False), ((0.8, 1, 1.2), True), ((0.96, 1, 1.04), False)]
)
def test_doubt_begins_at_a_tenth_or_with_too_few_samples(seconds: tuple[float, ...], doubtful: bool) -> None:
    """Two samples have no quartiles; beyond 10 % of the median small differences mean nothing."""
    assert timed(*seconds).in_doubt is doubtful


def test_nothing_timed_has_no_median() -> None:
    """None, not 0."""
    result = Result(examples.METHODS["plain"].method, Status.PENDING)
    assert (result.step_seconds, result.spread, result.phase_seconds("forward")) == (None, None, None)
    assert Point("batch", 1, "plain", Status.MEASURED, 1).step_seconds is None


def test_throughput_counts_tokens_or_samples() -> None:
    """Batch times sequence, or the batch alone; at another size where one is given."""
    text, images = examples.smollm2(), examples.unequal()
    assert (text.units, images.units) == ("tokens", "samples")
    assert text.per_second(2.0) == 4 * 256 / 2
    assert text.per_second(2.0, batch=8) == 8 * 256 / 2
    assert text.per_second(2.0, sequence=512) == 4 * 512 / 2
    assert images.per_second(4.0) == 32 / 4
    assert text.per_second(None) is None


def test_utilisation_is_of_the_devices_peak() -> None:
    """Work by time by peak; unknown without a device or a time."""
    profile = examples.smollm2()
    result = profile.results[0]
    assert result.work is not None and result.step_seconds is not None and profile.device is not None
    expected = result.work.flops / result.step_seconds / profile.device.peak_flops
    assert profile.utilisation(result) == pytest.approx(expected)
    assert replace(profile, device=None).utilisation(result) is None
    assert profile.utilisation(replace(result, rounds=())) is None


def test_a_result_replaces_that_of_its_method_or_is_added() -> None:
    """The order stays."""
    profile = examples.unequal()
    specs = [r.method.spec for r in profile.results]
    waiting = Result(profile.results[2].method, Status.PENDING)
    again = profile.with_result(waiting)
    assert [r.method.spec for r in again.results] == specs
    assert again.result("sac") is waiting
    new = Result(examples.METHODS["leapfrog"].method, Status.PENDING)
    assert [r.method.spec for r in again.with_result(new).results] == [*specs, "leapfrog"]
    assert profile.result("nothing") is None


def test_the_examples_agree_with_themselves() -> None:
    """What reports are tested with: categories, holders and phases come to the peak, and so does the timeline."""
    for profile in examples.all_examples():
        for result in profile.results:
            memory = result.memory
            if memory is None:
                continue
            assert memory.timeline is not None
            assert sum(memory.categories.values()) == memory.attributed_bytes
            assert sum(holder.bytes for holder in memory.holders) == memory.attributed_bytes
            assert max(memory.phase_peaks.values()) == memory.phase_peaks[memory.phase] == memory.peak_bytes
            totals = [sum(point) for point in zip(*memory.timeline.categories.values(), strict=True)]
            assert max(totals) == totals[memory.timeline.peak_at] == memory.attributed_bytes
            assert len(totals) == len(memory.timeline.seconds)
    assert re.search(r"[<\x1b]", examples.hostile().model.name)
