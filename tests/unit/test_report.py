"""Reports render what an Analysis holds: terminal, Markdown and HTML.

Run: python -m pytest tests/unit/test_report.py
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from autorev.analysis import Analysis, Category
from autorev.format import clean, format_bytes, format_count, format_seconds, sentence, unit_for
from autorev.report import palette
from autorev.report.analysis.view import identical_runs, method_rows
from autorev.report.html import packed_plotly
from autorev.report.render import page_of, print_records, render_html, render_markdown, render_text
from tests.helpers import analysis_examples as examples

ALL = [
    examples.smollm2,
    examples.llama_lora,
    examples.bert,
    examples.clip,
    examples.unpredicted,
    examples.hostile,
]


def screen(analysis: Analysis, width: int, color: bool = False) -> str:
    """What a terminal of `width` columns shows."""
    system = "truecolor" if color else None
    console = Console(file=io.StringIO(), width=width, color_system=system, force_terminal=color, _environ={})
    with console.capture() as capture:
        print_records([analysis], console)
    return capture.get()


class TestTerminal:
    """One screen a person wants to read."""

    def test_says_model_blocks_every_method_and_what_to_do(self) -> None:
        """Nothing a reader needs is missing."""
        text = render_text(examples.smollm2())
        for expected in (
            "SmolLM2-135M-Instruct",
            "LlamaForCausalLM, 135 M parameters, profile smollm2-135m",
            "batch 8, 2,048 tokens, bf16, AdamW, all weights, full logits, NVIDIA H100 SXM 80 GB (79.6 GiB, of which "
            "78.6 GiB to use)",
            "30 of 30 blocks can be made reversible, in 1 chain",
            "model.layers.0-29 LlamaDecoderLayer x30 eligible attention + mlp",
            "Use activation checkpointing",
            "1. Use the chunked loss",
            "Note: LoRA rank has no effect",
        ):
            assert expected in " ".join(text.split()), expected
        row = next(line for line in text.splitlines() if line.startswith("checkpoint "))
        for figure in ("11.0", "3.56", "32.5 ms", "backward", "62", "16,092"):
            assert figure in row

    def test_bars_show_the_categories_in_proportion(self) -> None:
        """A letter of a bar stands for the category that covers its place."""
        row = next(line for line in render_text(examples.smollm2()).splitlines() if line.startswith("plain "))
        bar = row[len("plain") : row.index("23.4")]
        shares = examples.smollm2().predictions[0].categories
        expected = shares[Category.STORED_ACTIVATIONS] / sum(shares.values())
        assert bar.count("A") / len(bar.strip()) == pytest.approx(expected, abs=0.06)
        assert re.fullmatch(r" +[A-Zx]+ +", bar)

    def test_marks_what_does_not_fit_and_what_changes_the_model(self) -> None:
        """The marks stand in the rows, and their meaning below."""
        text = render_text(examples.llama_lora())
        rows = {line.split()[0]: line for line in text.splitlines() if line and not line.startswith(" ")}
        assert "!110" in rows["checkpoint"] and "|" in rows["checkpoint"]
        assert "bdia" not in rows and "momentum" in rows
        assert rows["plain"].count(">") == 1, "a bar that is longer than the scale is cut visibly"
        assert "| 79.6 GiB, the memory of NVIDIA H100 SXM 80 GB;  ! does not fit" in text
        said = " ".join(text.split())
        assert "From scratch only, peak in GiB: leapfrog, midpoint, hamiltonian, revnet !97.1," in said
        assert "bdia !98.1. With these a pretrained model does not keep its function" in said

    def test_couplings_with_the_same_figures_share_a_row(self) -> None:
        """Baselines never share, whatever their figures."""
        base = examples.smollm2()
        plain = base.predictions[0]
        same = replace(base, predictions=tuple(replace(plain, method=p.method) for p in base.predictions))
        labels = [row.label for row in method_rows(replace(same, frontier=()))]
        couplings = "momentum, leapfrog, midpoint, midpoint_a, bdia, hamiltonian, revnet"
        assert labels == ["plain", "checkpoint", "offload", couplings]

    def test_methods_that_share_a_row_keep_their_notes(self) -> None:
        """Each note says whose it is."""
        base = examples.smollm2()
        noted = tuple(replace(p, note=f"about {p.method}") for p in base.predictions)
        notes = {row.names[0]: row.notes for row in method_rows(replace(base, predictions=noted))}
        assert notes["plain"] == ("about plain",)
        assert notes["leapfrog"][:2] == ("leapfrog: about leapfrog", "midpoint: about midpoint")

    def test_a_reason_is_said_once_for_all_blocks_that_share_it(self) -> None:
        """Twelve refused blocks, one line each for blocks and reason."""
        text = " ".join(render_text(examples.bert()).split())
        assert "0 of 12 blocks can be made reversible" in text
        assert "bert.encoder.layer.0-11 BertLayer x12 refused" in text
        assert text.count(examples.POST_NORM) == 1

    @pytest.mark.parametrize("example", ALL)
    @pytest.mark.parametrize("width", [80, 100, 120])
    @pytest.mark.parametrize("color", [False, True])
    def test_fits_the_screen(self, example, width: int, color: bool) -> None:
        """No line is longer than the terminal, and the screen is one screen."""
        lines = re.sub(r"\x1b\[[0-9;]*m", "", screen(example(), width, color)).splitlines()
        assert max(map(len, lines)) <= width
        if example is not examples.hostile:
            assert len(lines) <= 45

    def test_is_plain_ascii_where_the_names_are(self) -> None:
        """A terminal without Unicode shows every sign."""
        assert render_text(examples.llama_lora()).isascii()

    def test_without_predictions_only_the_blocks_are_shown(self) -> None:
        """`str(analysis)` works before a setting is predicted, and without any block."""
        text = str(examples.unpredicted())
        assert "model.layers.0-29" in text and "Recommendation" not in text
        assert "0 of 0 blocks" in str(replace(examples.unpredicted(), chains=()))

    def test_many_kinds_of_blocks_stay_one_screen(self) -> None:
        """What does not fit is counted."""
        base = examples.bert()
        many = tuple(replace(block, class_name=f"Layer{i}") for i, block in enumerate(base.refused * 3))
        text = render_text(replace(base, refused=many))
        assert "and 26 blocks of 26 more kinds" in text
        assert len(text.splitlines()) <= 45

    def test_names_cannot_steer_the_terminal(self) -> None:
        """Escape codes and rich markup in a name are shown, not obeyed."""
        text = render_text(examples.hostile())
        assert "\x1b" not in text
        assert "[red]" in text


class TestRows:
    """What is collapsed, and how it is named."""

    def test_paths_that_count_up_become_a_range(self) -> None:
        """The number may stand anywhere in the path."""
        blocks = [replace(examples.bert_block(0), path=f"a.{i}.layer") for i in range(3, 6)]
        assert [run.label for run in identical_runs(blocks)] == ["a.3-5.layer"]

    def test_other_paths_are_named_by_their_ends(self) -> None:
        """A range that would claim blocks that are not there is never written."""
        blocks = [replace(examples.bert_block(0), path=f"a.{i}") for i in (0, 2, 4)]
        assert [run.label for run in identical_runs(blocks)] == ["a.0 ... a.4"]

    def test_shared_weights_are_called_several_times(self) -> None:
        """One module, three calls."""
        blocks = [replace(examples.bert_block(0), path="shared", call=i) for i in range(3)]
        assert [run.label for run in identical_runs(blocks)] == ["shared (called 3 times)"]

    def test_a_block_that_differs_ends_the_run(self) -> None:
        """Any difference but path and call counts."""
        blocks = [examples.bert_block(i) for i in range(4)]
        blocks[2] = replace(blocks[2], draws_random=False)
        assert [len(run.blocks) for run in identical_runs(blocks)] == [2, 1, 1]


class TestFormat:
    """Numbers as a person reads them."""

    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0"),
            (3 * 2**10, "3.00 KiB"),
            (512 * 2**20, "512 MiB"),
            (2**30, "1.00 GiB"),
            (round(9.996 * 2**30), "10.0 GiB"),
            (round(99.96 * 2**30), "100 GiB"),
            (1_127 * 2**30, "1,127 GiB"),
        ],
    )
    def test_bytes(self, count: int, text: str) -> None:
        """Three digits, in binary units."""
        assert format_bytes(count) == text

    def test_other_numbers(self) -> None:
        """Counts and times."""
        assert format_count(8_030_261_248) == "8.03 B"
        assert format_count(999) == "999"
        assert format_seconds(0.0325) == "32.5 ms"
        assert format_seconds(150) == "2.50 min"
        assert unit_for([5, 2**31]).number(2**29) == "0.50"

    def test_sentences(self) -> None:
        """A name at the start is left alone."""
        assert sentence("checkpointing is enough: it fits") == "Checkpointing is enough: it fits."
        assert sentence("model.layers is left out.") == "model.layers is left out."
        assert sentence("use it (--loss chunked)") == "Use it (--loss chunked)"
        assert sentence("") == ""

    def test_control_characters_are_replaced(self) -> None:
        """A name stays on one line and cannot move the cursor."""
        assert clean("a\nb\x1b[2J\u202e") == r"a b\x1b[2J\u202e"


class TestMarkdown:
    """Tables for GitHub."""

    def test_holds_methods_chains_and_recommendation(self) -> None:
        """Each in its table or heading."""
        text = render_markdown([examples.smollm2()])
        assert "## Recommendation: Use activation checkpointing" in text
        assert "| **checkpoint** | 11.0 GiB | backward | 47 % | 100 % |" in text
        assert "| `model.layers` | `model.layers.0-29` | 30 | `LlamaDecoderLayer` |" in text

    def test_holds_refusals_with_their_reasons(self) -> None:
        """The reason and its source line."""
        text = render_markdown([examples.bert()])
        assert "| - | `bert.encoder.layer.0-11` | 12 | `BertLayer` | - | refused | post-norm" in text
        assert "(modeling_bert.py:310)" in text

    @pytest.mark.parametrize("example", ALL)
    def test_every_row_of_a_table_has_its_columns(self, example) -> None:
        """A hostile name breaks no table and opens no tag."""
        text = render_markdown([example()])
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
        assert "<script" not in re.sub(r"`[^`]*`", "", text)


class TestHtml:
    """One file that needs nothing else."""

    def test_is_the_same_bytes_every_time(self) -> None:
        """Two processes with different hash seeds write the same file."""
        program = (
            "import hashlib\n"
            "from tests.helpers import analysis_examples as e\n"
            "from autorev.report.render import render_html\n"
            "print(hashlib.sha256(render_html([e.smollm2()], 'autorev analyze').encode()).hexdigest())"
        )
        digests = {run(program, PYTHONHASHSEED=str(seed)) for seed in (1, 2)}
        assert len(digests) == 1

    def test_is_two_megabytes(self) -> None:
        """plotly is compressed in it: a folder of reports can be kept."""
        assert len(render_html([examples.llama_lora()], "autorev analyze")) < 2_200_000

    def test_what_a_pretrained_model_would_lose_its_function_with_is_folded_away(self) -> None:
        """Its bars and its figures stand behind one title; the recommended one is never there."""
        page = page_of([examples.llama_lora()], "")
        drawn = {name: f.layout["yaxis"].get("ticktext", []) for name, f in page.figures.items()}
        assert drawn["memory-by-method"] == ["plain", "checkpoint", "offload", "momentum"]
        assert drawn["lead"] == ["plain", "checkpoint", "momentum"]
        assert any("leapfrog" in name for name in drawn["from-scratch"])

    @pytest.mark.parametrize("example", ALL)
    def test_nothing_is_loaded_from_elsewhere(self, example) -> None:
        """No address in any attribute that would load something."""
        page = without_plotly(render_html([example()], "autorev analyze"))
        assert not re.search(r"<link|<iframe|<img|@import|url\(|<\w+[^>]*\ssrc=", page)

    def test_names_are_escaped_everywhere(self) -> None:
        """In the text, in attributes, and inside the figures' JSON."""
        page = without_plotly(render_html([examples.hostile()], examples.HOSTILE))
        assert "window.hacked" in page
        assert "<script>window" not in page and "<img" not in page
        assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script", page)) == 3
        assert "\x1b" not in page

    def test_holds_the_recommendation_before_everything_else(self) -> None:
        """It is what the reader came for."""
        page = without_plotly(render_html([examples.smollm2()], "autorev analyze smollm2"))
        order = [
            "Use activation checkpointing",
            "Memory of one training step",
            "How far the memory",
            "Blocks</h2>",
        ]
        places = [page.index(text) for text in order]
        assert places == sorted(places)

    def test_holds_the_command_the_versions_and_the_citation(self) -> None:
        """So that the file can be made again."""
        page = render_html([examples.smollm2()], "autorev analyze smollm2 --batch 8  --sequence 2048")
        assert "autorev analyze smollm2 --batch 8  --sequence 2048</pre>" in page
        assert "autorev 0.1.0, torch 2.13.0, transformers 5.23.0" in page
        assert "arXiv 2512.02056" in page

    def test_every_plot_has_its_figures_as_text(self) -> None:
        """The page can be read without seeing a plot."""
        page = without_plotly(render_html([examples.smollm2()], "autorev analyze"))
        for prediction in examples.smollm2().predictions:
            assert format_bytes(prediction.peak_bytes) in page
        assert page.count("Show as a table") == 4

    def test_reasons_and_source_lines_are_shown(self) -> None:
        """Once for the twelve blocks that share them, with the twelve paths."""
        page = without_plotly(render_html([examples.bert()], "autorev analyze"))
        assert page.count(examples.POST_NORM) == 1
        assert all(f"<code>bert.encoder.layer.{i}</code>" in page for i in range(12))

    def test_every_figure_has_its_place(self) -> None:
        """The ids of the figures are those of the page."""
        for example in ALL:
            page = without_plotly(render_html([example()], "autorev analyze"))
            for name in page_of([example()], "").figures:
                assert f'id="{name}"' in page


