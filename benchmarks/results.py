"""Write README's results table from the recorded profiles: python -m benchmarks.results"""

from __future__ import annotations

from pathlib import Path

from autorev.profiler.record import Profile
from autorev.report.profile.markdown import render_markdown

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "profiles" / "recorded"
BEGIN = "<!-- made by `python -m benchmarks.results` from profiles/recorded -->"
END = "<!-- end -->"


def table() -> str:
    """The section between the markers."""
    return render_markdown([Profile.read(path) for path in sorted(RECORDS.glob("*.json"))]).strip()


def with_table(readme: str) -> str:
    """`readme` with its results made anew."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    """Rewrite the file."""
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
