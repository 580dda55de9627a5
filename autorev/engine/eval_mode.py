"""Eval mode for as long as autorev looks at a model, but for layers with quantised weights.

Such a layer drops nothing out and keeps no statistics: its mode chooses a kernel. In eval mode bitsandbytes rounds the
inputs of its 8-bit layers, which training does not, and on some CPUs it repacks 4-bit weights for good, rounded once
more, into a form that has no backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from autorev.capture.quantised import is_quantised


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """While it lasts, every module of `model` is in eval mode, and those with quantised weights as they train."""
    before = [(module, module.training) for module in model.modules()]
    for module, mode in before:
        wanted = is_quantised(module)
        if mode is not wanted:  # not by `eval()`, which an exported graph refuses
            module.training = wanted
    try:
        yield
    finally:
        for module, mode in before:
            if module.training is not mode:
                module.training = mode
