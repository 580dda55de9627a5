"""Residual steps in the user's words: does a branch attend, convolve, or what?"""

from __future__ import annotations

import re

from torch import nn

from autorev.analysis import Step
from autorev.detect.graph_queries import is_norm_module
from autorev.detect.stream import ResidualStep

_kinds = (
    ("attention", r"attn|attention|\batt\b"),
    ("moe", r"moe|experts|sparse"),
    ("state-space", r"mamba|mixer|\bssm|recurrent|rwkv|lstm|retention"),
    ("mlp", r"mlp|feed ?forward|\bffn?\b|dense|intermediate|\bfc ?\d|linear ?\d|c proj|up proj"),
    ("convolution", r"conv"),
)


def public_step(step: ResidualStep, module: nn.Module, in_loop: bool) -> Step:
    """The step as frozen data; of a turn of a loop, without what has made the older streams that it reads."""
    nodes = step.own_nodes() if in_loop else step.branch_nodes()
    called = [str(n.target) for n in nodes if n.op == "call_module"]
    return Step(_kind(called, module), tuple(dict.fromkeys(called)), step.source)


def _kind(called: list[str], block: nn.Module) -> str:
    """What the branch does, told from the names of the sub-modules it calls; norms say nothing about it."""
    kinds = set()
    for path in called:
        child = block.get_submodule(path)
        if not is_norm_module(child) and not path.startswith("ln_"):
            kinds.add(_kind_of_module(path, child, block))
    if "attention" in kinds and kinds & {"mlp", "moe"}:
        return "parallel"
    return next((kind for kind, _ in _kinds if kind in kinds), "other")


def _kind_of_module(path: str, child: nn.Module, block: nn.Module) -> str | None:
    """Its class says it if it can (`layer.mlp` may hold experts), else its name, else what it is made of."""
    inner = " ".join(_words(type(m).__name__) for m in child.modules() if m is not child)
    made_of = inner if _is_told(child) else "conv" if "conv" in inner else ""
    for words in (_own_words(child, block), _words(path), made_of):
        kind = next((kind for kind, pattern in _kinds if re.search(pattern, words)), None)
        if kind is not None:
            return "moe" if kind == "mlp" and "experts" in inner else kind
    return None


def _is_told(wrapper: nn.Module) -> bool:
    """Sequential containers and wrappers around one function are what they contain."""
    return isinstance(wrapper, nn.Sequential) or sum(not is_norm_module(m) for m in wrapper.children()) == 1


def _own_words(child: nn.Module, block: nn.Module) -> str:
    """The words of the class name without those that the block's has too: a `RecurrentGemmaMlp` is no recurrence."""
    words, shared = _words(type(child).__name__).split(), _words(type(block).__name__).split()
    while words and shared and words[0] == shared[0]:
        words, shared = words[1:], shared[1:]
    return " ".join(words)


def _words(name: str) -> str:
    """`GptOssMLP` and `fc_in.0` as words: "gpt oss mlp", "fc in 0"."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_.]", " ", name.replace("MoE", "Moe"))
    return spaced.lower()
