"""Residual chains as they are written elsewhere: one minimal model for each way to write one that is taken apart."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.handwritten import MLP, WIDTH, Block, Parts, Stack

# -- who adds, and by what function


class Add(nn.Module):
    """x-transformers' Residual."""

    def forward(self, branch: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return branch + residual


class Normed(nn.Module):
    """A branch of its own."""

    def __init__(self, f: type[nn.Module] = MLP) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), f()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(self.norm(x))


class AddedByModules(nn.Module):
    """The loop's adds are calls of modules that do nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Normed(), Add()]) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch, add in self.layers:
            x = add(branch(x), x)
        return x


def _bias_dropout_add(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, p: float) -> torch.Tensor:
    return residual + F.dropout(x + bias, p)


with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    _scripted = torch.jit.script(_bias_dropout_add)


class Scripted(Parts):
    """Megatron's bias_dropout_add."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _scripted(self.attention(self.norm1(x)), self.norm1.bias, x, 0.1)
        return _scripted(self.mlp(self.norm2(x)), self.norm2.bias, x, 0.1)


class MatrixProduct(Parts):
    """The last matrix product adds onto the stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch, weight = self.attention(self.norm1(x)).flatten(0, 1), self.mlp.down.weight
        return torch.addmm(x.flatten(0, 1), self.mlp.up(branch), weight.t()).view_as(x)


class EverySecond(Parts):
    """Half of the tokens are worked on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_add(1, torch.arange(0, x.shape[1], 2), self.mlp(self.norm1(x[:, ::2])))


class Chosen(Parts):
    """Mixture of depths."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x.sum(-1).topk(3, 1).indices[..., None].expand(-1, -1, x.shape[-1])
        return torch.scatter_add(x, 1, chosen, self.mlp(self.norm1(x.gather(1, chosen))))


class Stacked(Parts):
    """A sum over a stack."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.attention(self.norm1(x)), x, self.mlp(self.norm2(x))]).sum(0)


class StackedLoop(nn.Module):
    """The same in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Normed() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.stack([x, layer(x)], dim=0).sum(dim=0)
        return x


class PerSequence(Parts):
    """One vector per sequence is added to every token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm1(x.mean(1, keepdim=True)))


class TimesOne(Parts):
    """A factor of 1."""

    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.attention(self.norm1(x))) / self.scale
        return x * self.scale + self.mlp(self.norm2(x))


class CastBack(Parts):
    """The input lends the output its dtype and shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x.double() + self.attention(self.norm1(x))).type_as(x)
        return (y + self.mlp(self.norm2(y)) + torch.zeros_like(x)).view_as(x)


class Guarded(Block):
    """T5's guard against infinities."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, largest = super().forward(x), torch.finfo(x.dtype).max
        bound = torch.where(torch.isinf(x).any(), largest - 1000, largest)
        return torch.clamp(x, min=-bound, max=bound)


