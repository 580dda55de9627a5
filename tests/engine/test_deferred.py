"""Deferred residuals, `h, r = block(h, r)`: the next block adds up what a block returns.

python -m pytest tests/engine/test_deferred.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.engine.mode import running
from autorev.errors import ConversionError
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    DOUBLE,
    EXACT,
    TOKENS,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    gradients_of,
    mean_square,
    step,
)


class Mamba(hand.Parts):
    """The block of mamba_ssm: add, norm, mixer."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else hidden + residual
        return self.mlp(self.norm1(residual)), residual


class InFloat32(hand.Parts):
    """Its residual is in float32, whatever the weights are (`residual_in_fp32`)."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else residual + hidden
        return self.mlp(self.norm1(residual.to(self.norm1.weight.dtype))), residual.to(torch.float32)


class TwoHalves(hand.Parts):
    """Attention and MLP, each of which is added before the next norm (flash-attn, vLLM)."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else residual + hidden
        residual = residual + self.attention(self.norm1(residual))
        return self.mlp(self.norm2(residual)), residual


class AddAndNorm(nn.LayerNorm):
    """Both in one module, as in one kernel."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        # It takes more than its base.
        if residual is None:
            return super().forward(x)
        x = x + residual
        return super().forward(x), x


class Fused(hand.Parts):
    """The layer of vLLM: the adds are in its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = AddAndNorm(hand.WIDTH), AddAndNorm(hand.WIDTH)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual, hidden = hidden, self.norm1(hidden)
        else:
            hidden, residual = self.norm1(hidden, residual)
        hidden, residual = self.norm2(self.attention(hidden), residual)
        return self.mlp(hidden), residual


class ReadingApart(hand.Parts):
    """The branch reads one part by itself, so the sum is not all that the block needs."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else hidden + residual
        return self.mlp(self.norm1(residual) + hidden), residual


class Loop(hand.Stack):
    """Adds up behind the last block."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.embedding(tokens), None
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
        return self.head(self.norm((hidden + residual).to(self.norm.weight.dtype)))


class Collecting(Loop):
    """Also reads what two blocks return, each part by itself."""

    def forward(self, tokens: torch.Tensor) -> Any:
        hidden, residual = self.embedding(tokens), None
        states = []
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
            states += [hidden, residual.tanh()]
        return self.head(self.norm(hidden + residual)), states[:4]


class HalfGradient(torch.autograd.Function):
    """The same memory, and half the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] / 2


def hooked(x: torch.Tensor) -> torch.Tensor:
    """Its gradient is doubled."""
    x.register_hook(lambda grad: 2 * grad)
    return x


HALFWAY: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "hidden detached": lambda hidden, residual: (hidden.detach(), residual),
    "hidden a new leaf": lambda hidden, residual: (hidden.detach().requires_grad_(), residual),
    "residual detached": lambda hidden, residual: (hidden, residual.detach()),
    "gradient of hidden": lambda hidden, residual: (HalfGradient.apply(hidden), residual),
    "gradient of residual": lambda hidden, residual: (hidden, HalfGradient.apply(residual)),
    "hook": lambda hidden, residual: (hidden, hooked(residual)),
    "views": lambda hidden, residual: (hidden.view_as(hidden), residual.view_as(residual)),
}


class Halfway(Loop):
    """What is done to both parts behind the second block is chosen after the conversion."""

    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.embedding(tokens), None
        for number, block in enumerate(self.blocks):
            hidden, residual = block(hidden, residual)
            if self.change is not None and number == 1:
                hidden, residual = self.change(hidden, residual)
        return self.head(self.norm(hidden + residual))


class Between(Loop):
    """Changes one part between two blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.embedding(tokens), None
        for block in self.blocks:
            hidden, residual = block(hidden * 1.5, residual)
        return self.head(self.norm((hidden + residual).to(self.norm.weight.dtype)))


def loop(block: Callable[[], nn.Module], model: type[hand.Stack] = Loop, depth: int = 4) -> hand.Stack:
    """`depth` blocks of one class."""
    return model(*(block() for _ in range(depth)))


@pytest.mark.parametrize("setting", [EXACT, DOUBLE], ids=lambda s: s.name)
@pytest.mark.parametrize("block", [Mamba, TwoHalves, Fused])
def test_gradients_are_the_oracle_s(block: type[nn.Module], setting: Setting) -> None:
    """All blocks are one chain, the first one, which is given no residual, included."""
    model = converted(setting, partial(loop, block))
    (chain,) = autorev.analyze(loop(block).to(setting.dtype), TOKENS).chains
    assert [b.path for b in chain.blocks] == [f"blocks.{n}" for n in range(4)]
    assert len(chain.blocks[1].steps) == (1 if block is Mamba else 2)
    assert_like_oracle(model, setting)
    assert autorev.drift(model)["blocks"] <= (0 if setting is EXACT else 1e-9)


