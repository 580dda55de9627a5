"""The HTML report renders what a Profile holds, whatever is missing of it, and nothing breaks out of it.

Run: python -m pytest tests/unit/test_profile_report.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from autorev.format import format_bytes
from autorev.profiler.readings import Memory
from autorev.profiler.record import Profile, Status
from autorev.report.document import Cell, Row
from autorev.report.profile import view
from autorev.report.profile.comparison import families
from autorev.report.profile.content import tiles
from autorev.report.render import page_of as page_from
from autorev.report.render import render_html, render_text
from tests.helpers import profile_examples as examples
from tests.unit.test_report import run, without_plotly

ALL = {
    "smollm2": examples.smollm2,
    "lora": examples.lora,
    "deep": lambda: examples.deep(24),
    "interrupted": examples.interrupted,
    "predicted_only": examples.predicted_only,
    "unequal": examples.unequal,
    "hostile": examples.hostile,
}


def all_figures(*profiles: Profile) -> dict[str, dict]:
    """Every figure of a page, as the JSON that it holds."""
    found = page_from(profiles, "").figures
    return {name: json.loads(json.dumps({"data": f.data, "layout": f.layout})) for name, f in found.items()}


def page_of(*profiles: Profile) -> str:
    """The page without plotly."""
    return without_plotly(render_html(profiles, "autorev report"))


def text_of(page: str) -> str:
    """What a person reads in a page's body."""
    body = page[page.index("<body>") : page.index('<script type="application/json"')]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def cell(row: Row, place: int) -> str:
    """The text of one cell."""
    found = row.cells[place]
    return found.text if isinstance(found, Cell) else found


def bare(profile: Profile, **changes: object) -> Profile:
    """The record with every result changed in the same way."""
    return replace(profile, results=tuple(replace(each, **changes) for each in profile.results))


def memory_of(profile: Profile, spec: str) -> Memory:
    """The memory of one method, which has one."""
    found = profile.result(spec)
    assert found is not None and found.memory is not None
    return found.memory


