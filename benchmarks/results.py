"""Write what pages show of records and modules: python -m benchmarks.results

README's table, the tables of docs/results.md, and the file tree of docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from autorev.analysis import Analysis
from autorev.finetuning.record import FineTuning
from autorev.format import NOTHING, format_bytes, format_seconds
from autorev.profiler.record import Profile
from autorev.report import document as doc
from autorev.report.finetuning.content import markdown as fine_tunings_of
from autorev.report.markdown import to_markdown
from autorev.report.profile.content import largest_batches, markdown
from benchmarks.finetuning import GROUPS
from benchmarks.long_runs.saved import Lines
from benchmarks.long_runs.tables import of_context, of_trainings
from benchmarks.tree import tree

ROOT = Path(__file__).parents[1]
README, PAGE, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "architecture.md"
RECORDS = ROOT / "profiles" / "recorded"
TRAINED, ANALYSED = RECORDS / "finetuning", RECORDS / "analyses"

METHODS = (
    *("plain", "checkpoint", "sac", "offload", "momentum:k=3", "momentum:k=2", "leapfrog"),
    *("checkpoint:loss=chunked", "momentum:k=3,loss=chunked"),
)
"""What docs/results.md shows of a profile; the HTML report has all of them."""
GROUPS_OF_TABLES = (("quality", "couplings"), ("quantised",), ("schedule",), ("scratch",))
"""Groups of fine-tunings that stand in one table."""

HEADS = ("workload", "plain", "checkpointing", "offloaded checkpointing", "autorev")
PROFILES = {
    "SmolLM2-135M, LoRA, 1 x 512 tokens": ("smollm2_lora_512", "plain", "checkpoint", None, "momentum:k=3"),
    "SmolLM2-135M, LoRA, 1 x 128 tokens": ("smollm2_lora_128", "plain", "checkpoint", "offload", "momentum:k=3"),
    "the same, with a chunked loss": (
        *("smollm2_lora_128", None, "checkpoint:loss=chunked", None, "momentum:k=3,loss=chunked"),
    ),
    "SmolLM2-135M, all weights, 1 x 512 tokens": ("smollm2_full_512", "plain", "checkpoint", None, "momentum:k=3"),
}
"""README's table: by workload, a profile and the methods in the columns' order."""
FINE_TUNINGS = {"SmolLM2-135M, QLoRA (nf4), 1 x 128 tokens": (None, "qlora_nf4_checkpoint", None, "qlora_nf4")}
PREDICTIONS = {
    "Llama-3.1-8B, LoRA, 5 x 32,768 tokens, chunked loss, predicted for an H100 of 80 GB": (
        *("llama-3.1-8b_lora_32k", "plain", "checkpoint", "offload", "momentum"),
    ),
    "the same, a tile of tokens at a time": (
        *("llama-3.1-8b_lora_32k", None, "checkpoint:tile=auto", None, "momentum:tile=auto"),
    ),
}


def front_table() -> str:
    """README's table: peak and seconds a step of each workload, measured or predicted."""
    rows = [[workload, *_profiled(*columns)] for workload, columns in PROFILES.items()]
    rows += [[workload, *map(_fine_tuned, runs)] for workload, runs in FINE_TUNINGS.items()]
    rows += [[workload, *_predicted(*columns)] for workload, columns in PREDICTIONS.items()]
    shown = tuple(doc.Row(workload, tuple(cells)) for workload, *cells in rows)
    return to_markdown([doc.Section("", (doc.Table(HEADS, shown),))]).strip()


def _profiled(name: str, *methods: str | None) -> list[str]:
    profile = Profile.read(RECORDS / f"{name}.json")
    found = [profile.result(method) if method else None for method in methods]
    return [_cell(r.memory.peak_bytes, r.step_seconds) if r and r.memory else NOTHING for r in found]


def _fine_tuned(name: str | None) -> str:
    if name is None:
        return NOTHING
    run = FineTuning.read(TRAINED / f"{name}.json")
    return _cell(run.peak_bytes, run.step_seconds)


def _predicted(name: str, *methods: str | None) -> list[str]:
    analysis = Analysis.read(ANALYSED / f"{name}.json")
    assert analysis.device is not None
    cells = []
    for method in methods:
        found = analysis.prediction(method) if method else None
        if found is None:
            assert method is None
            cells.append(NOTHING)
            continue
        fits = found.peak_bytes <= analysis.device.usable_bytes
        cells.append(
            _cell(found.peak_bytes, found.step_seconds) if fits else f"{format_bytes(found.peak_bytes)}, does not fit"
        )
    return cells


def _cell(peak: int | None, seconds: float | None) -> str:
    return NOTHING if peak is None or seconds is None else f"{format_bytes(peak)}, {format_seconds(seconds)}"


def profile_tables() -> str:
    """A table for each profile of a pretrained model, and one of the largest batches."""
    # Names end with what grows; those that `profile` gives by itself do not, and are nobody's to commit.
    paths = [path for path in RECORDS.glob("*.json") if path.stem.rpartition("_")[2].isdigit()]
    profiles = [Profile.read(path) for path in sorted(paths, key=_size)]
    pretrained = [_shown(profile) for profile in profiles if profile.pretrained]
    swept = largest_batches([profile for profile in profiles if profile.points])
    return to_markdown([*markdown(pretrained), *swept]).strip()


def _size(path: Path) -> tuple[str, int]:
    """Names in order, with numbers as numbers."""
    name, _, number = path.stem.rpartition("_")
    return name, int(number)


def _shown(profile: Profile) -> Profile:
    return replace(profile, results=tuple(r for r in profile.results if r.method.spec in METHODS))


def fine_tuning_tables() -> str:
    """A table for each group of recorded runs that share a recipe."""
    return "\n\n".join(filter(None, (_trained(*names) for names in GROUPS_OF_TABLES)))


def _trained(*names: str) -> str:
    files = [TRAINED / f"{run}.json" for name in names for run in GROUPS[name]]
    runs = [FineTuning.read(file) for file in files if file.is_file()]
    return to_markdown(fine_tunings_of(runs, f"python -m benchmarks.finetuning {' '.join(names)}")).strip()


def long_run_tables() -> str:
    """A table for each record of long runs, with the command that goes on with them."""
    found = []
    for path in sorted((RECORDS / "long_runs").glob("*.jsonl")):
        lines = list(Lines(path).by_name.values())
        shown = of_context(lines) if path.stem == "context" else of_trainings(lines)
        found.append("\n".join([f"`python -m benchmarks.long_runs.{path.stem}`", "", *shown]))
    return "\n\n".join(found) or "Nothing is recorded yet."


SECTIONS: dict[tuple[Path, str], Callable[[], str]] = {
    (README, "table"): front_table,
    (PAGE, "profiles"): profile_tables,
    (PAGE, "fine-tunings"): fine_tuning_tables,
    (PAGE, "long runs"): long_run_tables,
    (ARCHITECTURE, "tree"): tree,
}
"""By page and name of the section, what makes it."""


def with_section(text: str, name: str, content: str) -> str:
    """`text` with what stands between the two marks of a section replaced.

    Raises:
        ValueError: `text` has no such section.
    """
    begin, end = f"<!-- {name}: made by `python -m benchmarks.results` -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def main() -> None:
    """Rewrite the pages."""
    for (page, name), made in SECTIONS.items():
        page.write_text(with_section(page.read_text(encoding="utf-8"), name, made()), encoding="utf-8")


if __name__ == "__main__":
    main()
