"""Tables, sentences and names of a profile's reports.

Run: python -m pytest tests/unit/test_profile_tables.py
"""

from __future__ import annotations

from dataclasses import replace

from autorev.format import format_bytes, format_integer, format_seconds
from autorev.profiler.readings import Round
from autorev.profiler.record import Profile, Result
from autorev.report.profile import peak, view
from autorev.report.profile.sweep_tables import reach_table, sweep_table
from autorev.report.profile.tables import glance, prediction_table, state, time_table
from autorev.report.render import render_text
from tests.helpers import profile_examples as examples
from tests.unit.test_profile_report import bare, cell, memory_of, page_of, text_of


class TestTables:
    """The figures as text."""

    def test_the_glance_compares_with_plain_and_checkpoint(self) -> None:
        """Shares and changes are those of the record's own figures."""
        profile = examples.smollm2()
        rows = {row.head: row for row in glance(profile).rows}
        plain, checkpoint = profile.result("plain"), profile.result("checkpoint")
        row = rows["checkpoint"]
        assert cell(row, 0) == format_bytes(checkpoint.memory.peak_bytes)
        assert cell(row, 1) == f"{100 * checkpoint.memory.peak_bytes / plain.memory.peak_bytes:.0f} %"
        assert cell(row, 5) == f"{100 * (checkpoint.step_seconds / plain.step_seconds - 1):+.0f} %"
        assert cell(rows["momentum k=2"], 8) == "+0.137"

    def test_doubtful_times_are_flagged_in_words(self) -> None:
        """Wide quartiles, and too few steps to have any."""
        text = text_of(page_of(examples.unequal()))
        spread = examples.unequal().result("momentum:k=3").spread
        assert f"spread {100 * spread:.0f} %: small differences mean nothing" in text
        base = examples.smollm2()
        few = bare(base, rounds=(Round(1, (1.0, 1.0), (2.0, 2.0), (0.1, 0.1)),))
        assert "2 steps only: small differences mean nothing" in text_of(page_of(few))
        assert "small differences mean nothing" not in text_of(page_of(base))

    def test_times_hold_phases_work_and_utilisation(self) -> None:
        """As medians, from all rounds."""
        profile = examples.smollm2()
        row = time_table(profile).rows[0]
        plain = profile.result("plain")
        assert cell(row, 0) == format_seconds(plain.step_seconds)
        assert cell(row, 3) == format_seconds(plain.phase_seconds("backward"))
        assert cell(row, 7) == f"{100 * profile.utilisation(plain):.0f} %"
        assert cell(row, 8) == "8 in 2 rounds"

    def test_sweeps_say_what_did_not_fit(self) -> None:
        """Peak, throughput, or that the step was stopped."""
        profile = examples.deep(24)
        table = sweep_table(profile, "batch")
        at = table.heads.index("plain") - 1
        stopped = next(p.value for p in profile.points if p.method == "plain" and p.peak_bytes is None)
        row = next(row for row in table.rows if row.head == format_integer(stopped))
        assert cell(row, at) == "did not fit"
        reach = {row.head: row for row in reach_table(profile, "batch").rows}
        most = {p.method: p.value for p in profile.points if p.largest}
        assert cell(reach["leapfrog"], 1) == f"{most['leapfrog'] / most['plain']:.1f} x"

    def test_predictions_have_their_ratio(self) -> None:
        """And a method without one has a dash."""
        rows = {row.head: row for row in prediction_table(examples.smollm2()).rows}
        assert cell(rows["sac"], 0) == cell(rows["sac"], 2) == "-"
        assert cell(rows["plain"], 2) == "0.995"

    def test_checkpointing_always_has_a_row(self) -> None:
        """Where it was not measured, that is said."""
        base = examples.smollm2()
        without = replace(base, results=tuple(r for r in base.results if r.method.name != "checkpoint"))
        rows = glance(without).rows
        assert [row.head for row in rows][:2] == ["plain", "checkpoint"]
        assert "not measured: it was not among the methods" in rows[1].notes[0]
        assert "it was not among the methods" in " ".join(render_text(without).split())

    def test_every_ending_has_its_reason(self) -> None:
        """Out of memory, refused, failed, pending, predicted."""
        profile = examples.unequal()
        said = [state(each) for each in profile.results]
        assert said[0].startswith("out of memory: stopped at 4.49 GiB")
        assert said[2].startswith("failed: RuntimeError") and said[4].startswith("refused: parallel")
        assert said[1] == ""
        assert [state(each) for each in examples.interrupted().results][2:4] == [
            "times not measured yet",
            "not measured: the run ended before it",
        ]
        assert {state(each) for each in examples.predicted_only().results} == {"predicted, not measured"}


class TestPeak:
    """Why the peak is where it is."""

    def test_says_phase_parts_and_how_much_is_to_gain(self) -> None:
        """From the record's own figures."""
        profile = examples.smollm2()
        memory = memory_of(profile, "plain")
        said = peak.explain(profile, profile.result("plain"), memory)
        assert said[0] == f"The peak of plain, {format_bytes(memory.peak_bytes)}, stands in backward."
        share = 100 * memory.categories["stored_activations"] / memory.attributed_bytes
        assert f"stored activations {share:.0f} %" in said[1]
        gap = memory.peak_bytes - memory.phase_peaks["forward"]
        assert said[2].startswith(f"Lowering backward alone gains at most {format_bytes(gap)} ")
        assert said[2].endswith("then forward is the highest.")

    def test_never_advises_what_was_done_already(self) -> None:
        """No chunked loss to one who has it, no LoRA to one who uses it."""
        profile = examples.lora()
        for each in profile.results:
            text = " ".join(peak.explain(profile, each, each.memory))
            assert "as LoRA does" not in text
            assert not (each.method.loss == "chunked" and "the chunked loss" in text)
        full = examples.smollm2()
        assert "as LoRA does" in " ".join(peak.explain(full, full.results[0], full.results[0].memory))

    def test_the_page_names_the_largest_holders_and_folds_the_rest(self) -> None:
        """Twelve in sight, every other behind a fold."""
        page = page_of(examples.smollm2())
        holders = memory_of(examples.smollm2(), "plain").holders
        assert f"Show the other {len(holders) - 12}" in page
        assert all(f'<th scope="row">{holder.path}</th>' in page for holder in holders)


def test_plain_with_another_loss_is_not_what_others_are_compared_with() -> None:
    """`plain:loss=chunked` has a row like any other; shares are those of `plain`, whichever comes first."""
    base = examples.smollm2()
    plain = base.result("plain")
    lean = replace(plain.method, loss="chunked")
    other = replace(plain, method=lean, memory=replace(plain.memory, peak_bytes=plain.memory.peak_bytes // 2))
    rows = {row.head: row for row in glance(replace(base, results=(other, *base.results))).rows}
    assert (cell(rows["plain"], 1), cell(rows["plain, chunked loss"], 1)) == ("100 %", "50 %")
    assert cell(rows["plain, chunked loss"], 5) == "+0 %"


def test_the_rival_is_one_with_figures() -> None:
    """Plain where it was measured, else checkpointing, never the recommended one itself."""

    def named(profile: Profile) -> Result:
        found = view.rival(profile)
        assert found is not None
        return found

    assert named(examples.lora()).method.name == "plain"
    base = examples.unequal()
    moved = replace(base, recommendation=replace(base.recommendation, method="momentum:k=3"))
    assert named(moved).method.name == "checkpoint"
