"""The traces of the figures of profiles hold the record's own values.

Run: python -m pytest tests/unit/test_profile_figures.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from autorev.analysis import Category
from autorev.format import format_bytes
from autorev.report import palette
from autorev.report.profile import view
from autorev.report.profile.figures import MOST_POINTS, thinned
from autorev.report.profile.view import front, front_points
from tests.helpers import profile_examples as examples
from tests.unit.test_profile_report import ALL, all_figures, memory_of, page_of, text_of


class TestFigures:
    """The traces hold the record's own values."""

    def test_the_bars_of_the_peak_are_the_categories(self) -> None:
        """Every segment is the bytes of that category in that method, and the figure beside it the allocator's."""
        profile = examples.smollm2()
        drawn = all_figures(profile)["peak"]
        titles = {"stored activations": Category.STORED_ACTIVATIONS, "logits and loss": Category.LOGITS_AND_LOSS}
        for trace in drawn["data"]:
            if trace["name"] in titles:
                for value, each in zip(trace["x"], profile.results, strict=True):
                    expected = each.memory.categories[titles[trace["name"]]] / 2**30
                    assert value == pytest.approx(expected, abs=1e-4)
        notes = [note["text"] for note in drawn["layout"]["annotations"]]
        assert notes == [format_bytes(each.memory.peak_bytes) for each in profile.results]

    def test_a_peak_without_categories_is_a_bar_all_the_same(self) -> None:
        """Where tensors cannot be followed, the allocator's figure is drawn and said to be unexplained."""
        base = examples.smollm2()
        blind = [replace(each.memory, attributed_bytes=None, categories={}, holders=()) for each in base.results]
        profile = replace(base, results=tuple(replace(r, memory=m) for r, m in zip(base.results, blind, strict=True)))
        (trace,) = all_figures(profile)["peak"]["data"]
        assert trace["name"] == "not attributed to a category"
        assert trace["x"][0] == pytest.approx(blind[0].peak_bytes / 2**30, abs=1e-4)

    def test_the_budget_is_a_line_where_it_is_near(self) -> None:
        """A budget far beyond every bar is left out of the drawing, and the page says so."""
        near, far = examples.deep(24), replace(examples.smollm2(), budget_bytes=2**40)
        assert len(all_figures(near)["peak"]["layout"]["shapes"]) == 1
        assert not all_figures(far)["peak"]["layout"]["shapes"]
        assert "is the budget of" in text_of(page_of(near))
        assert "far above every bar" in text_of(page_of(far))

    def test_the_front_holds_what_nothing_beats(self) -> None:
        """Every other method is beaten in one figure by one that is no worse in the other."""
        points = front_points(examples.smollm2())
        best = front(points)
        assert {id(result) for result, _, _ in best} < {id(result) for result, _, _ in points}
        for result, peak, rate in points:
            beaten = any(p <= peak and r >= rate and (p, r) != (peak, rate) for _, p, r in points)
            assert beaten != any(result is each for each, _, _ in best)

    def test_timelines_hold_the_records_points(self) -> None:
        """Time and bytes of every category, the three before-and-after methods first, on one scale."""
        profile = examples.smollm2()
        drawn = all_figures(profile)
        first, rest = view.with_timeline(profile)
        assert [each.method.name for each in first] == ["plain", "checkpoint", "momentum"]
        assert len(first) + len(rest) == 9 == sum(name.startswith("timeline-") for name in drawn)
        line = memory_of(profile, "plain").timeline
        traces = {trace["name"]: trace for trace in drawn["timeline-0"]["data"]}
        assert traces["parameters"]["x"] == [round(s, 5) for s in line.seconds]
        stored = [size / 2**30 for size in line.categories["stored_activations"]]
        assert traces["stored activations"]["y"] == pytest.approx(stored, abs=1e-4)
        assert len({tuple(figure["layout"]["yaxis"]["range"]) for n, figure in drawn.items() if "timeline" in n}) == 1

    def test_a_thinned_timeline_keeps_its_peak(self) -> None:
        """Of 2,000 points at most 600 are drawn, and the highest is one of them."""
        line = memory_of(examples.smollm2(), "plain").timeline
        times = 7
        long = replace(
            line,
            seconds=tuple(float(i) for i in range(times * len(line.seconds))),
            blocks=line.blocks * times,
            categories={
                name: tuple(size for size in sizes for _ in range(times)) for name, sizes in line.categories.items()
            },
        )
        # One point stands out at the top and one at the bottom, far from where a stretch begins.
        other = list(long.categories["other"])
        other[1001], other[1501] = 10**12, -(10**11)
        long = replace(long, categories={**long.categories, "other": tuple(other)})
        kept = thinned(long)
        totals = [sum(sizes[i] for sizes in long.categories.values()) for i in range(len(long.seconds))]
        assert len(kept) <= MOST_POINTS < len(totals) and kept == sorted(kept)
        assert max(totals[i] for i in kept) == max(totals) and min(totals[i] for i in kept) == min(totals)

    def test_phases_are_marked(self) -> None:
        """Each by its name, where it begins."""
        profile = examples.smollm2()
        layout = all_figures(profile)["timeline-0"]["layout"]
        assert {"forward", "backward", "optimizer"} <= {note["text"] for note in layout["annotations"]}
        begins = [mark[1] for mark in memory_of(profile, "plain").timeline.marks if mark[1] > 0]
        assert [shape["x0"] for shape in layout["shapes"] if shape["type"] == "line"] == begins

    def test_blocks_hold_bytes_and_times(self) -> None:
        """Plain, checkpoint and one reversible method, block by block."""
        profile = examples.smollm2()
        drawn = all_figures(profile)
        plain = profile.result("plain")
        kept, forward = drawn["kept-by-block"]["data"][0], drawn["forward-by-block"]["data"][0]
        assert kept["y"] == pytest.approx([size / 2**20 for size in plain.memory.block_bytes], abs=1e-3)
        assert forward["y"] == pytest.approx([block.forward * 1e3 for block in plain.work.blocks], abs=1e-3)
        assert [trace["name"] for trace in drawn["backward-by-block"]["data"]] == [
            "plain",
            "checkpoint",
            "momentum k=3",
        ]

    def test_the_overhead_and_the_rest_make_the_whole_step(self) -> None:
        """The segments of a bar add up to the instrumented step."""
        profile = examples.smollm2()
        traces = all_figures(profile)["overhead"]["data"]
        for place, each in enumerate(profile.results):
            assert sum(t["x"][place] for t in traces) == pytest.approx(each.work.instrumented_seconds, abs=1e-4)

    def test_what_is_not_told_apart_is_not_compared(self) -> None:
        """PyTorch recomputes within its backward pass: a grey bar would say that it recomputed nothing."""
        base = examples.smollm2()
        results = [
            replace(r, work=replace(r.work, overhead={})) if r.method.name == "checkpoint" else r for r in base.results
        ]
        profile = replace(base, results=tuple(results))
        rows = all_figures(profile)["overhead"]["layout"]["yaxis"]["ticktext"]
        assert "plain" in rows and "checkpoint" not in rows
        assert "that is not told apart: checkpoint." in text_of(page_of(profile))

    def test_a_curve_of_few_sizes_is_a_table(self) -> None:
        """Two points say nothing that their figures do not say better."""
        base = examples.deep(24)
        few = replace(base, points=tuple(p for p in base.points if p.value <= 2))
        assert "sweep-batch" not in all_figures(few)
        assert "batch, samples 1" in text_of(page_of(few)).replace("plain checkpoint momentum k=3 leapfrog ", "")

    def test_every_step_is_a_dot(self) -> None:
        """None is left out or averaged."""
        profile = examples.smollm2()
        for trace, each in zip(all_figures(profile)["steps"]["data"], profile.results, strict=True):
            assert trace["x"] == pytest.approx(list(each.samples), abs=1e-6)

    def test_predictions_are_ratios_to_the_measured_peak(self) -> None:
        """Predicted and attributed; a method without a prediction has no dot."""
        profile = examples.smollm2()
        predicted, attributed = all_figures(profile)["prediction"]["data"]
        for place, each in enumerate(profile.results):
            measured = each.memory.peak_bytes
            expected = each.prediction and pytest.approx(each.prediction.peak_bytes / measured, abs=1e-4)
            assert predicted["x"][place] == expected
            assert attributed["x"][place] == pytest.approx(each.memory.attributed_bytes / measured, abs=1e-4)

    def test_sweeps_hold_their_points_and_what_did_not_fit(self) -> None:
        """Measured peaks as lines; each size that was stopped as a cross on the budget."""
        profile = examples.deep(24)
        traces = all_figures(profile)["sweep-batch"]["data"]
        points = [p for p in profile.points if p.method == "leapfrog" and p.peak_bytes]
        line = next(trace for trace in traces if trace["name"] == "leapfrog")
        assert line["x"] == [point.value for point in points]
        stopped = next(trace for trace in traces if trace["name"] == "did not fit")
        assert stopped["x"] == [point.value for point in profile.points if point.peak_bytes is None]

    def test_throughput_at_the_largest_batch(self) -> None:
        """Batch times sequence over the median of the timed steps there."""
        profile = examples.deep(24)
        (trace,) = all_figures(profile)["largest-batch"]["data"]
        points = [point for point in profile.points if point.largest and point.value]
        expected = [point.value * 64 / point.step_seconds for point in points]
        assert trace["x"] == pytest.approx(expected, abs=1e-3)

    def test_methods_of_one_method_can_be_told_apart(self) -> None:
        """Same colour, other symbol."""
        looks = view.looks(examples.smollm2())
        momentum = [look for spec, look in looks.items() if spec.startswith("momentum")]
        assert len({look.color for look in momentum}) == 1
        assert len({look.symbol for look in momentum}) == len(momentum) == 4

    @pytest.mark.parametrize("name", ALL)
    def test_every_color_has_its_dark_counterpart(self, name: str) -> None:
        """The page swaps light colours for dark ones by exact match."""
        profile = ALL[name]()
        drawn = all_figures(profile) | all_figures(profile, profile)
        for figure in drawn.values():
            assert set(re.findall(r"#[0-9a-f]{6}\b", json.dumps(figure))) <= palette.DARK_FOR_LIGHT.keys()