def test_every_color_of_a_figure_has_its_dark_counterpart() -> None:
    """The page swaps light colours for dark ones by exact match, so each must be known, and only once."""
    pairs = [*palette.THEME.values(), *palette.CATEGORY_COLORS.values()]
    assert len({light for light, _ in pairs}) == len(pairs)
    for name, figure in page_of([examples.llama_lora()], "").figures.items():
        used = set(re.findall(r"#[0-9a-f]{6}", json.dumps([figure.data, figure.layout])))
        assert used <= palette.DARK_FOR_LIGHT.keys(), name


def test_reports_are_rendered_from_json_without_torch() -> None:
    """Any machine with the JSON can make every report."""
    program = (
        "import sys\n"
        "from tests.helpers import analysis_examples as e\n"
        "from autorev.analysis import Analysis\n"
        "from autorev.report.render import render_html\n"
        "from autorev.report.render import render_markdown\n"
        "analysis = Analysis.from_json(e.smollm2().to_json())\n"
        "assert analysis == e.smollm2()\n"
        "pages = render_html([analysis], 'x'), render_markdown([analysis]), str(analysis)\n"
        "print(all('SmolLM2-135M' in page for page in pages), {'torch', 'transformers'} & set(sys.modules))"
    )
    assert run(program) == "True set()"


def run(program: str, **environment: str) -> str:
    """What `program` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
    )
    return done.stdout.strip()


def without_plotly(page: str) -> str:
    """`page` without the 2 MB that are not ours."""
    library = packed_plotly()
    assert page.count(library) == 1
    return page.replace(library, "")
