"""Converted models against the same coupling under ordinary autograd: nested chains.

python -m pytest tests/engine/test_nested.py
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autorev
from autorev.rewrite.block_forward import ReversibleForward
from autorev.rewrite.replacement import replacements_of
from tests.helpers import handwritten as hand
from tests.helpers.blocks import TOKENS, Mlp, Setting, assert_like_oracle, each_setting, small, states


class Outer(nn.Module):
    """A residual block whose branch is a chain of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hand.WIDTH)
        self.inner = nn.Sequential(*(Mlp() for _ in range(3)))
        self.out = nn.Linear(hand.WIDTH, hand.WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.inner(self.norm(x)))


OUTER = [f"blocks.{i}" for i in range(3)]


@each_setting
@pytest.mark.parametrize(
    ("blocks", "expected"),
    [("blocks.?", OUTER), ("blocks.*", OUTER)],
    ids=["outer", "all"],
)
def test_patterns_choose_among_nested_chains(blocks: str, expected: list[str], setting: Setting) -> None:
    """Of a block that itself contains a chain the outer one is converted; the inner one is a model of its own."""
    torch.manual_seed(0)
    model = small(3, Outer).to(setting.dtype)
    conversion = autorev.convert(model, blocks=blocks, batch=(TOKENS,), **setting.options)
    assert sorted(path for chain in conversion.chains for path in chain.blocks) == expected

    assert_like_oracle(model, setting)


@each_setting
@pytest.mark.parametrize("outer", [True, False], ids=["both", "inner"])
@pytest.mark.parametrize("keep_last", [0, 1])
def test_chains_inside_of_a_block(keep_last: int, outer: bool, setting: Setting) -> None:
    """The inner chains are converted as models of their own, and run again within an outer block's second run."""
    torch.manual_seed(0)
    model = small(3, Outer).to(setting.dtype)
    options = {"keep_last": keep_last, **setting.options}
    if outer:
        autorev.convert(model, batch=(TOKENS,), **options)
    for block in model.blocks:
        autorev.convert(block.inner, batch=(states(setting),), **options)
    assert sum(isinstance(found, ReversibleForward) for found in replacements_of(model)) == 9 + 3 * outer

    assert_like_oracle(model, setting)
