"""Converted models against the same coupling under ordinary autograd: copies and files.

python -m pytest tests/engine/test_copies.py
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import autorev
from tests.helpers.blocks import (
    EXACT,
    TOKENS,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    each_setting,
    gradients_of,
    mean_square,
    small,
    step,
)


def roundtrip(model: nn.Module) -> nn.Module:
    """Through `torch.save`."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": roundtrip,
}


@each_setting
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_a_converted_model_of_its_own(name: str, setting: Setting) -> None:
    """The copy is reversible, runs its own blocks, and does not touch the original."""
    model = converted(setting, small)
    before = step(model)
    twin = COPIES[name](model)
    assert_same(step(twin), before, 0)
    assert autorev.drift(twin).keys() == {"blocks"}

    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        twin.blocks[1].mlp.up.weight.mul_(2)
    assert not torch.equal(assert_like_oracle(twin, setting)["loss"], before["loss"])
    assert not gradients_of(model)
    assert_same(step(model), before, 0)

    assert autorev.revert(twin) == 4
    assert "forward" in vars(model.blocks[0])
    assert_same(step(model), before, 0)


def test_a_copy_made_between_forward_and_backward() -> None:
    """A graph that is under way is the original's."""
    model = converted(EXACT, small)
    expected = step(model)
    model.zero_grad(set_to_none=True)
    loss = mean_square(model(TOKENS))
    twin = copy.deepcopy(model)
    loss.backward()

    assert_same({"loss": loss.detach(), **gradients_of(model)}, expected, 0)
    assert not gradients_of(twin)
