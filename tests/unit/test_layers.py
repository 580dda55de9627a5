"""The layers of the package: what stands lower knows nothing of what stands higher, and nothing stands in a circle.

python -m pytest tests/unit/test_layers.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "autorev"
LAYERS = """
    errors format given host_store
    capture couplings files lock packages workload
    engine methods records
    analysis intact
    commands detect profiles words
    models offers rewrite
    detection plan
    chunked_loss
    predict
    conversion pipeline
    in_place verification
    profiler
    integrations
    finetuning
    report
    cli
"""
"""From the ground up; the parts of one line know nothing of each other."""
SHOWN = ("analysis.py", "profiler/record.py", "finetuning/record.py")
"""`print` of a record shows what the terminal report shows: these ask for it where they are printed, and only there."""


def imports(file: Path) -> Iterator[str]:
    """The parts of autorev that a file imports, wherever in it, but not for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    printed = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "__str__" for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if id(node) in printed and str(file.relative_to(PACKAGE)) in SHOWN:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("autorev."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "autorev":
            yield from (name.name for name in node.names if name.name != "__version__")


def test_nothing_knows_what_stands_above_it() -> None:
    """Every part has its layer, and imports from lower ones only."""
    height = {part: n for n, line in enumerate(LAYERS.split("\n")) for part in line.split()}
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - {"__init__", "__main__"} == set(height)
    upwards = {
        f"{file.relative_to(PACKAGE)} imports {part}"
        for file in PACKAGE.rglob("*.py")
        if (own := file.relative_to(PACKAGE).parts[0].removesuffix(".py")) in height
        for part in imports(file)
        if part != own and height[part] >= height[own]
    }
    assert sorted(upwards) == []