class TestHtml:
    """One file that needs nothing else."""

    @pytest.mark.parametrize("name", ALL)
    def test_every_figure_has_its_place_and_every_place_its_figure(self, name: str) -> None:
        """No hole in a page, and nothing that is drawn nowhere."""
        page = page_of(ALL[name]())
        places = re.findall(r'<div class="plot lazy" id="([^"]+)"', page)
        assert sorted(places) == sorted(all_figures(ALL[name]()))
        ids = re.findall(r'\sid="([^"]+)"', page)
        assert len(ids) == len(set(ids))

    @pytest.mark.parametrize("name", ALL)
    def test_nothing_is_loaded_and_nothing_breaks_out(self, name: str) -> None:
        """No address that would load something, no tag from a name, no control character."""
        for page in (page_of(ALL[name]()), page_of(ALL[name](), examples.deep(8))):
            assert not re.search(r"<link|<iframe|<img|@import|url\(", page)
            # An attribute's text may speak of `src=`; an attribute of that name is what loads.
            assert not re.search(r'<\w+(?:\s[\w-]+(?:="[^"]*")?)*\ssrc=', page)
            assert "<script>window" not in page
            assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script", page)) == 3
            assert "\x1b" not in page and "\u202e" not in page

    def test_figures_escape_names(self) -> None:
        """plotly reads HTML in its labels."""
        for name, figure in all_figures(examples.hostile()).items():
            assert "<script" not in json.dumps(figure) and "<img" not in json.dumps(figure), name

    def test_is_the_same_bytes_every_time(self) -> None:
        """Two processes with different hash seeds write the same file."""
        program = (
            "import hashlib\n"
            "from tests.helpers import profile_examples as e\n"
            "from autorev.report.render import render_html as render\n"
            "pages = render([e.smollm2()], 'x') + render([e.deep(8), e.lora(), e.unequal()], 'x')\n"
            "print(hashlib.sha256(pages.encode()).hexdigest())"
        )
        assert len({run(program, PYTHONHASHSEED=str(seed)) for seed in (1, 2)}) == 1

    def test_is_rendered_from_json_without_torch(self, tmp_path: Path) -> None:
        """Any machine with the record can make every report."""
        (tmp_path / "record.json").write_text(examples.smollm2().to_json())
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "from autorev.profiler.record import Profile\n"
            "from autorev.report.render import render_html as render\n"
            f"profile = Profile.read(Path({str(tmp_path / 'record.json')!r}))\n"
            "pages = render([profile], 'x'), render([profile] * 5, 'x'), str(profile)\n"
            "print(all('SmolLM2-135M' in page for page in pages), {'torch', 'transformers'} & set(sys.modules))"
        )
        assert run(program) == "True set()"

    def test_the_recommendation_comes_first_with_its_figures(self) -> None:
        """In words, with what it saves and costs."""
        profile = examples.smollm2()
        best, plain = view.chosen(profile), profile.result("plain")
        text = text_of(page_of(profile))
        assert (
            text.index("Recommendation") < text.index("Every method at a glance") < text.index("Memory over one step")
        )
        peak = next(tile for tile in tiles(profile) if tile.title == "Peak memory")
        change = 100 * (best.memory.peak_bytes / plain.memory.peak_bytes - 1)
        assert peak.figure == format_bytes(best.memory.peak_bytes)
        assert peak.against == f"{change:+.0f} % against plain's {format_bytes(plain.memory.peak_bytes)}"
        assert peak.against in text

    def test_holds_environment_commands_notes_and_text(self) -> None:
        """Every field of the environment, and how to make record and report again."""
        profile = examples.smollm2()
        page = render_html([profile], "autorev report smollm2.json")
        text = text_of(without_plotly(page))
        where = profile.environment
        for fact in (where.date, where.machine, where.system, where.commit, "python 3.12.3", profile.text):
            assert fact in text
        assert profile.command in text and "autorev report smollm2.json" in text
        assert "LoRA rank has no effect when all weights are trained." in text

    def test_incomplete_and_predicted_records_say_so(self) -> None:
        """Nobody takes a half for the whole, or a prediction for a measurement."""
        assert "This record is incomplete." in text_of(page_of(examples.interrupted()))
        predicted = text_of(page_of(examples.predicted_only()))
        assert "Nothing was measured." in predicted and "allocator" not in predicted
        assert "Nothing was measured" not in text_of(page_of(examples.smollm2()))

    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize(
        "missing",
        [
            {"memory": None},
            {"rounds": ()},
            {"work": None},
            {"fidelity": None},
            {"prediction": None},
            {"memory": None, "rounds": (), "work": None, "fidelity": None, "prediction": None},
        ],
        ids=lambda missing: "+".join(missing),
    )
    def test_any_part_may_be_missing(self, name: str, missing: dict[str, object]) -> None:
        """A record interrupted anywhere is rendered, alone, among others and in the terminal."""
        profile = replace(bare(ALL[name](), **missing), recommendation=None, device=None, complete=False)
        assert "glance" in page_of(profile)
        assert page_of(*[profile] * 5)
        assert render_text(profile)

    def test_parts_of_the_memory_may_be_missing(self) -> None:
        """Without attribution, timeline and blocks, the allocator's figures stay."""
        base = examples.smollm2()
        lean = [
            Memory(m.peak_bytes, m.phase, {}, m.kept_bytes, m.process_bytes, 0)
            for m in (each.memory for each in base.results)
        ]
        profile = replace(base, results=tuple(replace(r, memory=m) for r, m in zip(base.results, lean, strict=True)))
        text = text_of(page_of(profile))
        assert all(format_bytes(memory.peak_bytes) in text for memory in lean)

    def test_an_empty_record_is_a_page(self) -> None:
        """Interrupted before the first method."""
        empty = replace(examples.smollm2(), results=(), recommendation=None, notes=(), complete=False)
        assert "incomplete" in text_of(page_of(empty))
        assert "Incomplete" in render_text(empty)

    def test_a_sweep_without_a_fitting_size_is_no_hole(self) -> None:
        """Only out of memory: the page says it, the table has the sizes."""
        base = examples.deep(24)
        points = tuple(
            replace(p, peak_bytes=None, seconds=(), largest=False, status=Status.OUT_OF_MEMORY) for p in base.points
        )
        assert "No size fitted" in text_of(page_of(replace(base, points=points)))


