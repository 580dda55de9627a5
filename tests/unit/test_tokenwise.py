"""Which modules act on each position alone: what is proved, held against running them on a few positions.

python -m pytest tests/unit/test_tokenwise.py
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autorev.capture.fake import fake_copy, new_fake_mode
from autorev.capture.record import record
from autorev.detect.tokenwise import Mixing, TokenWise, token_wise

POSITIONS, WIDTH = 6, 8


class Of(nn.Module):
    """A function as a module with a few layers to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.table = nn.Parameter(torch.randn(POSITIONS, WIDTH))
        self.vector = nn.Parameter(torch.randn(WIDTH))
        self.calls = 0
        self.log: list[int] = []
        self.seen = torch.zeros(())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def rms(m: Of, x: torch.Tensor) -> torch.Tensor:
    """As Llama's."""
    wide = x.to(torch.float64)
    return m.vector * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def flattened(m: Of, x: torch.Tensor) -> torch.Tensor:
    """As OPT's."""
    return m.down(torch.relu(m.up(x.reshape(-1, x.shape[-1])))).view(x.shape)


def gated(m: Of, x: torch.Tensor) -> torch.Tensor:
    """Halves of the features."""
    a, b = m.up(x).chunk(2, dim=-1)
    return m.down(torch.cat([F.silu(a) * b, b], -1))


