"""What belongs to one call of a model is nowhere where another thread's call, or another model's, could change it.

python -m pytest tests/unit/test_call_state.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "autorev"
CONTAINERS = {
    *("dict", "list", "set", "deque", "defaultdict", "Counter", "OrderedDict"),
    *("WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "WeakIdKeyDictionary"),
}
OF_THE_PROCESS = {
    "patching.py _installed": "functions of others that have a stand-in, under a lock: each thread has its own",
    "capture/generators.py _places": "a cache: where the code of a class draws from",
    "capture/quantised.py _known": "a cache: what a kind of layer keeps for backward",
    "conversion/references.py _beside": "a mark on a reference model, for each policy",
    "conversion/references.py _following": "likewise",
    "conversion/references.py _checked": "a mark on a trainer",
    "integrations/example_call.py _taken": "which inputs a class of models takes, by its config",
    "conversion/compiling.py _compiled": "a mark on a model that `convert` has compiled",
    "engine/chain.py _called": "the chains that compiled code calls by name, as long as they live",
    "engine/mode.py otherwise": "how many threads run converted models otherwise: compiled code is guarded by it",
    "metadata_cache.py _known": "a cache: what an operation returns, by the shapes that it is given; of bounded size",
    "capture/fake.py _numbers": "the numbers that fake tensors stand for, as long as they live",
    "detect/scaling.py _numbers": "a cache: the number in a tensor of one element, by its version",
    "detect/tokenwise.py _answers": "a cache: what is proved of a recorded call, as long as it lives",
    "engine/mask.py _known": "a cache: whether a mask is causal, by its values",
    "models/weights.py _said": "log messages that are not repeated",
    "couplings/fused.py _said": "likewise",
    "rewrite/block_forward.py _left_empty": "a mark on a key-value cache, whichever model is given it",
}
"""Containers that grow while the process runs, and why they are no call's."""


def growing(file: Path) -> Iterator[str]:
    """Names of a module, and attributes of its classes, that begin as empty containers, or are assigned by `global`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in [
        *tree.body,
        *(line for each in ast.walk(tree) if isinstance(each, ast.ClassDef) for line in each.body),
    ]:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        empty = isinstance(value, ast.Dict) and not value.keys
        empty = empty or (isinstance(value, ast.List) and not value.elts)
        made = isinstance(value, ast.Call) and not value.args and not value.keywords
        if value is not None and (empty or (made and ast.unparse(value.func).split(".")[-1] in CONTAINERS)):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            yield ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names


def test_nothing_grows_in_a_module_that_belongs_to_a_call() -> None:
    """Call state lies on the chain, the tape or the call's own objects, or in a context variable."""
    found = {
        f"{path.relative_to(PACKAGE).as_posix()} {name}" for path in PACKAGE.rglob("*.py") for name in growing(path)
    }
    assert found == set(OF_THE_PROCESS)
