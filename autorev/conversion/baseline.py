"""PyTorch's own ways to keep less, put in place for good: a checkpoint around blocks, and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from autorev.conversion.select import Chosen
from autorev.detect.judge import Finding
from autorev.errors import ConversionError
from autorev.methods import Method
from autorev.rewrite.checkpointed_forward import checkpointed_forwards
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
    paths: list[str] = []
    for number, chain in enumerate(chosen.chains):
        paths += _modules(chain[: max(len(chain) - method.stored_of(number), 0)])
    paths += [finding.call.path for finding in chosen.others if finding.can_be_checkpointed]
    if not paths:
        raise ConversionError(
            f"there is no block to put a {method.name} around: all are turns of loops, run once, or stored"
        )
    forwards, _ = checkpointed_forwards(model, tuple(paths), method)
    return Baseline(forwards, tuple(dict.fromkeys(paths)))


def _modules(findings: Sequence[Finding]) -> list[str]:
    return [finding.call.path for finding in findings if not finding.inline]
