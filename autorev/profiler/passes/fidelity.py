"""Is a method right, and what does it do to the model's function? Gradients on the batch, losses on the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from autorev.engine.eval_mode import eval_mode
from autorev.engine.undisturbed import undisturbed
from autorev.in_place import Blocks, in_place
from autorev.methods import Method
from autorev.prediction.training import own_loss
from autorev.profiler.passes.prepare import on_tokens
from autorev.profiler.readings import Fidelity
from autorev.verification import Gradients, compare, verify_call
from autorev.workload import Call


def measure_fidelity(
    model: nn.Module, call: Call, method: Method, blocks: Blocks, texts: list[torch.Tensor]
) -> Fidelity:
    """Compare `method` with the model as it is, on the training call; leaves no gradient and no random state behind.

    A reversible method's gradients are compared with the oracle (the same coupling under ordinary autograd), any
    other's with those of plain autograd. `texts` are token ids [1, length]; without any, the losses are the call's.
    """
    with undisturbed(model), _without_gradients(model):
        original = _loss(model, call, texts)
        if method.name == "plain" and method.loss == "full":  # it is what the others are compared with
            return Fidelity("plain", 0.0, 1.0, {}, original, original, sum(ids.numel() for ids in texts))
        reference = None if method.reversible else _gradients(model, call)
        with in_place(model, method, blocks, call):
            loss = _loss(model, call, texts)
            if reference is None:
                found = verify_call(model, *call)
                against, error, cosine = "oracle", found.gradient_error, found.gradient_cosine
                drift = found.drift
            else:
                difference = compare(_gradients(model, call), reference)
                against, error, cosine, drift = "plain", difference.error, difference.cosine, {}
    return Fidelity(
        against=against,
        gradient_error=error,
        gradient_cosine=cosine,
        drift=drift,
        loss=loss,
        original_loss=original,
        tokens=sum(ids.numel() for ids in texts),
    )


def _loss(model: nn.Module, call: Call, texts: list[torch.Tensor]) -> float:
    """Mean loss without dropout."""
    calls = [on_tokens(call, ids) for ids in texts] or [call]
    with eval_mode(model):
        # With gradients: a model without a loss of its own is trained on what depends on its parameters.
        losses = [float(own_loss(model, each).detach()) for each in calls]
    return sum(losses) / len(losses)


def _gradients(model: nn.Module, call: Call) -> Gradients:
    torch.manual_seed(0)  # dropout has to drop the same both times
    own_loss(model, call).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
