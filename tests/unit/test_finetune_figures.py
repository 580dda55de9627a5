"""The traces and cells of the report of fine-tunings hold the record's own values.

Run: python -m pytest tests/unit/test_finetune_figures.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from autorev.finetuning.record import ChainState
from autorev.format import format_bytes
from autorev.report.document import Cell, Table
from autorev.report.finetuning import tables, tables_of_many, view
from autorev.report.finetuning.figures import chosen_bits
from autorev.report.finetuning.numbers import along_chain, change_text, gamma_text, perplexity_text, running_mean
from tests.helpers import finetune_examples as examples
from tests.helpers.finetune_examples import many
from tests.unit.test_finetune_report import drawn, drawn_across


def trace(figure: dict, name: str) -> dict:
    """The one trace whose name begins so and that is in the legend."""
    (found,) = [
        each for each in figure["data"] if each["name"].startswith(name) and each.get("showlegend") is not False
    ]
    return found


def cells(table: Table, head: str) -> dict[str, str]:
    """The cells of one row by their headings, what is said below them in brackets."""
    row = next(row for row in table.rows if row.head == head)
    texts = [
        f"{c.text} ({c.note})" if isinstance(c, Cell) and c.note else str(getattr(c, "text", c)) for c in row.cells
    ]
    return dict(zip(table.heads[1:], texts, strict=True))


class TestFigures:
    """The traces hold the record's own values."""

    def test_losses_over_steps(self) -> None:
        """Training, validation, the original as a line, the plain architecture at the end."""
        run = examples.momentum()
        figure = drawn(run)["loss"]
        assert trace(figure, "training, each step")["y"] == [row.loss for row in run.logged]
        assert trace(figure, "validation")["x"] == [0, 10, 20, 30, 40]
        assert trace(figure, "validation")["y"] == [each.loss for each in run.evaluations]
        assert trace(figure, "original model: 2.900")["y"] == [2.9, 2.9]
        assert (trace(figure, "as the plain")["x"], trace(figure, "as the plain")["y"]) == ([40], [2.728])
        assert not any("plain" in each["name"] for each in drawn(examples.plain())["loss"]["data"])

    def test_distillation_shows_the_part_of_the_text_and_the_distance(self) -> None:
        """What is minimised is neither."""
        run = examples.scheduled()
        shown = trace(drawn(run)["loss"], "training, each")["y"]
        assert shown == pytest.approx([row.cross_entropy for row in run.logged], abs=1e-5)
        distances = trace(drawn(run)["divergence"], "each step")["y"]
        assert distances == pytest.approx([row.divergence for row in run.logged], abs=1e-5)
        assert "divergence" not in drawn(examples.momentum())

    def test_gamma_and_side_bits_only_where_they_moved(self) -> None:
        """A constant needs no figure."""
        run = examples.scheduled()
        assert drawn(run)["gamma"]["data"][0]["y"] == [row.gamma for row in run.logged]
        assert drawn(run)["side-bits"]["data"][0]["y"] == [row.side_bits for row in run.logged]
        assert not {"gamma", "side-bits"} & {*drawn(examples.momentum()), *drawn(examples.two_streams())}

    def test_memory_at_the_steps_that_were_looked_at(self) -> None:
        """And the teacher's part of it."""
        run = examples.jump()
        line = drawn(run)["memory"]["data"][0]
        looked = [row for row in run.logged if row.peak_bytes is not None]
        assert line["x"] == [row.step for row in looked]
        assert line["y"] == pytest.approx([row.peak_bytes / 2**30 for row in looked], abs=1e-4)
        assert format_bytes(run.teacher_bytes) in drawn(run)["memory"]["data"][1]["name"]

    def test_calibration(self) -> None:
        """A column for each block, a row for each number of bits, a dot where it ended; the budget as a line."""
        run = examples.calibrated()
        assert run.calibration is not None
        heat, dots = drawn(run)["sensitivity"]["data"]
        assert len(heat["z"]) == 5 and all(len(row) == examples.BLOCKS for row in heat["z"])
        assert heat["z"][0] == [None] * examples.BLOCKS, "the finest is what the rest is measured against"
        ticks = drawn(run)["sensitivity"]["layout"]["yaxis"]["ticktext"]
        assert [int(ticks[y]) for y in dots["y"]] == list(chosen_bits(run).values()) == list(run.chains[0].side_bits)
        figure = drawn(run)["assignments"]
        increases = [each.increase for each in run.calibration.assignments]
        assert trace(figure, "measured")["y"] == pytest.approx(increases, abs=1e-6)
        assert trace(figure, "chosen: 2.27 side bits, +0.018 nats")["y"] == [0.0179]
        assert trace(figure, "budget: +0.020")["y"] == [0.02] * 2

    def test_more_steps_than_blocks_have_no_dots(self) -> None:
        """Sub-layers: which step belongs to which block is not in the record."""
        run = examples.calibrated()
        longer = replace(run, chains=(replace(run.chains[0], side_bits=(1, 2) * examples.BLOCKS),))
        assert chosen_bits(longer) == {} and len(drawn(longer)["sensitivity"]["data"]) == 1

    def test_the_frontier(self) -> None:
        """Side bits against the change of the loss: hollow before training, filled after, calibrations as a line."""
        figure = drawn_across(many())["g0-frontier"]
        marks = [each for each in figure["data"] if each["name"] == "hamiltonian" and each["mode"] == "markers"]
        hollow, filled = marks
        assert hollow["marker"]["symbol"] == "star-open" and filled["marker"]["symbol"] == "star"
        assert hollow["y"] == [pytest.approx(16.96 - 2.9)] and filled["y"] == [pytest.approx(6.9 - 2.9)]
        leaps = [each for each in figure["data"] if each["name"] == "leapfrog" and each["mode"] == "markers"]
        assert [each["x"][0] for each in leaps] == [3, 0, 0, 0], "the schedule began with three side bits"
        assert len(trace(figure, "calibration")["x"]) == 7
        assert trace(figure, "plain after 40 steps: -0.171")["y"] == [pytest.approx(2.729 - 2.9)] * 2

    def test_validation_across_runs_is_against_the_original_where_they_lie_far_apart(self) -> None:
        """Hundredths of a nat and ten nats in one figure."""
        run = examples.momentum()
        wide = drawn_across([examples.plain(), run, examples.two_streams()])["g0-f0-validation"]
        assert trace(wide, "momentum k=3")["y"] == pytest.approx([each.loss - 2.9 for each in run.evaluations])
        near = drawn_across([examples.plain(), run])["g0-f0-validation"]
        assert trace(near, "momentum k=3")["y"] == [each.loss for each in run.evaluations]

    def test_seeds_look_alike_and_share_an_entry(self) -> None:
        """Six runs from scratch, three lines in the legend."""
        scratch = drawn_across(many())["g1-f0-validation"]
        lines = list(scratch["data"])
        assert len(lines) == 6
        shown = [each["name"] for each in lines if each["showlegend"]]
        assert sorted(shown) == ["leapfrog", "midpoint", "plain"]
        assert len({(each["name"], each["line"]["color"], each["line"].get("dash")) for each in lines}) == 3
        assert "g1-frontier" not in drawn_across(many()), "from scratch there is no original to stand against"

    def test_bars_of_memory_hold_the_teacher(self) -> None:
        """Both parts together are the peak."""
        runs = [examples.momentum(), examples.jump()]
        rest, teacher = drawn_across(runs)["g0-memory"]["data"]
        for i, run in enumerate(runs):
            assert run.peak_bytes is not None
            assert rest["x"][i] + teacher["x"][i] == pytest.approx(run.peak_bytes / 2**30, abs=1e-3)


