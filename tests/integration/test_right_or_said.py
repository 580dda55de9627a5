"""Models as others write them, one for each kind of code: converted rightly, or refused with the reason.

python -m pytest tests/integration/test_right_or_said.py
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import autorev
from autorev.errors import AutorevError, ConversionError
from autorev.verification import Verification
from tests.helpers import handwritten as hand

TOKENS = torch.arange(16).reshape(2, 8)


def checked(model: nn.Module, batch: Any, **options: Any) -> tuple[Any, Verification]:
    """What `convert` did, with no block stored, and what `verify` says of it; the model is reverted."""
    torch.manual_seed(0)
    conversion = autorev.convert(model, batch, keep_last=0, **options)
    found = autorev.verify(model, batch)
    assert found.passed
    assert autorev.revert(model)
    return conversion, found


class Loop(nn.Module):
    """Blocks without modules of their own, and a norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(hand.WIDTH), hand.MLP()) for _ in range(4))
        self.norm = nn.LayerNorm(hand.WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


class OnlyInTraining(Loop):
    """The example call of the probe, which is made in eval mode, comes by none of its turns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.training else self.norm(x)


class WithLoop(hand.Stack):
    """Block modules, then a loop inside of another module."""

    def __init__(self, loop: nn.Module, config: Any = None) -> None:
        super().__init__(*(hand.Block() for _ in range(4)))
        self.loop, self.config = loop, config

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.loop(x))


def test_a_loop_behind_block_modules_is_a_chain_of_its_own() -> None:
    """Its holder, with the norm at its end, is no step of the chain before it."""
    _, found = checked(WithLoop(Loop()), TOKENS)
    assert found.rebuilt == {"blocks": 4, "loop.layers": 4}


class Slotted:
    """An object without a `__dict__`."""

    __slots__ = ()


@pytest.mark.parametrize("config", [{"width": 16}, (16, 4), "tiny", Slotted()], ids=lambda c: type(c).__name__)
def test_a_config_may_be_any_object(config: Any) -> None:
    """Conversion and its reversal leave it alone."""
    model = WithLoop(Loop(), config)
    before = pickle.dumps(config)
    checked(model, TOKENS)
    assert model.config is config and pickle.dumps(config) == before


def test_a_loop_that_cannot_run_costs_only_itself() -> None:
    """The other chain is converted, and each block of the loop has its reason."""
    conversion, found = checked(WithLoop(OnlyInTraining()), TOKENS)
    assert found.rebuilt == {"blocks": 4}
    assert {path for path, _ in conversion.not_converted} == {f"loop.layers.{i}" for i in range(4)}
    assert all(reason.startswith("cannot-run: ") for _, reason in conversion.not_converted)
    assert "Not converted: loop.layers.0: cannot-run: " in str(conversion)


NOT_SO = [{"blocks": "*"}, {"gamma": {"loop*": 0.3}}, {"fraction_bits": {"no chain": 20}}]


@pytest.mark.parametrize("how", NOT_SO, ids=str)
def test_what_was_asked_for_is_not_left_out(how: dict[str, Any]) -> None:
    """Blocks that are named, and numbers that fit no block, are errors, and nothing is converted."""
    model = WithLoop(OnlyInTraining() if "blocks" in how else Loop())
    with pytest.raises(ConversionError):
        autorev.convert(model, TOKENS, **how)
    assert not autorev.revert(model)


@dataclass
class State:
    """What blocks hand on."""

    hidden: torch.Tensor
    condition: torch.Tensor


@dataclass(frozen=True, slots=True)
class FrozenState:
    """The same, for readers."""

    hidden: torch.Tensor
    condition: torch.Tensor


class NamedState(NamedTuple):
    """The same, as a tuple."""

    hidden: torch.Tensor
    condition: torch.Tensor


class OnState(hand.Parts):
    """Takes and returns a state, and reads the condition, which has a gradient."""

    def forward(self, state: Any) -> Any:
        h = state.hidden + self.attention(self.norm1(state.hidden) * state.condition)
        return type(state)(hidden=h + self.mlp(self.norm2(h)), condition=state.condition)


class HandingOnStates(hand.Stack):
    """The stream is in an object."""

    def __init__(self, kind: Any) -> None:
        super().__init__(*(OnState() for _ in range(4)))
        self.kind, self.condition = kind, nn.Parameter(torch.linspace(0.5, 2, hand.WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        state = self.kind(self.embedding(tokens), self.condition.exp())
        for block in self.blocks:
            state = block(state)
        return self.head(self.norm(state.hidden))


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("kind", [State, FrozenState, NamedState])
def test_blocks_that_hand_on_an_object(kind: Any, granularity: str) -> None:
    """The stream in it is reversed, and what else is in it has its gradient."""
    _, found = checked(HandingOnStates(kind), TOKENS, granularity=granularity)
    assert found.rebuilt == {"blocks": 4 if granularity == "block" else 8}


class Converting(hand.Block):
    """Sets the type of its weights whenever it is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mlp.to(x.dtype)
        self.norm1.to(x.device)
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_convert_their_weights(dtype: torch.dtype) -> None:
    """A call without values follows `.to()`, whether it changes anything or not; the model itself is untouched."""
    model = hand.stack_of(Converting)
    for block in model.blocks:
        block.mlp.to(dtype)
    analysis = autorev.analyze(model, TOKENS)
    assert [len(chain) for chain in analysis.chains] == [3]
    assert {p.dtype for p in model.blocks[0].mlp.parameters()} == {dtype}
    checked(model, TOKENS)


class ChoosingRows(hand.Stack):
    """What comes behind the blocks has a size that depends on values."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().forward(tokens)
        rows = torch.unique((logits.sum(-1) > 0).nonzero()[:, 0])
        return logits[rows] * logits.abs().max().item()


def test_a_model_that_looks_at_its_values_beside_its_blocks() -> None:
    """`unique`, `nonzero` and `item` outside of the blocks do not keep these from being reversed."""
    _, found = checked(ChoosingRows(*(hand.Block() for _ in range(3))), TOKENS)
    assert found.rebuilt == {"blocks": 3}


def tiny_reformer() -> nn.Module:
    """Reversible already, by an `autograd.Function` of its own."""
    from transformers import ReformerConfig, ReformerModelWithLMHead

    return ReformerModelWithLMHead(
        ReformerConfig(
            attn_layers=["local"] * 4,
            axial_pos_embds_dim=(8, 8),
            axial_pos_shape=(4, 8),
            hidden_size=16,
            attention_head_size=8,
            feed_forward_size=32,
            num_attention_heads=2,
            local_attn_chunk_length=4,
            max_position_embeddings=32,
            vocab_size=50,
            is_decoder=True,
        )
    )


def test_a_model_with_a_backward_of_its_own_is_refused() -> None:
    """Blocks inside of its `autograd.Function` are never asked for a gradient."""
    model = tiny_reformer()
    analysis = autorev.analyze(model)
    assert not analysis.chains
    assert {block.reasons[0].partition(":")[0] for block in analysis.refused} == {"own-backward"}
    with pytest.raises(ConversionError, match="own-backward: it runs inside of _ReversibleFunction"):
        autorev.convert(model)


def test_routers_that_convert_their_weights() -> None:
    """Switch Transformers."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=4,
    )
    torch.manual_seed(0)
    _, found = checked(SwitchTransformersForConditionalGeneration(config), None)
    assert found.rebuilt == {"encoder.block": 2, "decoder.block": 2}


