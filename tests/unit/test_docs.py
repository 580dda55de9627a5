"""docs/obstacles.md: a section for every reason code, and examples that have the reason they show."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autorev

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "obstacles.md").read_text()
CODE = re.compile(r"[a-z]+(-[a-z]+)*")


def codes_in(tree: ast.AST) -> Iterator[str]:
    """First arguments of `Obstacle(...)`, values given to a name `code`, and `code: ` opening an f-string."""
    for node in ast.walk(tree):
        literals: list[ast.AST] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Obstacle":
            first = [*node.args, *(k.value for k in node.keywords if k.arg == "code")][0]
            literals = list(ast.walk(first))
        elif isinstance(node, ast.Assign):
            pairs = zip(unpacked(node.targets[0]), unpacked(node.value), strict=False)
            literals = [value for name, value in pairs if getattr(name, "id", "") == "code"]
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            begin, colon, _ = str(node.values[0].value).partition(": ")
            # English before a colon is no code; all codes but `closure` and the like have a dash.
            literals = [ast.Constant(begin)] if colon and "-" in begin else []
        for literal in literals:
            if isinstance(literal, ast.Constant) and CODE.fullmatch(str(literal.value)):
                yield str(literal.value)


def unpacked(node: ast.AST) -> list[ast.AST]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


def codes_in_source() -> set[str]:
    files = sorted((ROOT / "autorev" / "detect").glob("*.py"))
    return {code for file in files for code in codes_in(ast.parse(file.read_text()))}


def sections() -> dict[str, str]:
    parts = re.split(r"^## `(.+)`$", PAGE, flags=re.MULTILINE)
    assert len(parts) % 2 == 1
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def run(text: str, names: dict[str, Any]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(code, "example.py", "exec"), names)


def test_every_code_has_a_section() -> None:
    """A reason that the detection can give is explained, and nothing else is."""
    assert set(sections()) == codes_in_source()


def test_codes_are_found_in_source() -> None:
    """The search sees all three ways in which a code is written."""
    text = 'Obstacle("a-b", t, s)\ncode, what = "c-d", "passes"\nreasons = (f"e-f: {text} (x)",)\nf"see: {x}"'
    assert set(codes_in(ast.parse(text))) == {"a-b", "c-d", "e-f"}


def test_no_code_has_two_sections() -> None:
    """Each code is explained once."""
    found = re.findall(r"^## `(.+)`$", PAGE, flags=re.MULTILINE)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("code", list(sections()))
def test_section_says_what_to_do(code: str) -> None:
    """Every section ends with a remedy."""
    assert "\nWhat to do: " in sections()[code]


@pytest.mark.parametrize("code", list(sections()))
def test_example_has_its_reason(code: str) -> None:
    """autorev.analyze gives an example's blocks the reason that the example stands for."""
    names: dict[str, Any] = {}
    run(PAGE.partition("# Refusals")[0], names)
    parts, model = names["Parts"], names["Model"]
    run(sections()[code], names)
    models = [c for c in names.values() if isinstance(c, type) and issubclass(c, model) and c is not model]
    assert issubclass(names["Block"], parts) and len(models) <= 1
    example = (models or [model])[0](*(names["Block"]() for _ in range(3)))
    analysis = autorev.analyze(example, torch.zeros(2, 8, dtype=torch.long))
    blocks = [*analysis.refused, *(block for chain in analysis.chains for block in chain.blocks)]
    found = {reason.partition(":")[0] for block in blocks for reason in block.reasons}
    if code == "not-residual":  # said of almost every module, and therefore never listed
        assert not blocks
        return
    assert code in found, found
    refusals = {reason.partition(":")[0] for block in analysis.refused for reason in block.reasons}
    caveats = PAGE.index("# Caveats")
    assert (code in refusals) == (PAGE.index(f"## `{code}`") < caveats)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_pages_name_no_path_of_a_machine(page: Path) -> None:
    """Documentation is the same on every machine."""
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", page.read_text())
