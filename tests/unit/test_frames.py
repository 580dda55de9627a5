"""Tables and traces of profiles, as other programs read them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from autorev.errors import MissingPackageError, RecordError
from autorev.profiler.frames import points_frame, results_frame, steps_frame, write_tables
from autorev.profiler.record import Profile
from autorev.profiler.trace import write_trace
from tests.helpers import profile_examples as examples

RECORDED = Path(__file__).parents[2] / "profiles" / "recorded" / "smollm2_lora_128.json"


def trace(profile: Profile, folder: Path) -> list[dict[str, Any]]:
    """The events of its trace."""
    events: list[dict[str, Any]] = json.loads(write_trace(profile, folder / "t.json").read_text())["traceEvents"]
    return events


def of_kind(events: list[dict[str, Any]], kind: str, process: int = 1) -> list[dict[str, Any]]:
    """The events `ph` of one process; spans by their category."""
    return [e for e in events if e["pid"] == process and kind in (e["ph"], e.get("cat"))]


class TestFrames:
    """One row per what there is one of."""

    def test_one_row_per_record_and_method(self) -> None:
        """Measured or not, in order."""
        profiles = [examples.smollm2(), examples.unequal()]
        frame = results_frame(profiles)
        expected = [(p.name, r.method.spec, r.status.value) for p in profiles for r in p.results]
        assert list(frame[["record", "method", "status"]].itertuples(index=False, name=None)) == expected

    def test_figures_are_those_of_the_record(self) -> None:
        """Memory, time, throughput and fidelity of one method."""
        profile = examples.smollm2()
        result = profile.result("momentum:k=3")
        assert result and result.memory and result.fidelity and result.prediction and result.work
        row = results_frame([profile]).set_index("method").loc["momentum:k=3"]
        assert row.peak_bytes == result.memory.peak_bytes
        assert row.backward_peak_bytes == result.memory.phase_peaks["backward"]
        assert row.streams_bytes == result.memory.categories["streams"]
        plain = profile.result("plain")
        assert plain and plain.memory
        assert row.peak_of_plain == pytest.approx(result.memory.peak_bytes / plain.memory.peak_bytes)
        assert row.step_seconds == result.step_seconds
        assert row.optimizer_seconds == result.phase_seconds("optimizer")
        assert row.per_second == pytest.approx(1024 / result.step_seconds)
        assert row.recomputation_seconds == result.work.overhead["recomputation"]
        assert (row.loss_nats, row.gradient_error) == (result.fidelity.loss, result.fidelity.gradient_error)
        assert row.predicted_peak_bytes == result.prediction.peak_bytes

    def test_what_there_is_not_is_empty_and_integers_stay_integers(self) -> None:
        """A column's type does not depend on whether a figure is missing."""
        frame = results_frame([examples.unequal()]).set_index("method")
        assert frame.peak_bytes.isna()["plain"] and pd.isna(frame.step_seconds["sac"])
        assert frame.sequence.isna().all()
        full = results_frame([examples.smollm2()])
        assert list(full.dtypes.items()) == list(results_frame([examples.unequal()]).dtypes.items())
        assert list(results_frame([]).columns) == list(full.columns)
        assert str(frame.peak_bytes.dtype) == "Int64"

    def test_to_frame_is_the_same(self) -> None:
        """`Profile.to_frame` is the table of one record."""
        pd.testing.assert_frame_equal(examples.lora().to_frame(), results_frame([examples.lora()]))

    def test_one_row_per_timed_step(self) -> None:
        """Two rounds of four steps for each method; the phases add up to the step."""
        frame = steps_frame([examples.smollm2(), examples.predicted_only()])
        assert len(frame) == 9 * 2 * 4
        assert list(frame["round"][:8]) == [0, 0, 0, 0, 1, 1, 1, 1]
        assert list(frame["step"][:8]) == [0, 1, 2, 3, 0, 1, 2, 3]
        total = frame.forward_seconds + frame.backward_seconds + frame.optimizer_seconds
        pd.testing.assert_series_equal(total, frame.step_seconds, check_names=False)

    def test_one_row_per_point_with_throughput_at_its_own_size(self) -> None:
        """A batch of 24 counts 24 samples, a sequence its own tokens."""
        deep, context = examples.deep(24), examples.lora()
        frame = points_frame([deep, context])
        assert len(frame) == len(deep.points) + len(context.points)
        for profile, axis, times in ((deep, "batch", 64), (context, "sequence", 4)):
            rows = frame[(frame.record == profile.name) & (frame.axis == axis) & frame.largest]
            assert (rows.per_second == (rows.value * times / rows.step_seconds).astype(float)).all()
        over = frame[frame.status == "out of memory"]
        assert over.peak_bytes.isna().all() and over.per_second.isna().all() and not over.largest.any()