@pytest.mark.parametrize(
    "options",
    [{"keep_last": 2}, {"method": "bdia"}, {"host": "side_bits"}, {"tile": 4}, {"keep": "attention"}],
    ids=str,
)
def test_every_setting_is_like_its_oracle(options: dict[str, Any]) -> None:
    """What is stored, random, on the host, tiled or kept."""
    assert_like_oracle(converted(EXACT, partial(loop, TwoHalves), **options), EXACT)


def test_the_loop_written_by_hand() -> None:
    """The stream is the sum: a velocity of its own, fed by the branch on the norm of the stream."""
    model = converted(DOUBLE, partial(loop, Mamba))
    model.zero_grad(set_to_none=True)
    stream = model.embedding(TOKENS)
    velocity = torch.zeros_like(stream)
    for block in model.blocks:
        velocity = velocity + block.mlp(block.norm1(stream))
        stream = stream + velocity
    loss = mean_square(model.head(model.norm(stream)))
    loss.backward()
    assert_same(step(model), {"loss": loss.detach(), **gradients_of(model)}, 1e-9)


@pytest.mark.parametrize("name", HALFWAY)
def test_gradients_go_through_the_parts(name: str) -> None:
    """What the loop does to the gradient of one part holds, although the next block takes the stream as a whole."""
    model = converted(DOUBLE, partial(loop, Mamba, Halfway))
    model.change = HALFWAY[name]
    actual = step(model)
    assert autorev.drift(model)["blocks"] <= 1e-9

    model.zero_grad(set_to_none=True)
    stream = model.embedding(TOKENS)
    velocity = torch.zeros_like(stream)
    for number, block in enumerate(model.blocks):
        hidden = block.mlp(block.norm1(stream))
        velocity = velocity + hidden
        residual = stream + velocity - hidden
        stream = sum(HALFWAY[name](hidden, residual)) if number == 1 else stream + velocity
    loss = mean_square(model.head(model.norm(stream)))
    loss.backward()
    assert_same(actual, {"loss": loss.detach(), **gradients_of(model)}, 1e-9)


def test_a_residual_wider_than_what_is_added_to_it() -> None:
    """The stream is in float32, the branches in bfloat16."""
    setting = Setting("bf16", dtype=torch.bfloat16)
    model = converted(setting, partial(loop, InFloat32))
    assert_like_oracle(model, setting)
    assert autorev.drift(model) == {"blocks": 0.0}


def test_parts_that_are_read_are_what_they_stand_for() -> None:
    """Between two blocks, too: their values, their sum, and the gradients that come from them."""
    model = converted(DOUBLE, partial(loop, Mamba, Collecting))
    assert_like_oracle(model, DOUBLE)
    assert set(autorev.drift(model)) == {"blocks"}
    with running("original"):
        right = model(TOKENS)[1][0]  # the first block's branch, on the embedding
    assert torch.equal(model(TOKENS)[1][0], right)


def test_without_velocity_it_is_the_model() -> None:
    """With gamma = 0 and c = 1 the sums are the model's own."""
    torch.manual_seed(0)
    model = loop(TwoHalves).double()
    right = step(model)
    autorev.convert(model, batch=(TOKENS,), gamma=0, c=1, arithmetic="float")
    assert_same(step(model), right, 1e-12)
    autorev.revert(model)
    assert_same(step(model), right, 0)


def test_what_is_not_the_sum_is_no_stream() -> None:
    """A branch that reads a part by itself, and a loop that changes one: refused, the latter with its line."""
    with pytest.raises(ConversionError, match="none of them ends a block"):
        autorev.convert(loop(ReadingApart), batch=(TOKENS,))
    with pytest.raises(ConversionError, match=r"stream-replaced: .*`mul`.*test_deferred"):
        autorev.convert(loop(Mamba, Between), batch=(TOKENS,))


@pytest.mark.parametrize("options", [{"granularity": "sublayer"}, {"method": "revnet"}], ids=str)
def test_steps_of_a_block_are_refused_in_words(options: dict[str, Any]) -> None:
    """The last add of a block is in the next one."""
    with pytest.raises(ConversionError, match="leaves the last of its residual adds to the next block"):
        autorev.convert(loop(TwoHalves), batch=(TOKENS,), **options)


class Neutral(hand.Parts):
    """As flash-attn has it: a dropout of 0, and a factor of 1, before the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.factor = nn.Dropout(0.0), 1.0

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        hidden = self.dropout(hidden) * self.factor
        residual = hidden if residual is None else residual + hidden
        return self.mlp(self.norm1(residual)), residual


@pytest.mark.parametrize(("name", "value"), [("p", 0.3), ("factor", 0.5)])
def test_what_was_neutral_and_is_set_later_is_an_error(name: str, value: float) -> None:
    """The part that the stream holds already is zeros to the block: no dropout or factor of it would be seen."""
    model = loop(Neutral)
    tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    conversion = autorev.convert(model, tokens)
    assert conversion.chains[0].blocks
    assert autorev.verify(model, tokens).passed
    block = model.blocks[2]
    setattr(block.dropout if name == "p" else block, name, value)
    with pytest.raises(ConversionError, match="changes what a block of deferred residuals adds"):
        model(tokens).sum().backward()