class TestTables:
    """Cells are the record's figures."""

    def test_a_row_per_run(self) -> None:
        """Everything that decides."""
        table = tables_of_many.runs_table(many()[:9])
        assert cells(table, "momentum_k3") == {
            "Trains": "all weights",
            "Steps": "40",
            "Side bits": "3",
            "Original": "2.900",
            "Before training": "2.904 (+0.004)",
            "After training": "2.731 (ppl 15.3)",
            "As the plain": "2.728 (-0.003)",
            "Against plain training": "+0.002",
            "Agreement": "66.4 % (KL 0.042)",
            "Peak": "1.86 GiB",
            "Tokens/s": "101 (1.90 s)",
            "Teacher": "-",
        }
        assert cells(table, "schedule")["Side bits"] == "3 to 0" and cells(table, "schedule")["Teacher"] == "513 MiB"
        assert cells(table, "interrupted")["After training"] == "- (2.779 at step 10)"
        assert "Teacher" not in tables_of_many.runs_table([examples.momentum(), examples.plain()]).heads

    def test_plain_of_another_recipe_or_seed_is_no_baseline(self) -> None:
        """Data, steps, rate and seed are the same, or there is no difference to speak of."""
        plain, run = examples.plain(), examples.momentum()
        assert view.plain_of(run, [plain]) is plain
        assert view.against_plain(run, [plain]) == pytest.approx(0.002)
        for other in (
            replace(plain, recipe=replace(plain.recipe, seed=1)),
            replace(plain, recipe=replace(plain.recipe, learning_rate=1e-4)),
            replace(plain, corpus=replace(plain.corpus, source="another")),
            replace(plain, complete=False),
        ):
            assert view.against_plain(run, [other]) is None
        assert view.against_plain(plain, [plain]) is None
        distilled = replace(plain, name="distilled", recipe=replace(plain.recipe, distill_weight=0.5))
        assert view.plain_of(run, [distilled, plain]) is plain

    def test_from_scratch_by_coupling(self) -> None:
        """The mean over the seeds, each seed's, and the gap to plain's, seed by seed."""
        table = tables_of_many.scratch_table(many()[9:])
        assert [row.head for row in table.rows] == ["plain", "leapfrog", "midpoint"]
        found = cells(table, "midpoint")
        assert found["Loss after training"] == "4.340 (mean of 2 seeds)"
        assert found["Each seed"] == "4.330 (0), 4.350 (1)"
        assert found["Against plain"] == "+0.120 (mean of 2 seeds)"
        unfinished = replace(examples.scratch("midpoint", 1), complete=False)
        (row,) = tables_of_many.scratch_table([examples.scratch("midpoint"), unfinished]).rows
        assert "incomplete: 1 of 2 runs" in row.notes

    def test_groups_are_models_and_families_recipes(self) -> None:
        """Only what can be compared stands together."""
        found = view.groups(many())
        assert [(g.title, len(g.runs)) for g in found] == [
            ("SmolLM2-135M-Instruct, fine-tuned", 9),
            ("gpt2-shape, from scratch", 6),
        ]
        assert [len(family.runs) for family in view.families(found[0].runs)] == [6, 2, 1]
        assert view.families(found[0].runs)[0].title == "All weights, 40 steps of 1 x 192 tokens at rate 5e-05"

    def test_no_two_runs_are_called_the_same(self) -> None:
        """By what tells them apart, and at last by a number."""
        found = view.labels(many())
        assert len(set(found)) == len(found)
        assert view.labels([examples.lora(), examples.plain()]) == ["momentum k=3, distilled", "plain"]
        assert view.labels([examples.scratch("plain"), examples.scratch("plain", 1)]) == [
            "plain, seed 0",
            "plain, seed 1",
        ]
        assert view.labels([examples.plain()] * 2) == ["plain (1)", "plain (2)"]

    def test_evaluations_and_chains(self) -> None:
        """The original first, the plain architecture last; equal neighbours of a chain together."""
        table = tables.evaluations_table(examples.momentum())
        assert [row.head for row in table.rows][:2] == ["original", "before training"]
        assert cells(table, "as the plain architecture")["Against the original"] == "-0.172"
        (chain,) = tables.chains_table(examples.momentum()).rows
        assert chain.cells == ("30", "1/8 x 30", "1, 0.9375 x 28, 1", "3 x 30", "2^-10")
        (streams,) = tables.chains_table(examples.two_streams()).rows
        assert streams.cells[1:4] == ("-", "-", "0 x 30")
        steps = tables.chain_steps_table(ChainState("c", (), (), (0, 0), None))
        assert [row.cells for row in steps.rows] == [("-", "-", "0")] * 2

    def test_training_losses_at_a_few_steps(self) -> None:
        """A table of hundreds of columns would be none."""
        table = tables_of_many.training_by_step([examples.scratch("plain"), examples.scratch("plain", 1)])
        assert len(table.heads) <= 12 and table.heads[-1] == "step 120"

    def test_environments_of_one_machine_are_one_row(self) -> None:
        """From the first day to the last."""
        later = replace(examples.plain(), environment=replace(examples.ENVIRONMENT, date="2026-11-28T08:00:00+00:00"))
        (row,) = tables_of_many.environments([later, examples.momentum()]).rows
        assert row.head == "2 runs" and row.cells[0] == "2026-11-26 to 2026-11-28"
        other = replace(later, environment=replace(later.environment, machine="other"))
        assert len(tables_of_many.environments([other, examples.momentum()]).rows) == 2


def test_numbers_are_readable() -> None:
    """Fractions, changes and perplexities as a person writes them."""
    assert [gamma_text(gamma) for gamma in (0.125, 1.0, -1.25, 0.3, 0.0)] == ["1/8", "1", "-5/4", "0.3", "0"]
    assert [change_text(change) for change in (0.0114, -2e-5, None)] == ["+0.011", "0.000", "-"]
    assert [perplexity_text(p) for p in (15.32, 169_058.0, 1.4e7, float("inf"), None)] == [
        *("15.3", "169,058", "1.4e+07", "infinite", "-"),
    ]
    assert along_chain((3, 3, 2), "{:g}".format) == "3 x 2, 2"
    assert along_chain(tuple(range(9)), "{:g}".format) == "0 to 8"
    assert along_chain((), str) == "-"
    assert running_mean([1.0, 2.0, 6.0, 7.0], 3) == [1.5, 3.0, 5.0, 6.5]