class TestFiles:
    """What is written, and what is said when it cannot be."""

    def test_csv_holds_the_three_tables(self, tmp_path: Path) -> None:
        """Results, steps and sweeps, hostile names included; folders are made."""
        profiles = examples.all_examples()
        paths = write_tables(profiles, tmp_path / "made" / "all.csv")
        assert [path.name for path in paths] == ["all.csv", "all.steps.csv", "all.points.csv"]
        frames = [results_frame(profiles), steps_frame(profiles), points_frame(profiles)]
        for path, frame in zip(paths, frames, strict=True):
            read = pd.read_csv(path, lineterminator="\n")
            assert list(read.columns) == list(frame.columns) and len(read) == len(frame)
        peaks = pd.read_csv(paths[0], dtype=str).peak_bytes.dropna()
        assert peaks.str.fullmatch(r"\d+").all()

    def test_csv_takes_names_that_are_no_text(self, tmp_path: Path) -> None:
        """Half a surrogate, as a file name of other bytes gives it."""
        profile = examples.unequal()
        write_tables([replace(profile, model=replace(profile.model, name="\udcff"))], tmp_path / "a.csv")
        assert pd.read_csv(tmp_path / "a.csv").model[0] == "?"

    def test_an_unwritable_path_is_named(self, tmp_path: Path) -> None:
        """An OS error becomes a sentence with the path and what to do."""
        (tmp_path / "file").write_text("")
        for write in (write_tables, lambda p, path: write_trace(p[0], path)):
            with pytest.raises(RecordError, match=r"file.* cannot be written: .*; name another (file|folder)"):
                write([examples.unequal()], tmp_path / "file" / "out")
        with pytest.raises(RecordError, match="cannot be written: Is a directory"):
            write_tables([examples.unequal()], tmp_path)

    def test_parquet_says_what_it_needs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """pyarrow is optional."""
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(
            MissingPackageError, match=r"needs pyarrow, which is not installed: .*install .*\[parquet\]"
        ):
            write_tables([examples.unequal()], tmp_path / "out.parquet", "parquet")
        assert not list(tmp_path.iterdir())

    def test_parquet_is_read_back(self, tmp_path: Path) -> None:
        """The same figures and the same missing ones."""
        pytest.importorskip("pyarrow")
        profiles = examples.all_examples()
        paths = write_tables(profiles, tmp_path / "out.parquet", "parquet")
        for path, make in zip(paths, (results_frame, steps_frame, points_frame), strict=True):
            expected = make(profiles)
            assert pd.read_parquet(path).astype(expected.dtypes.to_dict()).equals(expected)


class TestTrace:
    """The Trace Event Format: processes, tracks, spans and counters."""

    def test_every_method_is_a_process_with_its_name(self, tmp_path: Path) -> None:
        """What was not traced is left out."""
        events = trace(examples.unequal(), tmp_path)
        names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        assert names == {2: "checkpoint", 4: "momentum k=3"}

    def test_phases_are_those_of_the_traced_step(self, tmp_path: Path) -> None:
        """In microseconds."""
        profile = examples.smollm2()
        result = profile.results[0]
        assert result.memory and result.memory.timeline
        spans = of_kind(trace(profile, tmp_path), "phase")
        for span, (phase, begin, end) in zip(spans, result.memory.timeline.marks, strict=True):
            assert span["name"] == phase and span["ph"] == "X"
            assert (span["ts"], span["ts"] + span["dur"]) == pytest.approx((1e6 * begin, 1e6 * end))

    def test_blocks_run_forward_and_then_backward_within_their_phases(self, tmp_path: Path) -> None:
        """In order, and in reverse order, none overlapping."""
        events = trace(Profile.read(RECORDED), tmp_path)
        phases = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in of_kind(events, "phase")}
        blocks = of_kind(events, "block")
        paths = [f"model.layers.{i}" for i in range(30)]
        assert [b["name"] for b in blocks] == [*paths, *reversed(paths)]
        ends = [(b["ts"], b["ts"] + b["dur"]) for b in blocks]
        assert all(one[1] <= two[0] + 1e-3 for one, two in pairwise(ends))
        assert ends[0][0] >= phases["forward"][0] and ends[29][1] <= phases["forward"][1] + 1e-3
        assert ends[30][0] >= phases["backward"][0] - 1e-3 and ends[59][1] <= phases["backward"][1] + 1e-3

    def test_counters_are_the_timeline(self, tmp_path: Path) -> None:
        """One event per point, one series per category, and the peak is marked."""
        profile = examples.smollm2()
        memory = profile.results[1].memory
        assert memory and memory.timeline
        events = trace(profile, tmp_path)
        counters = of_kind(events, "C", 2)
        assert len(counters) == len(memory.timeline.seconds)
        highest = counters[memory.timeline.peak_at]
        assert sum(highest["args"].values()) == memory.attributed_bytes
        assert highest["args"]["logits and loss"] == memory.categories["logits_and_loss"]
        (mark,) = of_kind(events, "i", 2)
        assert mark["ts"] == highest["ts"] and mark["name"] == "peak: 2.14 GiB"

    def test_hostile_names_stay_data(self, tmp_path: Path) -> None:
        """The file is JSON whatever a module is called."""
        events = trace(examples.hostile(), tmp_path)
        assert any(e["name"].startswith(examples.HOSTILE) for e in of_kind(events, "block", 2))
