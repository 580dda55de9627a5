"""Write README's results tables from the recorded profiles and fine-tunings: python -m benchmarks.results"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autorev.finetuning.record import FineTuning
from autorev.profiler.record import Profile
from autorev.report.finetuning.markdown import render_markdown as render_fine_tunings
from autorev.report.profile.markdown import largest_batches, render_markdown
from benchmarks.finetuning import GROUPS

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "profiles" / "recorded"
HEADLINE = (
    *("plain", "checkpoint", "sac", "offload", "momentum:k=3", "momentum:k=2", "leapfrog"),
    *("checkpoint:loss=chunked", "momentum:k=3,loss=chunked"),
)
"""The methods that the README shows; the page has all of them."""
BEGIN = "<!-- made by `python -m benchmarks.results` from profiles/recorded -->"
END = "<!-- end -->"
TRAINED = RECORDS / "finetuning"
BEGIN_TRAINED = "<!-- made by `python -m benchmarks.results` from profiles/recorded/finetuning -->"
END_TRAINED = "<!-- end of the fine-tunings -->"

TABLES = (("quality", "couplings"), ("quantised",), ("schedule",), ("scratch",))
"""Groups of fine-tunings that stand in one table."""


def table() -> str:
    """The section between the markers."""
    # Names end with what grows; those that `profile` gives by itself do not, and are nobody's to commit.
    paths = [path for path in RECORDS.glob("*.json") if path.stem.rpartition("_")[2].isdigit()]
    profiles = [Profile.read(path) for path in sorted(paths, key=_size)]
    pretrained = [_headline(profile) for profile in profiles if profile.pretrained]
    return "\n\n".join([render_markdown(pretrained).strip(), *largest_batches([p for p in profiles if p.points])])


def _size(path: Path) -> tuple[str, int]:
    """Names in order, with numbers as numbers."""
    name, _, number = path.stem.rpartition("_")
    return name, int(number)


def _headline(profile: Profile) -> Profile:
    return replace(profile, results=tuple(r for r in profile.results if r.method.spec in HEADLINE))


def with_table(readme: str) -> str:
    """`readme` with its results made anew."""
    readme = _between(readme, BEGIN, table(), END)
    return _between(readme, BEGIN_TRAINED, fine_tunings(), END_TRAINED)


def fine_tunings() -> str:
    """The section on training, a table for each group of recorded runs that share a recipe."""
    return "\n\n".join(filter(None, (_trained(*names) for names in TABLES)))


def _trained(*names: str) -> str:
    files = [TRAINED / f"{run}.json" for name in names for run in GROUPS[name]]
    runs = [FineTuning.read(file) for file in files if file.is_file()]
    return render_fine_tunings(runs, f"python -m benchmarks.finetuning {' '.join(names)}").strip()


def _between(text: str, begin: str, content: str, end: str) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def main() -> None:
    """Rewrite the file."""
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