class TestComparison:
    """What several records say together."""

    def test_peaks_against_blocks_are_those_at_the_common_batch(self) -> None:
        """Records that differ in their blocks make one family; the batch is one that the most of them have."""
        profiles = [examples.deep(blocks) for blocks in (32, 16, 64)] + [examples.smollm2()]
        (family,) = families(profiles)
        assert [profile.blocks for profile in family.profiles] == [16, 32, 64]
        drawn = all_figures(*profiles)["family-0-memory"]
        line = next(trace for trace in drawn["data"] if trace["name"] == "leapfrog")
        assert line["x"] == [16, 32, 64]
        for value, profile in zip(line["y"], family.profiles, strict=True):
            own = {p.value: p.peak_bytes for p in profile.points if p.method == "leapfrog" and p.peak_bytes}
            peak = memory_of(profile, "leapfrog").peak_bytes if family.batch == 1 else own[family.batch]
            assert value == pytest.approx(peak / 2**30, abs=1e-3)

    def test_another_machine_or_setting_is_another_family(self) -> None:
        """Only what can be compared is joined by a line."""
        one, two = examples.deep(16), examples.deep(32)
        assert families([one, replace(two, environment=replace(two.environment, machine="other"))]) == []
        assert families([one, replace(two, setting=replace(two.setting, dtype="bf16"))]) == []
        assert families([one, one]) == []
        wider = replace(two, model=replace(two.model, name="gpt2-1024-32"))
        assert families([one, wider]) == [] and len(families([one, two])) == 1

    def test_relative_figures_are_shares_of_plain(self) -> None:
        """Memory and time of each method over those of plain in the same record."""
        profile = examples.smollm2()
        drawn = all_figures(profile, examples.lora())["relative-memory"]
        dots = next(trace for trace in drawn["data"] if trace["name"] == "activation checkpointing")
        expected = memory_of(profile, "checkpoint").peak_bytes / memory_of(profile, "plain").peak_bytes
        assert dots["x"][0] == pytest.approx(expected, abs=1e-4)

    def test_many_records_say_why_timelines_are_missing(self) -> None:
        """Up to four show them, more do not, and the page says so."""
        few, many = page_of(examples.smollm2(), examples.lora()), page_of(*[examples.deep(8)] * 5)
        assert 'id="r0-timeline-0"' in few and "Timelines are left out" not in text_of(few)
        assert "timeline-0" not in many
        assert "Timelines are left out of a page of more than 4 records" in text_of(many)

    def test_every_record_and_method_has_a_row(self) -> None:
        """With its environment and its recommendation."""
        profiles = [examples.smollm2(), examples.unequal(), examples.interrupted()]
        text = text_of(page_of(*profiles))
        for profile in profiles:
            for name in view.labels(profile).values():
                assert f"{profile.name}: {name}" in text
            assert profile.environment.date in text
        assert "No recommendation yet." in text and "incomplete: 7 of 9 methods are not measured" in text

    def test_the_papers_figures_stand_beside_sweeps_of_the_batch_only(self) -> None:
        """For one record and for several."""
        assert "arXiv 2512.02056, measured on other hardware" in text_of(page_of(examples.deep(24)))
        assert "874" in text_of(page_of(examples.deep(24), examples.smollm2()))
        assert "founding paper" not in text_of(page_of(examples.smollm2(), examples.lora()))

    def test_no_profile_is_an_error(self) -> None:
        """There is nothing to render."""
        with pytest.raises(ValueError, match="no record"):
            render_html([], "autorev report")
