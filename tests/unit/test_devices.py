"""Kinds of devices that are not there: models on them are refused, with the reason, before anything is changed.

Fake tensors say that they lie on a device without there being one.

python -m pytest tests/unit/test_devices.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev import devices
from autorev.capture.fake import new_fake_mode
from autorev.conversion.convert import chains_of
from autorev.errors import ConversionError
from tests.helpers import handwritten as hand

TOKENS = torch.arange(16).reshape(2, 8)


def on(kind: str) -> tuple[nn.Module, torch.Tensor, Any]:
    """A model without values on a device of that kind, its input, and the mode that both belong to."""
    mode = new_fake_mode()
    model = hand.stack_of(hand.Block)
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=kind))
        return model, torch.empty(2, 8, dtype=torch.long, device=kind), mode


@pytest.mark.parametrize(
    "method", ["momentum", "leapfrog", "offload", "checkpoint:tile=4", "checkpoint:keep=attention"]
)
@pytest.mark.parametrize(("kind", "why"), [("mps", "no float64"), ("xpu", "has not run on it")])
def test_a_model_there_is_refused(kind: str, why: str, method: str) -> None:
    """In words that name a parameter, the kind, why, and what to do; the model is as it was."""
    model, tokens, mode = on(kind)
    with mode, pytest.raises(ConversionError, match=f"embedding.weight lies on a device of kind {kind}.*{why}") as said:
        autorev.convert(model, tokens, method=method)
    assert "method='checkpoint'" in str(said.value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_kinds_that_nobody_thought_of_are_refused() -> None:
    """With no reason of their own."""
    with pytest.raises(ConversionError, match=r"weight lies on a device of kind hpu.*: autorev has not run on it\."):
        devices.check_device("hpu", "weight")


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_what_is_pytorchs_own_is_not(kind: str) -> None:
    """Checkpoints around the blocks, as the refusal recommends."""
    model, tokens, mode = on(kind)
    with mode:
        done = autorev.convert(model, tokens, method="checkpoint")
    assert len(done.checkpointed) == 3


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_where_it_is_right_it_is_converted(kind: str) -> None:
    """The check itself passes there."""
    model, tokens, mode = on(kind)
    with mode:
        assert len(autorev.convert(model, tokens, keep_last=0).chains) == 1


def test_a_model_that_is_moved_there_afterwards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its chain begins, and by `verify`, which looks at random states first."""
    model = hand.stack_of(hand.Block)
    autorev.convert(model, TOKENS, keep_last=0)
    monkeypatch.setattr(devices, "REVERSIBLE_ON", frozenset({"cuda"}))
    with pytest.raises(ConversionError, match=r"the stream that reaches blocks\.0 lies on a device of kind cpu"):
        model(TOKENS)
    with pytest.raises(ConversionError, match=r"embedding\.weight lies on a device of kind cpu"):
        autorev.verify(model, TOKENS)
    assert autorev.revert(model) == 3 and not chains_of(model)
    model(TOKENS)
