"""The Markdown pages of the repository, and what stands in their fenced blocks.

`python -m tests.helpers.pages` runs every command whose output a page shows, and writes what it prints now.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "profiles/README.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
)
FENCE = re.compile(
    r"^(?:<!-- (?:not run: (?P<not_run>[^\n]+)|(?P<slow>slow)) -->\n+)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^```$(?:\n\n```text\n(?P<printed>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
WIDTH = "100"
"""Columns of the terminal in which the shown output was printed."""


@dataclass(frozen=True)
class Fence:
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str
    """Why no test runs it: `<!-- not run: REASON -->` above the fence."""
    slow: bool
    """`<!-- slow -->` above the fence: only where slow tests run."""
    printed: str
    """What a Python block prints: the text of a ```text block right behind it."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line behind a `$` of a console block."""

    fence: Fence
    line: str
    output: str
    """What the page shows below it."""

    @property
    def words(self) -> list[str]:
        """As a shell would split them, without comments."""
        return shlex.split(self.line.replace("\\\n", " "), comments=True)

    def __str__(self) -> str:
        return f"{self.fence} {' '.join(self.words)}"


def fences(*languages: str) -> list[Fence]:
    """Those of all pages, in these languages; in any, where none is named."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            not_run, slow, printed = (match[group] or "" for group in ("not_run", "slow", "printed"))
            found.append(Fence(page, line, match["language"], match["text"], not_run, bool(slow), printed))
    return [fence for fence in found if not languages or fence.language in languages]


def commands() -> list[Command]:
    """Of all console blocks."""
    found = []
    for fence in fences("console"):
        _, *parts = re.split(r"^\$ ", fence.text, flags=re.MULTILINE)
        for part in parts:
            line, output = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*\n)(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
            found.append(Command(fence, line, output.strip("\n")))
    return found


def run(command: Command, folder: Path) -> str:
    """What a command of autorev's prints, run from a checkout's `cli.py` in `folder`."""
    arguments = command.words[2:] if command.words[0] == "python" else command.words[1:]
    program = f"import sys; sys.argv[0] = {command.words[0]!r}; from autorev.cli import main; main()"
    (folder / "profiles").symlink_to(ROOT / "profiles")
    environment = {**os.environ, "COLUMNS": WIDTH, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def main() -> None:
    """Write the shown outputs anew."""
    for command in commands():
        if command.output and not command.fence.not_run:
            print(command, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                printed = run(command, Path(folder))
            text = command.fence.page.read_text(encoding="utf-8")
            shown = f"$ {command.line}{command.output}"
            assert text.count(shown) == 1
            command.fence.page.write_text(text.replace(shown, f"$ {command.line}{printed}"), encoding="utf-8")


if __name__ == "__main__":
    main()
