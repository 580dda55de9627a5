"""The HTML report renders what a FineTuning holds, whatever is missing of it, and nothing breaks out of it.

Run: python -m pytest tests/unit/test_finetune_report.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from math import inf, isfinite, nan
from pathlib import Path

import pytest

from autorev.finetuning.change import Change, change
from autorev.finetuning.record import Evaluation, FineTuning
from autorev.report import palette
from autorev.report.finetuning import tables, view
from autorev.report.finetuning.content import tiles
from autorev.report.finetuning.verdict import EXPORT_LIMIT, drift_words, may_export, verdict
from autorev.report.render import render_html, render_markdown, render_text
from tests.helpers import finetune_examples as examples
from tests.helpers.finetune_examples import ALL, many
from tests.helpers.finetune_simulation import looked_at
from tests.unit.test_profile_report import all_figures, text_of
from tests.unit.test_report import run as in_a_process
from tests.unit.test_report import without_plotly

MISSING: list[dict[str, object]] = [
    {"original": None},
    {"evaluations": ()},
    {"vanilla": None},
    {"logged": ()},
    {"chains": ()},
    {"original": None, "evaluations": (), "vanilla": None},
    {"original": None, "evaluations": (), "vanilla": None, "logged": (), "chains": (), "calibration": None},
]


def page_of(*runs: FineTuning) -> str:
    """The page without plotly."""
    return without_plotly(render_html(runs, "autorev report"))


def drawn(run: FineTuning) -> dict[str, dict]:
    """Every figure of one run, as the JSON that a page holds."""
    return all_figures(run)


def drawn_across(runs: list[FineTuning]) -> dict[str, dict]:
    """Every figure across runs, as the JSON that a page holds."""
    return all_figures(*runs)


class TestHtml:
    """One file that needs nothing else."""

    @pytest.mark.parametrize("name", ALL)
    def test_every_figure_has_its_place_and_every_place_its_figure(self, name: str) -> None:
        """No hole in a page, and nothing that is drawn nowhere."""
        page = page_of(ALL[name]())
        assert sorted(re.findall(r'<div class="plot lazy" id="([^"]+)"', page)) == sorted(drawn(ALL[name]()))
        ids = re.findall(r'\sid="([^"]+)"', page)
        assert len(ids) == len(set(ids))

    def test_the_same_for_many(self) -> None:
        """Every group's figures, each once."""
        page = page_of(*many(), examples.begun(), examples.hostile())
        places = re.findall(r'<div class="plot lazy" id="([^"]+)"', page)
        assert sorted(places) == sorted(drawn_across([*many(), examples.begun(), examples.hostile()]))
        ids = re.findall(r'\sid="([^"]+)"', page)
        assert len(ids) == len(set(ids))

    @pytest.mark.parametrize("name", ALL)
    def test_nothing_is_loaded_and_nothing_breaks_out(self, name: str) -> None:
        """No address that would load something, no tag from a name, no control character."""
        for page in (page_of(ALL[name]()), page_of(ALL[name](), examples.plain())):
            assert not re.search(r"<link|<iframe|<img|@import|url\(", page)
            assert not re.search(r'<\w+(?:\s[\w-]+(?:="[^"]*")?)*\ssrc=', page)
            assert "<script>window" not in page
            assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script", page)) == 3
            assert "\x1b" not in page and "\u202e" not in page

    def test_figures_escape_names(self) -> None:
        """plotly reads HTML in its labels."""
        hostile = examples.hostile()
        for name, figure in (drawn(hostile) | drawn_across([hostile, hostile, examples.plain()])).items():
            assert "<script" not in json.dumps(figure) and "<img" not in json.dumps(figure), name

    def test_colors_have_their_counterpart_in_the_dark(self) -> None:
        """Every colour of every figure."""
        found = drawn_across(many())
        for name in ALL:
            found |= {f"{name}-{each}": figure for each, figure in drawn(ALL[name]()).items()}
        for name, figure in found.items():
            used = set(re.findall(r"#[0-9a-f]{6}", json.dumps(figure)))
            assert used <= palette.DARK_FOR_LIGHT.keys(), name

    def test_is_the_same_bytes_every_time(self) -> None:
        """Two processes with different hash seeds write the same file."""
        program = (
            "import hashlib\n"
            "from tests.helpers import finetune_examples as e\n"
            "from autorev.report.render import render_html as render, render_markdown, render_text\n"
            "pages = render([e.calibrated()], 'x') + render(e.many(), 'x')\n"
            "print(hashlib.sha256(pages.encode()).hexdigest())"
        )
        assert len({in_a_process(program, PYTHONHASHSEED=str(seed)) for seed in (1, 2)}) == 1

    def test_is_rendered_from_json_without_torch(self, tmp_path: Path) -> None:
        """Any machine with the record can make every report."""
        (tmp_path / "run.json").write_text(examples.momentum().to_json())
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "from autorev.finetuning.record import FineTuning\n"
            "from autorev.report.render import render_html as render, render_markdown, render_text\n"
            f"run = FineTuning.from_json(Path({str(tmp_path / 'run.json')!r}).read_text(), 'run.json')\n"
            "pages = render([run], 'x'), render([run] * 3, 'x'), render_text(run), render_markdown([run])\n"
            "print(all('SmolLM2-135M' in page for page in pages), {'torch', 'transformers'} & set(sys.modules))"
        )
        assert in_a_process(program) == "True set()"

    def test_the_verdict_comes_first_with_its_figures(self) -> None:
        """Title, verdict, tiles, and then the figures from losses to the environment."""
        run = examples.calibrated()
        text = text_of(page_of(run))
        order = ("SmolLM2-135M-Instruct", "Verdict", "Loss over the steps", "Memory and reconstruction")
        order += ("Side bits where they are needed", "The chains at the end", "Recipe", "Where and when it ran")
        places = [text.index(each) for each in order]
        assert places == sorted(places)
        for tile in tiles(run):
            assert f"{tile.title} {tile.figure}" in text

    def test_holds_recipe_text_environment_commands_and_notes(self) -> None:
        """Everything that one needs to make it again."""
        run = examples.momentum()
        text = text_of(without_plotly(render_html([run], "autorev report run.json")))
        for fact in (*tables.recipe_facts(run).values(), *tables.corpus_facts(run).values(), run.environment.commit):
            assert fact in text
        assert run.command in text and "autorev report run.json" in text
        assert "2 examples were longer than 192 tokens and lost their end." in text

    def test_a_training_loss_that_rises_is_explained(self) -> None:
        """Where the validation loss does not rise with it; and only there."""
        base = examples.momentum()
        rising = tuple(replace(row, loss=2.4 + 0.02 * row.step) for row in base.logged)
        run = replace(base, logged=rising)
        assert "that is no divergence" in text_of(page_of(run))
        worse = replace(run, evaluations=(base.evaluations[0], replace(base.evaluations[-1], loss=9.0)))
        assert "no divergence" not in text_of(page_of(worse)) and "no divergence" not in text_of(page_of(base))

    def test_runs_are_ranked_with_plain_training_first(self) -> None:
        """Then by the loss after training; with what each needs of plain's memory."""
        found = view.ranked([examples.jump(), examples.momentum(), examples.interrupted(), examples.plain()])
        assert [run.name for run in found] == ["plain", "momentum_k3", examples.jump().name, "interrupted"]
        assert "of plain's" in text_of(page_of(examples.momentum(), examples.plain()))

    def test_what_is_near_has_a_panel_of_its_own(self) -> None:
        """On linear axes: hundredths of a nat beside ten."""
        figures = drawn_across([examples.plain(), examples.momentum(), examples.two_streams()])
        assert {"g0-f0-validation", "g0-f0-validation-near"} <= {*figures}
        low, high = figures["g0-f0-validation-near"]["layout"]["yaxis"]["range"]
        assert -0.5 < low < 0 < high < 0.5 and "type" not in figures["g0-f0-validation"]["layout"]["yaxis"]

    def test_interrupted_runs_say_so(self) -> None:
        """Alone and among others, and how to go on."""
        text = text_of(page_of(examples.interrupted()))
        assert "This run is not complete" in text and "--resume goes on with it." in text
        assert "Validation loss at step 10 2.779" in text
        assert "1 run is not complete: interrupted." in text_of(page_of(*many()))
        assert "not complete" not in text_of(page_of(examples.plain(), examples.momentum()))

    @pytest.mark.parametrize("name", ["momentum", "plain", "scheduled", "calibrated", "scratch"])
    @pytest.mark.parametrize("missing", MISSING, ids=lambda missing: "+".join(missing))
    @pytest.mark.parametrize("complete", [True, False])
    def test_any_part_may_be_missing(self, name: str, missing: dict[str, object], complete: bool) -> None:
        """A record interrupted anywhere is rendered, alone, among others, in the terminal and as Markdown."""
        run = replace(ALL[name](), **missing, complete=complete)
        pages = page_of(run), page_of(run, examples.momentum(), run, examples.plain())
        for text in (*map(text_of, pages), render_text(run), render_markdown([run, examples.plain()])):
            assert not re.search(r"\b(None|nan|inf)\b", text)

    def test_parts_of_a_step_may_be_missing(self) -> None:
        """No seconds, no tokens, no norm; columns without any figure are left out."""
        bare = [
            replace(r, gradient_norm=None, seconds=None, tokens=None, drift=None, gamma=None, side_bits=None)
            for r in examples.momentum().logged
        ]
        run = replace(examples.momentum(), logged=tuple(bare))
        assert "None" not in text_of(page_of(run))
        assert tables.steps_table(run).heads == ("Step", "Loss", "Learning rate", "Peak")
        assert view.side_bits_words(run) == "3"

    def test_a_loss_that_is_no_number_is_shown_and_not_drawn(self) -> None:
        """What went wrong is in the table; a figure cannot show it."""
        base = examples.momentum()
        broken = tuple(replace(row, loss=float("nan") if row.step > 20 else row.loss) for row in base.logged)
        run = replace(base, logged=broken, evaluations=(*base.evaluations[:-1], Evaluation(40, float("inf"))))
        for figure in (*drawn(run).values(), *drawn_across([run, examples.plain()]).values()):
            values = [y for each in figure["data"] if each["type"] == "scatter" for y in each["y"]]
            assert all(y is not None and isfinite(y) for y in values)
        assert "infinite" in text_of(page_of(run))

    def test_no_run_is_an_error(self) -> None:
        """There is nothing to render."""
        with pytest.raises(ValueError, match="no record"):
            render_html([], "autorev report")


