"""Checkpoints around blocks that add to their input in place: what runs again in backward has to find it as it was.

python -m pytest tests/engine/test_checkpoint_in_place.py
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autorev
from autorev.errors import ConversionError

X = torch.linspace(-1, 1, 2 * 4 * 8, dtype=torch.float64).reshape(2, 4, 8)


class Block(nn.Module):
    """Saves nothing of its input, so that plain autograd trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += torch.tanh(self.linear(x * 1.0))
        return x


class TwoStreams(Block):
    """Adds to both."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y.add_(torch.tanh(self.linear(x * 1.0)))
        x.add_(torch.sin(self.linear(y * 1.0)))
        return x, y


class PostNorm(Block):
    """What it returns is not what it was given, so that nobody may take the one for the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x)) * 1.0  # a new one: the next block writes to it


class Counting(Block):
    """May write to something that is no stream."""

    counts = False

    def forward(self, x: torch.Tensor, calls: torch.Tensor) -> torch.Tensor:
        if self.counts:
            calls += 1
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    def __init__(self, block: type[Block], depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * 1
        y, calls = x * 0.5, torch.zeros(())
        for block in self.blocks:
            if isinstance(block, TwoStreams):
                x, y = block(x, y)
            else:
                x = block(x, calls) if isinstance(block, Counting) else block(x)
        return (x + y).mean()  # saves neither


def make(block: type[Block] = Block, depth: int = 3) -> Model:
    torch.manual_seed(0)
    return Model(block, depth).double()


def gradients(model: Model) -> list[torch.Tensor]:
    model.zero_grad()
    model(X).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("method", ["checkpoint", "sac", "offload", "checkpoint:keep_last=1", "offload:host=inputs:1"])
@pytest.mark.parametrize("block", [Block, TwoStreams])
@pytest.mark.parametrize("depth", [2, 3])
def test_gradients_are_those_of_plain_autograd(block: type[Block], depth: int, method: str) -> None:
    """To the last bit: the same operations on the same numbers."""
    model = make(block=block, depth=depth)
    expected = gradients(model)
    conversion = autorev.convert(model, (X,), method=method)
    assert conversion.checkpointed
    assert all(map(torch.equal, gradients(model), expected))
    with torch.no_grad():
        assert torch.equal(model(X), make(block=block, depth=depth)(X))
    autorev.revert(model)
    assert all(map(torch.equal, gradients(model), expected))


def test_a_block_that_is_no_residual_one() -> None:
    """A copy on the host is as it was; where there is none, it is an error that names the block."""
    model = make(PostNorm)
    expected = gradients(model)
    autorev.convert(model, (X,), method="offload")
    assert all(map(torch.equal, gradients(model), expected))
    autorev.revert(model)
    autorev.convert(model, (X,), method="checkpoint")
    with pytest.raises(ConversionError, match=r"blocks\.0 writes to a tensor that it is given"):
        model(X)


def test_a_step_is_simulated() -> None:
    """What the conversion says it holds is there."""
    conversion = autorev.convert(make(), (X,), method="checkpoint")
    assert conversion.memory is not None
    assert conversion.memory.converted.kept <= conversion.memory.plain.kept


def test_what_is_no_stream_is_not_written_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, with the line; where it comes later, in forward; without gradients nothing runs twice."""
    model = make(block=Counting)
    autorev.convert(model, (X,), method="checkpoint")
    monkeypatch.setattr(Counting, "counts", True)
    with pytest.raises(ConversionError, match=r"blocks\.0 writes to a tensor that it is given"):
        model(X)
    with torch.no_grad():
        model(X)
    autorev.revert(model)
    with pytest.raises(ConversionError, match=r"blocks\.0: argument-write: .*overwrites its argument calls"):
        autorev.convert(model, (X,), method="checkpoint")