class Windows(Block):
    """MaxViT's windows, made by modules."""

    class Order(nn.Module):
        """Even positions first, or back."""

        def __init__(self, shape: tuple[int, int]) -> None:
            super().__init__()
            self.shape = shape

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(1, self.shape).transpose(1, 2).flatten(1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = self.Order((4, 2)), self.Order((2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.there(x)
        x = self.back(x + self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


# -- blocks that draw


class DroppingItself(Block):
    """Layer-drop inside the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if random.random() < 0.3 else super().forward(x)


class DroppingByTorch(Block):
    """The same, drawn by torch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if torch.rand([]) < 0.3 else super().forward(x)


class OwnGenerator(Parts):
    """Stochastic depth from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(x.shape[0], 1, 1, generator=self.generator, dtype=x.dtype) > 0.3
        return x + kept * self.mlp(self.norm1(x))


# -- stacks beside and within others


class LoopOfTwo(nn.Module):
    """lucidrains' Transformer."""

    def __init__(self, depth: int = 3, normed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Normed(), Normed()]) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH) if normed else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return self.norm(x)


class Outer(Parts):
    """diffusers' Transformer2DModel: a residual block with a chain inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.blocks(self.norm1(x)))


class Convolving(nn.Module):
    """A residual module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Projecting(Parts):
    """A sum that is no residual one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention.out(x) + self.mlp(self.norm1(x))


class Around(nn.Module):
    """A loop whose turns call a module of the kind `inner` between two adds of its own."""

    def __init__(self, first: type[nn.Module], inner: type[nn.Module] | None) -> None:
        super().__init__()
        made = [[Normed(first), inner() if inner else nn.Identity(), Normed()] for _ in range(3)]
        self.layers = nn.ModuleList(map(nn.ModuleList, made))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, inner, mlp in self.layers:
            x = attention(x) + x
            x = inner(x)
            x = mlp(x) + x
        return x


# -- what a loop does between its blocks


class Between(Stack):
    """A vector for each layer is added in the loop."""

    def __init__(self) -> None:
        super().__init__(*(Block() for _ in range(3)))
        self.added = nn.Parameter(torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block, vector in zip(self.blocks, self.added, strict=True):
            x = block(x + vector)
        return self.head(self.norm(x))


class StepBetween(Stack):
    """DDPM's U-Net: a residual step of the loop between blocks."""

    def __init__(self) -> None:
        super().__init__(*(Block() for _ in range(3)))
        self.more = nn.ModuleList(Normed() for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block, more in zip(self.blocks, self.more, strict=True):
            x = block(x)
            x = more(x) + x
        return self.head(self.norm(x))


class Rearranged(Stack):
    """Latte: blocks over space and over time take turns."""

    def __init__(self) -> None:
        super().__init__(*(Block() for _ in range(4)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x).transpose(0, 1).contiguous()
        return self.head(self.norm(x))


class Viewed(Stack):
    """Blocks take tokens, and the loop has an image."""

    def __init__(self) -> None:
        super().__init__(*(Block() for _ in range(3)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).unflatten(1, (2, 4))
        for block in self.blocks:
            x = block(x.view(2, 8, WIDTH)).view(2, 2, 4, WIDTH)
        return self.head(self.norm(x))


class Repeated(Stack):
    """Two blocks three times, with the first stream added before each."""

    def __init__(self) -> None:
        super().__init__(Block(), Block())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first = self.embedding(tokens)
        x = torch.zeros_like(first)
        for _ in range(3):
            x = x + first
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))


class ReadingTheFirst(LoopOfTwo):
    """Every turn reads what the loop began with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for attention, mlp in self.layers:
            x = attention(x + 0.1 * first) + x
            x = mlp(x) + x
        return x


class Growing(Stack):
    """DenseFormer: blocks are given a list, to which the loop adds afterwards."""

    class Reading(Block):
        """Reads every earlier state."""

        def forward(self, x: torch.Tensor, states: list[Any]) -> torch.Tensor:
            return super().forward(x) + self.mlp(sum(states) / len(states))

    def __init__(self) -> None:
        super().__init__(*(self.Reading() for _ in range(3)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        states = [x]
        for block in self.blocks:
            x = block(x, states)
            states.append(x)
        return self.head(self.norm(x))


# -- what branches and blocks hand on


@dataclass
class State:
    """The stream, and what goes with it."""

    h: torch.Tensor
    kept: torch.Tensor


class TakingState(Block):
    """A block from dataclass to dataclass."""

    def forward(self, state: State) -> State:  # type: ignore[override]  # takes another kind of argument than its parent
        return State(super().forward(state.h), state.kept)


class OfStates(Stack):
    """A stack of these."""

    def __init__(self) -> None:
        super().__init__(*(TakingState() for _ in range(3)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        state = State(self.embedding(tokens), tokens)
        for block in self.blocks:
            state = block(state)
        return self.head(self.norm(state.h))


class Telling(nn.Module):
    """x-transformers' attention: a branch that also says what it computed, in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Normed()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, State]:
        out = self.f(x)
        return out, State(x, out.mean(1, keepdim=True))


class Told(nn.Module):
    """A loop that keeps what the first branch says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Telling() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor | None = None
        for layer in self.layers:
            out, state = layer(x)
            first = state.kept if first is None else first
            x = x + (out + first)
        return x