class TestVerdict:
    """What became of it, in words with their numbers."""

    def test_what_is_as_good_without_the_coupling_is_exported(self) -> None:
        """Within what `autorev export` asks."""
        found = verdict(examples.momentum())
        assert found.title == "Ship it as the plain architecture"
        assert found.text == (
            "Validation loss from 2.900 to 2.731 in 40 steps under momentum k=3. It is better than the original as the "
            "plain architecture by 0.172 +- 0.002 (standard error, paired over 16 sequences). As the plain "
            "architecture it has 2.728 (-0.003): ship it with `autorev export`."
        )
        assert not any(tile.warning for tile in tiles(examples.momentum()))

    def test_what_only_works_with_it_is_shipped_reversible(self) -> None:
        """With the loss that the plain architecture would have."""
        found = verdict(examples.scheduled())
        assert found.title == "Ship it reversible"
        assert "At the end it needs no side bits." in found.text
        assert "it would lose 4.67 nats (7.550): ship it reversible, with `autorev.load`." in found.text
        assert any(tile.warning for tile in tiles(examples.scheduled()))

    def test_the_limit_is_that_of_export(self) -> None:
        """Exactly at it is still within."""
        base = examples.momentum()
        assert base.final is not None
        for gap, good in ((EXPORT_LIMIT - 1e-6, True), (EXPORT_LIMIT + 1e-6, False)):
            assert may_export(replace(base, vanilla=Evaluation(40, base.final.loss + gap))) is good

    def test_what_is_worse_than_the_original_is_not_shipped(self) -> None:
        """Neither form of it is as good."""
        found = verdict(examples.jump())
        assert found.title == "Worse than the original model"
        assert "It is worse than the original by 0.550 +- 0.00" in found.text
        assert "The conversion alone had raised it to 12.038 (perplexity 169,058)." in found.text
        assert "hip it" not in found.text
        better = verdict(replace(examples.jump(), vanilla=looked_at(60, 2.88)))
        assert better.title == "Ship it as the plain architecture"
        assert "better than under the coupling that it was trained with" in better.text

    @pytest.mark.parametrize(
        "example", [examples.momentum, examples.plain, examples.lora], ids=lambda each: each.__name__
    )
    def test_what_chance_could_do_is_not_recommended(self, example: Callable[[], FineTuning]) -> None:
        """A loss that is lower, by less than it varies; or one of which nobody knows how much it varies."""
        run = example()
        assert run.original is not None and run.final is not None
        noisy = tuple(loss + 0.5 * (-1) ** n for n, loss in enumerate(run.original.losses))
        for original in (
            replace(run.original, losses=noisy),
            replace(run.original, losses=(), tokens=()),
            replace(run.original, losses=(), tokens=(), standard_error=None),
        ):
            found = verdict(replace(run, original=original))
            assert found.title == "Not distinguishable from the original yet"
            assert "Train it longer, or hold out more text" in found.text and "hip it" not in found.text

    @pytest.mark.parametrize(
        ("loss", "words"), [(10.5, "guess"), (19.8, "guess"), (inf, "no number"), (nan, "no number")]
    )
    def test_what_is_of_no_use_is_not_recommended(self, loss: float, words: str) -> None:
        """However much better it is than the original: near a guess among all tokens, or broken."""
        run = examples.momentum()
        worse = looked_at(0, 30.0)
        for vocabulary in (49_152, None)[: 2 if loss != 10.5 else 1]:
            bad = replace(run, original=worse, evaluations=(Evaluation(40, loss),), vanilla=None, vocabulary=vocabulary)
            found = verdict(bad)
            assert words in found.title and found.title.startswith("Do not ship it")
            assert "ship it" not in found.text
            assert "guess" in verdict(replace(bad, pretrained=False)).text or not isfinite(loss)

    def test_the_error_of_a_difference_is_paired(self) -> None:
        """Sequence by sequence where both have the same ones, weighed by their tokens."""
        tokens = (10, 20, 30)
        before = Evaluation(0, 40 / 60, 1.0, losses=(1.0, 0.0, 1.0), tokens=tokens)
        same = Evaluation(1, 40 / 60 - 0.5, 1.0, losses=(0.5, -0.5, 0.5), tokens=tokens)
        assert change(same, before) == Change(-0.5, pytest.approx(0.0, abs=1e-12), 3)  # all of them better by as much
        other = replace(same, loss=(10 * 0.5 + 20 * 0.5 + 30 * -0.5) / 60, losses=(0.5, 0.5, -0.5))
        found = change(other, before)
        shifts = [(a - b - found.by) * n for a, b, n in zip(other.losses, before.losses, tokens, strict=True)]
        assert found.error == pytest.approx((1.5 * sum(s * s for s in shifts)) ** 0.5 / 60)
        unpaired = change(replace(other, tokens=(10, 20, 31)), before)
        assert (unpaired.error, unpaired.sequences) == (pytest.approx(2**0.5), 0)
        assert Change(-3.1, 1.0, 4).better is False and Change(-3.3, 1.0, 4).better  # of four, Student's t is 3.18

    def test_plain_training_has_nothing_to_export(self) -> None:
        """Nor a gap."""
        found = verdict(examples.plain())
        assert found.title == "The plain architecture, trained"
        assert "It is better than the original by 0.171 +- 0.00" in found.text
        assert "There is nothing to export" in found.text
        assert "As the plain architecture" not in {tile.title for tile in tiles(examples.plain())}

    def test_from_scratch_there_is_no_original_to_be_compared_with(self) -> None:
        """Random weights are no model that one could lose."""
        text = verdict(examples.scratch("leapfrog")).text
        assert text.startswith("Validation loss from 7.631 to 4.180 in 120 steps under leapfrog. As the plain")

    def test_without_evaluations_it_says_so(self) -> None:
        """Complete, but never looked at; or stopped before the first look."""
        assert verdict(replace(examples.momentum(), evaluations=())).title == "Trained, and not evaluated"
        assert "was not evaluated in the plain" in verdict(replace(examples.momentum(), vanilla=None)).text
        assert "after 0 of 40 steps, without a validation loss" in verdict(examples.begun()).text

    def test_drift_in_words(self) -> None:
        """Exact, not exact, or nothing rebuilt."""
        run = examples.momentum()
        assert drift_words(run) == "Reconstruction drift 0: rebuilt bit for bit in all 40 steps."
        worse = (replace(run.logged[0], drift=3e-4), *run.logged[1:])
        assert drift_words(replace(run, logged=worse)) == "Reconstruction drift up to 3.0e-04 in 40 steps."
        assert drift_words(examples.plain()).startswith("Nothing was rebuilt")