def heads(m: Of, x: torch.Tensor) -> torch.Tensor:
    """Features in heads, and a softmax over each."""
    split = x.view(*x.shape[:-1], 2, WIDTH // 2).transpose(1, 2)
    return torch.softmax(split, -1).transpose(1, 2).flatten(2)


def two_inputs(m: Of, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """BLOOM's MLP is given the residual."""
    return m.down(F.gelu(m.up(x))) + residual


class Normalising(torch.autograd.Function):
    """Its forward tells nothing of its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / grads[0].norm()


class Gelu(torch.autograd.Function):
    """As BLOOM's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * torch.tanh(x)


class Averaging(Gelu):
    """Its backward goes by the number of positions."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / grads[0].shape[1]


class Scaling(torch.autograd.Function):
    """It has a gradient for a parameter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] * weight, torch.tanh((grads[0] * x).sum((0, 1)))


def hooked(m: Of, x: torch.Tensor) -> torch.Tensor:
    """A gradient is made zero on average."""
    h = m.up(x)
    h.register_hook(lambda grad: grad - grad.mean(1, keepdim=True))
    return m.down(h)


def shift(m: Of, x: torch.Tensor) -> torch.Tensor:
    """In place, and through a view."""
    h = m.up(x)
    h[:, 1:].copy_(h[:, :-1].clone())
    return h


ALONE: dict[str, Callable[..., Any]] = {
    "mlp": lambda m, x: m.down(F.gelu(m.up(x))),
    "gated": gated,
    "glu": lambda m, x: F.glu(torch.cat([x, x], -1)),
    "layer norm": lambda m, x: m.norm(x),
    "rms": rms,
    "flattened": flattened,
    "heads": heads,
    "transposed": lambda m, x: (x.transpose(1, 2) * 2).mT,
    "einsum": lambda m, x: torch.einsum("btd,ed->bte", x, m.up.weight),
    "matmul": lambda m, x: x @ m.up.weight.T @ m.down.weight.T,
    "select": lambda m, x: x - x[..., :1] + x[..., 3].unsqueeze(-1),
    "where": lambda m, x: torch.where(x > 0, x, m.vector),
    "in place": lambda m, x: m.up(x).mul_(2).relu_(),
    "clamped": lambda m, x: x.clamp(-1, 1).softmax(-1) / x.norm(dim=-1, keepdim=True),
    "a backward of its own": lambda m, x: m.down(Gelu.apply(m.up(x))),
    "new memory": lambda m, x: x.new_zeros(x.shape) + x * x.new_ones(WIDTH),
    "a table's row": lambda m, x: x + m.table[2] * m.table.mean(0),
    "outer": lambda m, x: (x.unsqueeze(-1) * x.unsqueeze(-2)).sum(-1),
    "sorted": lambda m, x: x.sort(-1)[0] + x.topk(3, -1)[0].sum(-1, keepdim=True),
    "batches of matrices": lambda m, x: torch.bmm(x, m.up.weight[:WIDTH].expand(x.shape[0], WIDTH, WIDTH)),
    "one stream of numbers": lambda m, x: (x.flatten() * 2).view_as(x),
    "moved and back": lambda m, x: x.movedim(1, 0).softmax(-1).movedim(0, 1),
    "over batch": lambda m, x: x - x.mean(0, keepdim=True),
}
MIXED: dict[str, tuple[Callable[..., Any], str]] = {
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), "bmm"),
    "mean": (lambda m, x: x - x.mean(1, keepdim=True), "`mean` at"),
    "mean of all": (lambda m, x: x - x.mean(), "`mean` at"),
    "softmax": (lambda m, x: x.softmax(1), "softmax"),
    "shift": (lambda m, x: x + x.roll(1, 1), "`roll` at"),
    "flip": (lambda m, x: x + x.flip(1), "`flip` at"),
    "sum over time": (lambda m, x: x.cumsum(1), "`cumsum` at"),
    "slice": (lambda m, x: F.pad(x[:, 1:], (0, 0, 0, 1)), "`slice` at"),
    "convolution": (lambda m, x: m.conv(x.mT).mT, "convolution"),
    "positions": (lambda m, x: x + m.table, "a value of its own for each position"),
    "arange": (lambda m, x: x * torch.arange(x.shape[1])[:, None], "a value of its own for each position"),
    "batch norm": (lambda m, x: F.batch_norm(x, None, None, training=True), "batch_norm"),
    "routing": (lambda m, x: x[:, torch.argsort(x[0, :, 0])], ""),
    "mixed by a matrix": (lambda m, x: torch.einsum("btd,ts->bsd", x, torch.ones(x.shape[1], x.shape[1])), ""),
    "gram": (lambda m, x: (x @ x.mT) @ x, "bmm"),
    "merged": (lambda m, x: m.up(x.reshape(x.shape[0], -1, 2, WIDTH).sum(2)).repeat(1, 2, 1), ""),
    "long or short": (lambda m, x: x * 2 if x.shape[1] >= POSITIONS else x - 1, "something else for fewer positions"),
    "by length": (lambda m, x: m.down(m.up(x.view(x.shape[0], POSITIONS, WIDTH))), ""),
    "writes to its input": (lambda m, x: x.mul_(2), "it writes to its input"),
    "returns two": (lambda m, x: (x, x), "it returns a tuple"),
    "keeps something": (lambda m, x: setattr(m, "calls", x) or x * 2, "writes to attributes"),
    "by their number": (lambda m, x: x / x.shape[1], "something else for fewer positions"),
    "by a tensor of it": (lambda m, x: x * torch.tensor(float(x.shape[1])), "something else for fewer"),
    "by a full of it": (lambda m, x: x * torch.full((), float(x.shape[1])), "something else for fewer"),
    "by a mean of it": (lambda m, x: x * torch.arange(x.shape[1]).float().mean(), "something else for fewer"),
    "by its logarithm": (lambda m, x: x * math.log(x.numel()), "something else for fewer"),
    "a row by their number": (lambda m, x: x + m.table[x.shape[1] - 2], "something else for fewer"),
    "rows by their number": (lambda m, x: x + m.table[: x.shape[1]].mean(0), "something else for fewer"),
    "few": (lambda m, x: x * (2 if x.shape[1] < 4 else 3), "something else for fewer"),
    "one": (lambda m, x: x * 2 if x.shape[1] == 1 else x - 3, "something else for fewer"),
    "many": (lambda m, x: x * (2 if x.shape[1] < 999 else 3), "something else for more positions"),
    "squeezed": (lambda m, x: x.squeeze() * 2, "no value for each position"),
    "its own backward": (lambda m, x: Normalising.apply(x), "Normalising has a backward of its own"),
    "its own backward for a parameter": (lambda m, x: Scaling.apply(x, m.vector), "Scaling has a backward of its own"),
    "its own backward, by number": (lambda m, x: Averaging.apply(x), "something else for fewer"),
    "a tensor's hook": (hooked, "puts a hook on a tensor"),
    "the input's hook": (lambda m, x: x.requires_grad and x.register_hook(torch.tanh) and x * 2, "puts a hook"),
    "a list": (lambda m, x: m.log.append(1) or x * 2, "writes to attributes"),
    "a tensor": (lambda m, x: m.seen.add_(1) * 0 + x * 2, "writes to attributes"),
    "Python's random": (lambda m, x: x * random.random(), "draws random numbers of Python"),
    "stochastic depth": (lambda m, x: x * (torch.rand(x.shape[0], 1, 1) < 0.5), "`rand` at"),
    "a sample dropped": (lambda m, x: x * x.new_empty(2, 1, 1).bernoulli_(0.5), "random numbers that positions share"),
    "memory by their number": (lambda m, x: x * x.new_ones(x.shape[1]).sum(), "something else for fewer"),
    "dropped weights": (lambda m, x: x @ F.dropout(m.up.weight, 0.5).T, "random numbers that positions share"),
    "counted words": (lambda m, x: F.embedding(x.argmax(-1), m.table, scale_grad_by_freq=True), "`embedding` at"),
    "batch and time confused": (lambda m, x: x.reshape(x.shape[1], -1, WIDTH).sum(1).expand(2, -1, -1), ""),
    "time and width confused": (lambda m, x: x.mT.reshape(x.shape), ""),
    "strided": (lambda m, x: x.as_strided(x.shape, x.stride()), "`as_strided` at"),
    "written further on": (shift, "`slice` at"),
    "constant": (lambda m, x: m.table.expand(2, -1, -1), "no value for each position"),
}


