"""Blocks that run a tile of positions at a time with their attention, and are given a mask, as padded batches are.

python -m pytest tests/engine/test_masked_tiles.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.detect.tokenwise import Mixing, TokenWise, token_wise
from autorev.engine import mask as masks
from autorev.in_place import in_place
from autorev.methods import Method
from autorev.rewrite.in_steps import fake_call
from tests.engine.test_causal_tiles import (
    LONG,
    ONCE,
    PATHS,
    TILES,
    Block,
    Drawing,
    Grouped,
    Repeating,
    attention_of,
    model_of,
    tiled,
    with_tiles,
)
from tests.helpers.blocks import (
    EXACT,
    TOKENS,
    PeakBytes,
    Results,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    gradients_of,
    mean_square,
    no_collection,
    step,
)

CAUSAL = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
PAD = torch.tensor([True] * 4 + [False] * 4)


def numbers(mask: torch.Tensor, hidden: float = float("-inf")) -> torch.Tensor:
    """To be added to scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


def hiding(mask: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Of the first text of a batch, some keys."""
    mask = mask.clone()
    mask[0] &= ~keys
    return mask


LEFT, RIGHT = hiding(CAUSAL, PAD), hiding(CAUSAL, PAD.flip(0))
WINDOW = LEFT & ~CAUSAL.tril(-3)
LOWEST = torch.finfo(torch.float32).min
BOTH = torch.ones_like(CAUSAL)
PREFIX = CAUSAL | (torch.arange(8) < 5)
MASKS = {
    "left": LEFT,
    "right": RIGHT,
    "window": WINDOW,
    "one for all": RIGHT[:1, 0].squeeze(),
    "packed": CAUSAL & (PAD[:, None] == PAD),
    "of numbers": numbers(LEFT),
    "lowest numbers": numbers(RIGHT, LOWEST),
    "biased": numbers(RIGHT) - (torch.arange(8)[:, None] - torch.arange(8)).abs(),
    "by head": numbers(RIGHT) * torch.ones(4, 1, 1),
}
LATER = {
    "both ways": BOTH,
    "a prefix": PREFIX,
    "a later key": CAUSAL | (torch.arange(8)[:, None] == 3) & (torch.arange(8) == 4),
    "both ways, of numbers": numbers(BOTH),
    "all keys alike": numbers(LEFT, LOWEST),
    "a low number": numbers(RIGHT, -1e4),
}
"""In `all keys alike`, the queries of padding are shown no key: the lowest number hides none from them."""
with_and_without = pytest.mark.parametrize("example", [LEFT, None], ids=["with a mask", "without"])
TWICE = 2 * ONCE + 2 * ONCE[::-1]


class Sliced(Block):
    """The mask is cut to the number of keys, cast and expanded, as models do."""

    class Attention(Grouped):
        def forward(
            self, x: torch.Tensor, position: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, None]:
            if mask is not None and mask.dim() == 4:
                mask = mask[:, :, :, : x.shape[1]].expand(-1, 4, -1, -1)
                mask = mask.to(x.dtype) if mask.is_floating_point() else mask
            return super().forward(x, position, mask)

    attending = Attention


class AlwaysMasked(Block):
    """It has no attention without a mask."""

    class Attention(Grouped):
        causal = False

    attending = Attention


def converted_with(mask: torch.Tensor | None, block: Callable[[], nn.Module] = Block, tile: int = TILES) -> Any:
    """All blocks run twice."""
    return converted(EXACT, lambda: model_of(block), TOKENS, mask, tile=tile, keep_last=0)


@pytest.mark.parametrize("block", [Block, Repeating, Drawing, Sliced, AlwaysMasked], ids=lambda block: block.__name__)
def test_gradients_are_those_of_the_original_code(block: Callable[[], nn.Module]) -> None:
    """Rows that show no key (left padding), windows, numbers: attention runs a tile at a time, once each way."""
    model = converted_with(LEFT, block)
    for name, mask in MASKS.items():
        assert_like_oracle(model, EXACT, lambda mask=mask: step(model, TOKENS, mask))
        assert autorev.drift(model) == {"blocks": 0.0}, name
        assert attention_of(lambda mask=mask: step(model, TOKENS, mask)) == TWICE, name


@with_tiles
def test_every_coupling(setting: Setting) -> None:
    """With two backward passes of one forward pass, too."""
    model = tiled(setting)
    for mask in (LEFT, numbers(WINDOW).to(setting.dtype)):
        assert_like_oracle(model, setting, lambda mask=mask: step(model, TOKENS, mask))
        assert_like_oracle(model, setting, lambda mask=mask: two_passes_back(model, mask))
        assert len(attention_of(lambda mask=mask: step(model, TOKENS, mask))) == len(TWICE)


def two_passes_back(model: nn.Module, mask: torch.Tensor) -> Results:
    """`retain_graph`."""
    model.zero_grad()
    loss = mean_square(model(TOKENS, mask))
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients_of(model)


@pytest.mark.parametrize("method", ["checkpoint", "offload"])
def test_checkpoints(method: str) -> None:
    """PyTorch's own."""
    torch.manual_seed(0)
    model: Any = model_of()
    expected = {name: step(model, TOKENS, mask) for name, mask in MASKS.items()}
    with in_place(model, Method(method, tile=TILES), PATHS, ((TOKENS, LEFT), {})):
        for name, mask in MASKS.items():
            assert_same(step(model, TOKENS, mask), expected[name], 1e-5)
            assert attention_of(lambda mask=mask: step(model, TOKENS, mask)) == TWICE, name


@with_and_without
def test_a_model_is_called_with_a_mask_and_without(
    example: torch.Tensor | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever it was converted with. Only what shows later keys is run whole, and it is said once."""
    model = converted_with(example)
    for mask in (None, LEFT, RIGHT, numbers(WINDOW), None):
        assert_like_oracle(model, EXACT, lambda mask=mask: step(model, TOKENS, mask))
        assert attention_of(lambda mask=mask: step(model, TOKENS, mask)) == TWICE
    assert not [text for text in caplog.messages if "run whole" in text]
    for name, mask in LATER.items():
        assert_like_oracle(model, EXACT, lambda mask=mask: step(model, TOKENS, mask))
        assert set(attention_of(lambda mask=mask: step(model, TOKENS, mask))) == {(8, 8)}, name
        assert attention_of(lambda: step(model, TOKENS, LEFT)) == TWICE
    (said,) = (text for text in caplog.messages if "run whole" in text)
    assert said.endswith("its mask lets positions look at later ones")


def test_a_mask_with_a_gradient_is_run_whole(caplog: pytest.LogCaptureFixture) -> None:
    """A learned bias gets its gradient; other masks get none."""
    model, bias = tiled(EXACT), numbers(RIGHT).requires_grad_()

    def run() -> Results:
        bias.grad = None
        found = step(model, TOKENS, bias * 1)
        assert bias.grad is not None
        return {**found, "bias": bias.grad.nan_to_num()}

    assert_like_oracle(model, EXACT, run)
    (said,) = (text for text in caplog.messages if "run whole" in text)
    assert said.endswith("the mask that it is called with is to have a gradient, which tiles do not give it")
    mask = numbers(RIGHT)
    step(model, TOKENS, mask)
    assert mask.grad is None


def test_a_mask_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all blocks, in both directions; and again when it was written to."""
    looks = []
    look = masks._shows_nothing_later
    monkeypatch.setattr(masks, "_shows_nothing_later", lambda mask: looks.append(1) or look(mask))
    model, mask = tiled(EXACT), LEFT.clone()
    step(model, TOKENS, mask)
    step(model, TOKENS, mask)
    assert len(looks) == 1
    step(model, TOKENS, RIGHT.clone())
    assert len(looks) == 2
    mask[:, :, 0, 7] = True
    assert_like_oracle(model, EXACT, lambda: step(model, TOKENS, mask))
    assert len(looks) == 3
    mask.data[:, :, 0, 7] = False
    step(model, TOKENS, mask)
    mask.numpy()[:, :, 1, 7] = True  # no tensor counts that
    assert_like_oracle(model, EXACT, lambda: step(model, TOKENS, mask))
    assert len(looks) == 5


def test_a_mask_that_is_changed_between_the_two_runs_is_an_error() -> None:
    """Never a wrong gradient."""
    model, mask = tiled(EXACT), LEFT.clone()
    out = model(TOKENS, mask)
    mask[1, :, 5, 2] = False
    with pytest.raises(autorev.AutorevError, match="changed in place between forward and backward"):
        out.sum().backward()


@with_and_without
def test_other_lengths(example: torch.Tensor | None) -> None:
    """Tiles that fit, and a last position that would be alone; values without gradients."""
    model, whole = converted_with(example), converted(EXACT, model_of, keep_last=0)
    for length in (3, 4, 6, 8):
        tokens, mask = TOKENS[:, :length], RIGHT[..., :length, :length]
        assert_like_oracle(model, EXACT, lambda tokens=tokens, mask=mask: step(model, tokens, mask))
        with torch.no_grad():
            assert torch.allclose(model(tokens, mask), whole(tokens, mask), atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(model(TOKENS, LEFT), whole(TOKENS, LEFT), atol=1e-6)


def test_tiles_of_one_position() -> None:
    """Each attends as a single query does."""
    model = converted_with(LEFT, tile=1)
    assert_like_oracle(model, EXACT, lambda: step(model, TOKENS, LEFT))
    assert len(attention_of(lambda: step(model, TOKENS, LEFT))) == 4 * 8


READ: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "numbers of its truths": (lambda mask: mask.to(torch.float32), "`_to_copy` at"),
    "rounded": (lambda mask: mask.to(torch.bfloat16).to(torch.float32), "`_to_copy` at"),
    "one text's": (lambda mask: mask[:1], "`slice` at"),
    "turned": (lambda mask: mask.mT & mask, "`transpose` at"),
    "moved": (lambda mask: mask.roll(1, -1), "`roll` at"),
    "counted": (lambda mask: mask & (mask.sum(-1, keepdim=True) > 2), "`sum` at"),
    "written to": (lambda mask: mask.logical_not_(), "`logical_not_` at"),
    "made inside": (lambda mask: torch.ones(mask.shape, dtype=torch.bool).tril(), "not called with"),
}


def proof_of(block: nn.Module, *masks: torch.Tensor | None) -> TokenWise | Mixing:
    """What is found of a call with a mask."""
    x, angle = torch.randn(2, 8, 16, requires_grad=True), torch.randn(1, 8, 4)
    with fake_call(block, (x, (angle, angle), *masks), {}) as recorded:
        return token_wise(recorded.root, causal=True)


@pytest.mark.parametrize("name", READ)
def test_masks_that_are_read_otherwise_are_not_tiled(name: str) -> None:
    """The reason says what reads it."""
    how, reason = READ[name]

    class Odd(Block):
        class Attention(Grouped):
            def forward(self, x: torch.Tensor, position: Any, mask: torch.Tensor | None = None) -> Any:
                return super().forward(x, position, None if mask is None else how(mask))

        attending = Attention

    found = proof_of(Odd(), numbers(RIGHT) if name == "rounded" else RIGHT)
    assert isinstance(found, Mixing)
    assert reason in found.reason


def test_what_is_proved_of_a_mask() -> None:
    """Which of the tensors it is, and whether attention is causal without it."""
    for block in (Block, Repeating, Sliced, AlwaysMasked):
        found = proof_of(block(), RIGHT)
        assert isinstance(found, TokenWise), found
        assert (found.mask, found.unmasked) == (3, block is not AlwaysMasked)
    alone = proof_of(Block(), None)
    assert isinstance(alone, TokenWise)
    assert alone.mask is None
    bias = proof_of(Block(), numbers(RIGHT).requires_grad_())
    assert isinstance(bias, Mixing)
    assert bias.reason.startswith("the mask that it is called with is to have a gradient")


LONG_MASK = torch.ones(1, 1, 512, 512, dtype=torch.bool).tril()
LONG_MASK[..., :100] = False


def frozen(block: type[Block], tile: int | None, mask: torch.Tensor | None) -> tuple[Any, int]:
    """Its blocks have no gradients of their own. The model, and the peak of a step of it that the conversion states."""
    torch.manual_seed(0)
    model: Any = model_of(block)
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    conversion = autorev.convert(model, batch=(LONG, mask), method="leapfrog", keep_last=0, tile=tile)
    return model, conversion.memory.converted.peak


def test_a_simulated_step_is_tiled_as_the_real_one_is() -> None:
    """A mask without values is taken for causal where attention without it is, and for any other else."""
    unmasked, masked, unknown = (
        frozen(block, 16, mask)[1] for block, mask in ((Block, None), (Block, LONG_MASK), (AlwaysMasked, LONG_MASK))
    )
    assert masked == pytest.approx(unmasked + LONG_MASK.nbytes, rel=0.02)
    assert unknown > 2 * masked


def test_a_step_holds_keys_and_values_and_one_tile() -> None:
    """And of the mask, as numbers, what one tile's queries are shown."""

    def peak(tile: int | None) -> int:
        model, _ = frozen(Block, tile, LONG_MASK)
        model(LONG, LONG_MASK).sum().backward()
        with no_collection(), PeakBytes() as live:
            model(LONG, LONG_MASK).sum().backward()
        return live.peak

    unit = 512 * 16 * 4
    assert peak(16) < 12.5 * unit  # as without a mask
    assert peak(None) > 50 * unit
