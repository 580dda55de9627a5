"""Converted models against the same coupling under ordinary autograd: what is trained.

python -m pytest tests/engine/test_trained.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from tests.helpers import handwritten as hand
from tests.helpers.blocks import EXACT, Setting, assert_like_oracle, converted, each_setting, one_block, small, step

FROZEN: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding.",),
    "some-of-a-block": ("blocks.1.norm", "blocks.2.mlp.up", "blocks.3.attention.out.bias"),
    "one-block": ("blocks.1.",),
    "last-block": ("blocks.3.",),
    "lower-half": ("embedding.", "blocks.0.", "blocks.1."),
    "lower-half-not-the-embedding": ("blocks.0.", "blocks.1."),
    "upper-half": ("blocks.2.", "blocks.3."),
    "all-blocks": ("blocks.",),
    "all-but-the-head": ("embedding.", "blocks.", "norm."),
    "all-but-one-block": ("embedding.", "blocks.0.", "blocks.1.", "blocks.3.", "norm.", "head."),
}


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters(name: str, keep_last: int, setting: Setting) -> None:
    """Whatever is frozen, the rest has the gradients it should have, and what is frozen has none."""
    model = converted(setting, small, keep_last=keep_last)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(not path.startswith(FROZEN[name]))
    results = assert_like_oracle(model, setting)

    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == results.keys() - {"loss"}


def test_frozen_lower_blocks_are_not_run_again() -> None:
    """With nothing to train below block 2, blocks 0 and 1 run once a step, the others twice."""
    model = converted(EXACT, small, keep_last=0)
    model.embedding.requires_grad_(False)
    model.blocks[:2].requires_grad_(False)
    runs = [0] * 4
    for number, block in enumerate(model.blocks):
        block.norm1.register_forward_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    step(model)

    assert runs == [1, 1, 2, 2]


def alternating_blocks() -> hand.Stack:
    """Two blocks in turn, three times."""
    a, b = hand.Block(), hand.Block()
    return hand.Stack(a, b, a, b, a, b)


def tied() -> hand.Stack:
    """Blocks that share their MLP, and a head that is the embedding."""
    model = small()
    for block in model.blocks[1:]:
        block.mlp = model.blocks[0].mlp
    model.head.weight = model.embedding.weight
    return model


@each_setting
@pytest.mark.parametrize("make", [alternating_blocks, one_block, tied])
@pytest.mark.parametrize("keep_last", [0, 2])
def test_shared_weights(make: Callable[[], nn.Module], keep_last: int, setting: Setting) -> None:
    """A module used several times, and parameters in several modules, collect the gradients of all their uses."""
    model = converted(setting, make, keep_last=keep_last)
    assert_like_oracle(model, setting)
