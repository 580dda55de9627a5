"""The layers of the package: what stands lower knows nothing of what stands higher, and nothing stands in a circle.

python -m pytest tests/unit/test_layers.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "autorev"
LAYERS = """
    alike errors format given operands patching
    metadata_cache
    own_mode
    couplings devices files hush keeps lock optimizers packages workload
    integrations known_methods method_options setting
    capture
    engine methods records
    analysis intact
    commands detect plan profiles words
    advice models rewrite
    detection losses
    chunked_loss
    prediction
    conversion pipeline
    in_place verification
    profiler
    fx planning
    finetuning
    report
    cli
"""
"""From the ground up; the parts of one line know nothing of each other."""
LIBRARIES = {"transformers", "peft", "trl", "accelerate", "bitsandbytes", "torchao", "optimum"}
THEIR_WORDS = {
    *("get_seq_length", "get_output_embeddings", "get_input_embeddings", "get_text_config", "is_encoder_decoder"),
    *("gradient_checkpointing", "prepare_decoder_input_ids_from_labels", "main_input_name", "Conv1D", "model_type"),
    *("get_base_model", "disable_adapter", "peft_config", "merge_and_unload", "base_model.model.", "base_layer"),
    *("_hf_hook", "_old_forward", "AlignDevicesHook", "ref_model", "compute_ref_log_probs"),
}
"""What `autorev.integrations` asks of other people's libraries."""
KNOW_THEM = ("integrations", "models", "finetuning")
"""Models are loaded by transformers, and trained by its Trainer."""
SHOWN = ("analysis.py", "plan.py", "profiler/record.py", "finetuning/record.py")
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


def test_only_integrations_know_other_libraries() -> None:
    """The core imports none of them, and asks a model for nothing by their names: it calls `autorev.integrations`."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE)
        if own.parts[0] in KNOW_THEM:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            word = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            named = isinstance(node, ast.Attribute | ast.Constant) and isinstance(word, str) and word in THEIR_WORDS
            if named or LIBRARIES & {name.partition(".")[0] for name in imported}:
                found.add(f"{own}:{node.lineno}: {word or imported}")
    assert sorted(found) == []