def judged(module: nn.Module, *args: torch.Tensor) -> TokenWise | Mixing:
    """The module, called by a model of its own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = module

        def forward(self, *given: torch.Tensor) -> Any:
            return self.part(*(one * 1 for one in given))

    mode = new_fake_mode()
    model, given = fake_copy(Model(), mode), fake_copy(args, mode)
    with mode:
        return token_wise(record(model, given, {}).root.children[0])


@pytest.mark.parametrize("name", ALONE)
def test_what_is_proved_is_true(name: str) -> None:
    """The module on two positions and on the other four returns what it returns on all six, bit for bit or nearly."""
    torch.manual_seed(0)
    module, x = Of(ALONE[name]), torch.randn(2, POSITIONS, WIDTH)
    found = judged(module, x)

    assert isinstance(found, TokenWise), found
    assert found.axis == 1
    assert not found.draws_random
    tiles = torch.cat([module(x[:, :2].clone()), module(x[:, 2:].clone())], 1)
    assert torch.allclose(module(x.clone()), tiles, atol=1e-6)


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_positions_says_so(name: str) -> None:
    """By the operator, and where it stands in the code."""
    function, reason = MIXED[name]
    found = judged(Of(function), torch.randn(2, POSITIONS, WIDTH))

    assert isinstance(found, Mixing), found
    assert reason in found.reason
    if reason.startswith("`"):
        assert "test_tokenwise.py:" in found.reason


def test_a_batch_of_one_stands_for_others() -> None:
    """Rows of one are positions; of two they would be both."""
    function = Of(lambda m, x: x.view(x.shape[1], -1, WIDTH).softmax(1).view(x.shape))
    assert isinstance(judged(function, torch.randn(1, POSITIONS, WIDTH)), Mixing)
    assert isinstance(judged(Of(ALONE["flattened"]), torch.randn(1, POSITIONS, WIDTH)), TokenWise)


def test_inputs_that_go_together() -> None:
    """All tensors have the positions, or none of it is tiled."""
    x = torch.randn(2, POSITIONS, WIDTH)
    assert isinstance(judged(Of(two_inputs), x, x), TokenWise)
    found = judged(Of(two_inputs), x, torch.randn(WIDTH))
    assert isinstance(found, Mixing)
    assert found.reason == "it is called with a tensor that has other positions"


def test_a_quantised_layer() -> None:
    """What stands in for it makes room for its unpacked weight, and has a backward of its own."""
    library = pytest.importorskip("bitsandbytes")
    layers = [
        library.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4") for _ in range(2)
    ]
    module = nn.Sequential(layers[0].to("cpu"), nn.GELU(), layers[1].to("cpu"))
    assert isinstance(judged(module, torch.randn(2, POSITIONS, 64)), TokenWise)


def test_dropout_is_seen() -> None:
    """It draws random numbers, tile by tile."""
    found = judged(nn.Sequential(nn.Linear(WIDTH, 12), nn.Dropout(0.1)).train(), torch.randn(2, POSITIONS, WIDTH))
    assert isinstance(found, TokenWise)
    assert found.draws_random


def test_positions_are_the_longest_axis_but_the_last() -> None:
    """Patches of an image, a batch of single tokens, tokens laid out flat."""
    for shape, axis in (((2, 4, 5, WIDTH), 2), ((7, 3, WIDTH), 0), ((9, WIDTH), 0)):
        found = judged(nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU()), torch.randn(shape))
        assert isinstance(found, TokenWise)
        assert found.axis == axis


def test_what_a_module_saves_is_counted_in_its_input() -> None:
    """A linear layer saves its input alone, a GELU of four widths eight with what comes behind it."""
    x = torch.randn(2, POSITIONS, WIDTH)
    alone = judged(nn.Linear(WIDTH, WIDTH), x)
    wide = judged(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)), x)
    assert isinstance(alone, TokenWise)
    assert isinstance(wide, TokenWise)
    assert (alone.saved, wide.saved) == (0, 8)