class Hidden(hand.Parts):
    """The sum is made by Einstein's convention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("n...->...", torch.stack([x, self.mlp(self.norm1(x))]))


class AddingBetween(hand.Stack):
    """Two states are kept apart, and meet in the model's own code only."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = [self.embedding(tokens)]
        for block in self.blocks:
            states.append(torch.stack([states[-1], block(states[-1])]).mean(0))
        return self.head(states[-1])


class Convolutions(nn.Module):
    """Nothing is added to anything, but for a written-out norm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Convolution() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x - x.mean(-1, keepdim=True)


class Convolution(nn.Module):
    """Begins with a dropout, which is not on any residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.convolution = nn.Dropout(0.1), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(self.dropout(x))


class Gated(nn.Module):
    """A convolution and an activation written out, whose add is none of the input; and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.dropout = nn.Conv1d(8, 8, 3, padding=1), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convolution(x)
        return self.dropout(y * torch.sigmoid(y) + 0.1 * y)


class OneAdd(nn.Module):
    """Adds once, to its own input, of which nobody asks a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.inner(x).relu())


class Weighing(hand.Stack):
    """The sum stands in a module that is given both parts, and weighs the skip (x-transformers' `scale_residual`)."""

    def __init__(self) -> None:
        super().__init__(*(hand.MLP() for _ in range(3)))
        self.sums = nn.ModuleList(Sum() for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block, total in zip(self.blocks, self.sums, strict=True):
            x = total(block(self.norm(x)), x)
        return self.head(x)


class Sum(nn.Module):
    """Of a branch and a weighed skip."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((hand.WIDTH,), 0.9))

    def forward(self, branch: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return branch + skip * self.scale


NEAREST = {
    "in an operation": (
        lambda: hand.stack_of(Hidden),
        TOKENS,
        r"3 residual adds were seen by autograd, .*the nearest is blocks\.0: not-residual: .* comes from einsum",
    ),
    "in the model's code": (
        lambda: AddingBetween(*(hand.MLP() for _ in range(3))),
        TOKENS,
        r"3 residual adds were seen by autograd, .*they stand in the code of AddingBetween, between its modules",
    ),
    "once": (OneAdd, torch.zeros(2, 8), "1 residual add was seen by autograd, .*it stands in the code of OneAdd"),
    "nowhere": (Convolutions, torch.zeros(2, 8, 8), "it has no residual block$"),
    "nowhere, with an activation written out": (
        lambda: nn.Sequential(*(Gated() for _ in range(3))),
        torch.zeros(2, 8, 8),
        "it has no residual block$",
    ),
}


@pytest.mark.parametrize("name", list(NEAREST))
def test_no_residual_block_is_said_only_where_that_is_so(name: str) -> None:
    """Otherwise the adds are counted, and what came nearest is named with what stopped it."""
    make, batch, said = NEAREST[name]
    model = make()
    with pytest.raises(ConversionError, match=said):
        autorev.convert(model, batch)
    analysis = autorev.analyze(model, batch)
    assert not analysis.chains
    assert not analysis.refused
    assert bool(analysis.notes) == (not name.startswith("nowhere"))


def test_a_module_that_weighs_the_skip_is_named() -> None:
    """It is no block, and what it does is the reason."""
    with pytest.raises(ConversionError, match=r"by sums\.0\.scale, which is learned"):
        autorev.convert(Weighing(), TOKENS)
    assert len(autorev.analyze(Weighing(), TOKENS).refused) == 3


class Scriptable(nn.Module):
    """One residual add."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(hand.WIDTH, hand.WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.LayerNorm(hand.WIDTH)])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_blocks_are_said(norm: Callable[[], nn.Module]) -> None:
    """Whether they run on tensors without values or not."""
    model = hand.Stack(*(torch.jit.script(Scriptable(norm())) for _ in range(3)))
    with pytest.raises(AutorevError, match=r"blocks\.0 was compiled by torch\.jit\.script"):
        autorev.convert(model, TOKENS)


class Slots:
    """What a block hands on to the next."""

    __slots__ = ("latest",)

    def __init__(self) -> None:
        self.latest: torch.Tensor | None = None


class HandingOn(hand.Parts):
    """Writes to an object that it is given, and reads what the block before wrote."""

    def forward(self, x: torch.Tensor, slots: Slots) -> torch.Tensor:
        h = self.mlp(self.norm1(x))
        if slots.latest is not None:
            h = h + slots.latest
        slots.latest = h
        return x + h


class HandedOn(hand.Stack):
    """One object for all blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, slots = self.embedding(tokens), Slots()
        for block in self.blocks:
            x = block(x, slots)
        return self.head(x)


def test_an_object_with_slots_that_is_written_to_is_refused() -> None:
    """As one with a `__dict__` is."""
    with pytest.raises(ConversionError, match="argument-write: it changes its argument slots"):
        autorev.convert(HandedOn(*(HandingOn() for _ in range(3))), TOKENS)
