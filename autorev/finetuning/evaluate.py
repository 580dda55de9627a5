"""How good is it? Loss on the held-out text, and how far it has moved from the original model."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from statistics import stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autorev.engine.eval_mode import eval_mode
from autorev.engine.mode import ORIGINAL, running
from autorev.finetuning.packing import Collator, Rows
from autorev.finetuning.record import Evaluation
from autorev.finetuning.teacher import divergence, shifted

Logits = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""From a batch without labels to logits [batch, tokens, vocabulary]."""


def evaluate(logits: Logits, rows: Rows, collator: Collator, step: int, original: Logits | None = None) -> Evaluation:
    """Over `rows`, one at a time: the loss in nats a learned token, and the comparison with `original`, if given."""
    losses: list[float] = []
    counts: list[int] = []
    agreeing = diverging = 0.0
    for index in range(len(rows)):
        batch = collator([rows[index]])
        labels = batch.pop("labels")
        found, wanted = shifted(logits(batch), labels)
        wanted = wanted.to(found.device)
        losses.append(float(F.cross_entropy(found.float(), wanted, reduction="sum")))
        counts.append(wanted.numel())
        if original is not None:
            theirs, _ = shifted(original(batch), labels)
            agreeing += float((found.argmax(-1) == theirs.argmax(-1)).sum())
            diverging += float(divergence(theirs, found))
    total = sum(counts)
    means = [loss / count for loss, count in zip(losses, counts, strict=True)]
    return Evaluation(
        step=step,
        loss=sum(losses) / total,
        # `stdev` knows no NaN, which broken weights make.
        standard_error=stdev(means) / len(means) ** 0.5 if len(means) > 1 and all(map(isfinite, means)) else None,
        agreement=None if original is None else agreeing / total,
        divergence=None if original is None else diverging / total,
        losses=tuple(means),
        tokens=tuple(counts),
    )


def logits_of(model: nn.Module) -> Logits:
    """`model` as it is, in eval mode and without gradients."""
    call: Any = model

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        device = next(model.parameters()).device
        with torch.no_grad(), eval_mode(model):
            found: torch.Tensor = call(**{k: v.to(device) for k, v in batch.items()}, use_cache=False).logits
        return found

    return run


def vanilla_logits(model: nn.Module) -> Logits:
    """`model` with its weights as they are, in the plain architecture."""
    logits = logits_of(model)

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with running(ORIGINAL):
            return logits(batch)

    return run
