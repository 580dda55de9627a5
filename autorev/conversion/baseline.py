"""PyTorch's own ways to keep less, put in place for good: a checkpoint around blocks, and tiles."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from autorev.conversion.select import Chosen
from autorev.errors import ConversionError
from autorev.methods import Method
from autorev.rewrite.checkpointed_forward import checkpointed_forwards, run_twice
from autorev.rewrite.replacement import Replacement


@dataclass(frozen=True, eq=False)
class Baseline:
    """What is to be installed, and the blocks that it checkpoints."""

    forwards: tuple[Replacement, ...]
    paths: tuple[str, ...]


def baseline(model: nn.Module, chosen: Chosen, method: Method, planned: bool) -> Baseline:
    """What makes `model` train by a method that is no coupling; `planned`: a plan says so, and may say that nothing is
    needed.

    Raises:
        ConversionError: its blocks are no modules, or there is nothing to do.
    """
    if method.name == "plain":
        if method.tile is None and not planned:
            raise ConversionError("plain training is what the model does already; there is nothing to convert")
        return Baseline((), ())
    others = [finding.call.path for finding in chosen.others if finding.can_be_checkpointed]
    blocks = run_twice(method, chosen.chains, others)
    if not blocks:
        why = "all are turns of loops, run once, or stored"
        if chosen.left_out:
            path, reason = chosen.left_out[0]
            why = f"{path}: {reason}"
        raise ConversionError(f"there is no block to put a {method.name} around: {why}")
    forwards, _ = checkpointed_forwards(model, blocks, chosen.chains, method)
    return Baseline(forwards, tuple(blocks))
