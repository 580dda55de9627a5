"""Modules that run a tile of positions at a time: the gradients are those of the original code, which knows no tiles.

python -m pytest tests/engine/test_tiles.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autorev
from autorev.errors import AutorevError, ConversionError
from autorev.in_place import Blocks, NotApplicable, in_place
from autorev.methods import Method
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    DOUBLE,
    EXACT,
    EXACT_LEAPFROG,
    TOKENS,
    PeakBytes,
    Results,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    frozen_but,
    gradients_of,
    mean_square,
    small,
    step,
    taken_half_way,
    two_backward_passes,
)

TILES = 3
"""Of eight positions, at three a tile."""
SETTINGS = [
    EXACT,
    DOUBLE,
    EXACT_LEAPFROG,
    Setting("sublayer", {"granularity": "sublayer"}),
    Setting("hamiltonian", {"method": "hamiltonian"}),
    Setting("revnet", {"method": "revnet"}),
]
with_tiles = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)


class Dropping(hand.Parts):
    """Dropout within the MLP, and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 16))  # type: ignore[assignment]  # another class than the base's
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Scaled(hand.Parts):
    """Something is done to what the MLP returns, and autograd saves it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((16,), 0.5))
        self.after = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.scale * self.attention(self.norm1(x))
        return x + self.after(self.mlp(self.norm2(x)) * self.scale)


class InPlace(hand.Parts):
    """The MLP writes to its own values, and the block to its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16)
        )  # type: ignore[assignment]  # another class than the base's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.attention(self.norm1(x))
        h += self.mlp(self.norm2(h))
        return h


class Adding(hand.Parts):
    """The MLP is given the residual, too, as BLOOM's is, and the block has one add of its own."""

    class Mlp(hand.MLP):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # the block here calls it so
            return super().forward(x) * torch.sigmoid(residual)

    def __init__(self) -> None:
        super().__init__()
        self.mlp = self.Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x), residual=x)


class Written(hand.Parts):
    """Falcon's: the block writes to what the MLP returned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        out = self.mlp(h)
        out += self.attention(h)
        return x + out


class Flat(hand.Parts):
    """GPT-2's Conv1D: a view of its input, which a cut tile has to allow, and dropout."""

    class Mlp(hand.MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            u = torch.nn.functional.dropout(self.up(x.view(-1, x.shape[-1])), 0.2, self.training)
            return self.down(torch.tanh(u)).view(x.shape)

    def __init__(self) -> None:
        super().__init__()
        self.mlp = self.Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AddingInside(hand.Parts):
    """BLOOM's and MPT's: the residual add stands in the MLP."""

    class Mlp(hand.MLP):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # the block here calls it so
            return super().forward(x) + residual

    def __init__(self) -> None:
        super().__init__()
        self.mlp = self.Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return self.mlp(self.norm2(x), residual=x)


class Multiplied(hand.Parts):
    """The add itself saves what the MLP returned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return torch.addcmul(x, self.scale, self.mlp(self.norm2(x)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "plain": hand.Block,
    "dropping": Dropping,
    "scaled": Scaled,
    "in place": InPlace,
    "adding": Adding,
    "parallel": hand.Parallel,
    "multiplied": Multiplied,
    "written": Written,
    "flat": Flat,
}


def tiled(setting: Setting, block: Callable[[], nn.Module] = hand.Block, **options: Any) -> Any:
    """Four converted blocks, none of which is stored."""
    return converted(setting, lambda: small(4, block), tile=TILES, keep_last=0, **options)


@with_tiles
@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_are_those_of_the_original_code(block: str, setting: Setting) -> None:
    """Whatever the block does with its MLP, under every kind of coupling."""
    model = tiled(setting, BLOCKS[block])
    assert_like_oracle(model, setting)
    assert autorev.drift(model) == {"blocks": 0.0} or "float" in setting.name


@pytest.mark.parametrize("setting", [EXACT, DOUBLE, EXACT_LEAPFROG], ids=lambda s: s.name)
def test_an_mlp_that_adds_its_residual(setting: Setting) -> None:
    """It has the add that ends the step; the block is one step all the same."""
    model = tiled(setting, AddingInside)
    assert model.blocks[1].mlp.forward.__self__ is model.blocks[1].mlp
    assert_like_oracle(model, setting)


def test_what_ends_a_step_is_not_tiled_where_each_add_does() -> None:
    """Half of a step cannot be run again without the other half."""
    setting = Setting("sublayer", {"granularity": "sublayer"})
    model = tiled(setting, AddingInside)
    assert "forward" not in vars(model.blocks[1].mlp)
    assert "forward" in vars(model.blocks[1].attention)
    assert_like_oracle(model, setting)


def calls_of(model: Any, run: Callable[[], object]) -> int:
    """How often the last layer of the second block's MLP runs."""
    seen: list[int] = []
    layer = model.blocks[1].mlp.down

    def counting(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self is layer:
            seen.append(x.shape[1])
        return forward(self, x)

    forward = nn.Linear.forward
    with pytest.MonkeyPatch.context() as patch:  # a hook would be shown all positions
        patch.setattr(nn.Linear, "forward", counting)
        run()
    assert set(seen) == {3, 2}  # eight positions in tiles of three
    return sum(seen)


@with_tiles
def test_the_mlp_runs_once_in_each_direction(setting: Setting) -> None:
    """Eight positions forward, eight again in backward, and no third time."""
    model = tiled(setting)
    assert calls_of(model, lambda: step(model)) == 2 * 8


def test_where_more_comes_after_the_mlp_it_runs_once_more() -> None:
    """Autograd asks first for what that saved, so the step has to be whole by then."""
    model = tiled(Setting("sublayer", {"granularity": "sublayer"}), Scaled)
    assert calls_of(model, lambda: step(model)) == 3 * 8


@pytest.mark.parametrize("name", ["plain", "checkpoint"])
def test_tiles_without_a_coupling(name: str) -> None:
    """PyTorch's own ways, tiled: the same gradients, and the MLP runs twice."""
    torch.manual_seed(0)
    model: Any = small()
    expected = step(model)
    blocks = Blocks(tuple(f"blocks.{n}" for n in range(4)), inline=False, draws_random=False)
    with in_place(model, Method(name, tile=TILES), blocks, ((TOKENS,), {})):
        assert_same(step(model), expected, 1e-5)
        assert calls_of(model, lambda: step(model)) == 2 * 8
    assert "forward" not in vars(model.blocks[0].mlp)
    assert_same(step(model), expected, 0)


@pytest.mark.parametrize("how", ["in place", "data", "other data"])
def test_a_weight_that_changes_before_backward_is_an_error(how: str) -> None:
    """Without a coupling, too: a tile is run again with the weights of then, or not at all."""
    model = small(2)
    weight: Any = model.blocks[1].mlp.up.weight
    blocks = Blocks(("blocks.0", "blocks.1"), inline=False, draws_random=False)
    with in_place(model, Method("plain", tile=TILES), blocks, ((TOKENS,), {})), torch.no_grad():
        with torch.enable_grad():
            loss = mean_square(model(TOKENS))
        if how == "in place":
            weight.mul_(2)
        elif how == "data":
            weight.data.mul_(2)
        else:
            weight.data = weight * 2
        with pytest.raises(AutorevError, match=r"blocks\.1\.mlp\.up\.weight was .* between forward and backward"):
            loss.backward()


def test_dropout_of_tiles_is_drawn_again_as_it_was() -> None:
    """Without a coupling: against the same draws by ordinary autograd."""
    torch.manual_seed(0)
    model: Any = small(2, Dropping)
    blocks = Blocks(("blocks.0", "blocks.1"), inline=False, draws_random=True)

    class ByHand(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.inner = [mlp]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.inner[0](tile) for tile in x.split(TILES, 1)], 1)

    with in_place(model, Method("plain", tile=TILES), blocks, ((TOKENS,), {})):
        actual = step(model)
    for block in model.blocks:
        by_hand = ByHand(block.mlp)
        block.mlp.forward = lambda x, f=block.mlp.forward: torch.cat([f(tile) for tile in x.split(TILES, 1)], 1)
        del by_hand
    assert_same(actual, step(model), 1e-5)


# -- what users do


@pytest.mark.parametrize("frozen", ["mlp", "attention", "embedding", "norm2", "all but the last block"])
def test_frozen_parameters(frozen: str) -> None:
    """Where nothing of a tile needs a gradient, nobody asks for it."""
    model = tiled(EXACT)
    frozen_but(model, frozen)
    assert_like_oracle(model, EXACT)


@with_tiles
def test_two_backward_passes_of_one_forward(setting: Setting) -> None:
    """`retain_graph`: the tape goes forward again, and the tiles run again."""
    model = tiled(setting)
    assert_like_oracle(model, setting, lambda: two_backward_passes(model))


def test_a_gradient_taken_half_way() -> None:
    """Of one block's parameters alone, and then of all: tiles that nobody asked for are run all the same."""
    model = tiled(EXACT)
    assert_like_oracle(model, EXACT, lambda: taken_half_way(model, model.blocks[2].attention.out.weight))


def test_two_forward_passes_before_their_backward_passes() -> None:
    """Each has tiles of its own."""

    def run() -> Results:
        model.zero_grad()
        a, b = mean_square(model(TOKENS)), mean_square(model(TOKENS + 7))
        a.backward()
        b.backward()
        return gradients_of(model)

    model = tiled(EXACT)
    assert_like_oracle(model, EXACT, run)


@pytest.mark.parametrize("where", ["mlp", "inside"])
def test_hooks(where: str) -> None:
    """One on the tiled module sees all positions, one inside it tiles; what they change counts in both runs."""
    model = tiled(EXACT)
    for block in model.blocks:
        module = block.mlp if where == "mlp" else block.mlp.up
        module.register_forward_hook(lambda module, args, out: out * 1.5)
        module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert_like_oracle(model, EXACT)


class Mixing(nn.Module):
    """Looks at all positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)


def hook_forward(mlp: Any) -> None:
    """A user's hook, after the conversion."""
    mlp.up.register_forward_hook(lambda module, args, out: out - out.mean(1, keepdim=True))


def hook_backward(mlp: Any) -> None:
    """In backward."""
    mlp.up.register_full_backward_hook(lambda module, into, out: (into[0] - into[0].mean(1, keepdim=True),))


def put_in(mlp: Any) -> None:
    """Another module in the place of one that was there."""
    mlp.up = nn.Sequential(mlp.up, Mixing())


def wrap(mlp: Any) -> None:
    """As `put_in`, without a change of the modules."""
    mlp.up.forward = lambda x, forward=mlp.up.forward: forward(x) - x.mean()


@pytest.mark.parametrize("change", [hook_forward, hook_backward, put_in, wrap], ids=lambda change: change.__name__)
def test_what_comes_after_the_conversion_is_analysed_anew(
    change: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    """What looks across positions now is run whole, which is said once."""
    model = tiled(EXACT)
    assert_like_oracle(model, EXACT)
    assert not caplog.messages
    for block in model.blocks:
        change(block.mlp)
    assert_like_oracle(model, EXACT)
    (said,) = (text for text in caplog.messages if "run whole" in text)
    assert said.startswith("blocks.0 was to be run a tile at a time, and is run whole: ")


def test_an_adapter_that_comes_after_the_conversion_is_tiled() -> None:
    """It acts on each position alone."""
    model = tiled(EXACT)
    for block in model.blocks:
        block.mlp.up = nn.Sequential(block.mlp.up, nn.Linear(32, 32))
    assert_like_oracle(model, EXACT)
    assert calls_of(model, lambda: step(model)) == 2 * 8


def test_another_number_is_analysed_by_itself() -> None:
    """A call with one by which the module looks at other positions."""

    class Block(hand.Block):
        def forward(self, x: torch.Tensor, by: int = 0) -> torch.Tensor:
            return x + self.mlp(self.norm1(x), by)

    class Shifting(hand.MLP):
        def forward(self, x: torch.Tensor, by: int) -> torch.Tensor:
            return super().forward(x.roll(by, 1) if by else x)

    class Model(hand.Stack):
        def forward(self, tokens: torch.Tensor, by: int = 0) -> torch.Tensor:
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, by)
            return self.head(x)

    def shifting() -> Block:
        block = Block()
        block.mlp = Shifting()
        return block

    torch.manual_seed(0)
    plain = Model(*(shifting() for _ in range(3)))
    model = copy.deepcopy(plain)
    tokens = torch.arange(16).reshape(2, 8)
    autorev.convert(model, (tokens,), method="checkpoint:tile=4")
    for by in (0, 1):
        torch.testing.assert_close(model(tokens, by), plain(tokens, by))


def test_another_mode_is_analysed_by_itself() -> None:
    """Converted in training, trained in eval mode, in which the module looks at all positions."""

    class Frozen(hand.MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if self.training else x - x.mean(1, keepdim=True))

    class Block(hand.Block):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Frozen()

    model = tiled(EXACT, Block)
    assert_like_oracle(model, EXACT)
    assert_like_oracle(model.eval(), EXACT)


def test_another_call_is_analysed_by_itself() -> None:
    """An argument that decides, and a stream of other axes."""

    class Choosing(hand.MLP):
        def forward(self, x: torch.Tensor, mix: bool = False) -> torch.Tensor:  # type: ignore[override]  # the block here calls it so
            return super().forward(x - x.mean(1, keepdim=True) if mix else x)

    class Block(hand.Parts):
        mix = False

        def __init__(self) -> None:
            super().__init__()
            self.mlp = Choosing()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x), self.mix)

    model = tiled(EXACT, Block)
    assert_like_oracle(model, EXACT)
    Block.mix = True
    assert_like_oracle(model, EXACT)
    x = torch.randn(2, 2, 8, hand.WIDTH)
    with torch.no_grad():
        here = model.blocks[0].mlp(x)
        assert torch.equal(here, Choosing.forward(model.blocks[0].mlp, x))


@with_tiles
def test_one_mlp_of_all_blocks(setting: Setting) -> None:
    """It is called by each, under one name."""

    def sharing() -> nn.Module:
        model = small(4)
        for block in model.blocks:
            block.mlp = model.blocks[0].mlp
        return model

    model = converted(setting, sharing, tile=TILES, keep_last=0)
    assert model.blocks[0].mlp.forward.__self__ is model.blocks[3].mlp
    assert_like_oracle(model, setting)


def test_reverted_between_forward_and_backward() -> None:
    """The forward pass was made with tiles, and so is its second run."""
    model = tiled(EXACT)
    expected = step(model)
    model.zero_grad()
    loss = mean_square(model(TOKENS))
    autorev.revert(model)
    loss.backward()
    assert_same({"loss": loss.detach(), **gradients_of(model)}, expected, 1e-6)
    assert not any("forward" in vars(module) for module in model.modules())


def test_shorter_and_other_calls() -> None:
    """A call with no more positions than a tile has is one tile; other lengths have other tiles."""
    model = tiled(EXACT)
    for tokens in (TOKENS[:, :2], TOKENS[:, :3], TOKENS[:, :4], TOKENS[:1], torch.arange(40).reshape(2, 20)):
        assert_like_oracle(model, EXACT, lambda tokens=tokens: step(model, tokens))


def test_autocast() -> None:
    """Tiles run under the autocast that forward ran under."""

    def run() -> Results:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = mean_square(model(TOKENS))
        loss.backward()
        return gradients_of(model)

    model = tiled(EXACT)
    assert_like_oracle(model, Setting("autocast", tolerance=0.02), run)


def test_no_gradients_no_graph() -> None:
    """In eval mode and under `no_grad` the values are those of the untiled blocks."""
    whole, model = converted(EXACT, small, keep_last=0), tiled(EXACT)
    with torch.no_grad():
        assert torch.allclose(whole(TOKENS), model(TOKENS), atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(whole.eval()(TOKENS), model.eval()(TOKENS), atol=1e-6)


def test_a_checkpoint_around_the_model() -> None:
    """The whole forward is run again within backward."""

    def run() -> Results:
        model.zero_grad()
        mean_square(checkpoint(model, TOKENS, use_reentrant=False)).backward()
        return gradients_of(model)

    model = tiled(EXACT)
    expected = step(model)
    actual = run()
    assert_same(actual, {name: value for name, value in expected.items() if name in actual}, 1e-5)


def test_code_that_does_something_else_the_second_time_is_an_error() -> None:
    """A counter outside of the module decides, from some time on: no gradient of that may be trusted."""
    count = [0]

    class Counting(hand.MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count[0] += count[0] > 0
            return super().forward(x) * (1 + count[0] % 2)

    class Block(hand.Block):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Counting()

    model = tiled(EXACT, Block)
    count[0] = 1
    with pytest.raises(AutorevError):
        step(model)
    with pytest.raises(AutorevError, match="returned something else"):  # before the chain's beginning
        torch.autograd.grad(mean_square(model(TOKENS)), [model.blocks[3].attention.out.weight])


def test_a_copy_and_a_reverted_model() -> None:
    """A copy runs its own modules; a reverted model is as it was."""
    model = tiled(EXACT)
    expected = step(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_same(step(twin), expected, 1e-6)
    assert autorev.revert(twin) == 4
    assert not any("forward" in vars(module) for module in twin.modules())


# -- memory


class Wide(hand.Block):
    """An MLP that keeps far more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, 16))  # type: ignore[assignment]  # another class than the base's


LONG = torch.arange(512).remainder(50).reshape(1, 512)


def peak_of(method: str | None, tile: int | None) -> int:
    """Bytes alive at the highest point of a step of eight blocks, parameters and their gradients left out."""
    torch.manual_seed(0)
    model = small(8, Wide)
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    if method is not None:
        autorev.convert(model, batch=(LONG,), method=method, keep_last=0, tile=tile)
    step(model, LONG)
    with PeakBytes() as live:
        step(model, LONG)
    return live.peak


def test_a_step_holds_one_tile_of_an_mlp_at_a_time() -> None:
    """The MLP's activations, 32 widths wide before and after the GELU, are gone from the peak but for a tile's."""
    mlp = 2 * 512 * 512 * 4
    for granularity in ("", ":granularity=sublayer"):
        whole, tiles = (peak_of(f"leapfrog{granularity}", tile) for tile in (None, 32))
        assert whole > mlp
        assert tiles < whole - mlp * 0.9
    # Twice as many blocks hold no more.
    assert peak_of("leapfrog", 32) < mlp


# -- what is refused


@pytest.mark.parametrize("tile", [8, 100])
def test_a_tile_as_long_as_the_sequence_is_refused(tile: int) -> None:
    """In one sentence, and the model is as it was."""
    model: Any = small()
    with pytest.raises(ConversionError, match=f"tile={tile} leaves nothing to tile: the blocks are called with 8"):
        autorev.convert(model, batch=(TOKENS,), tile=tile)
    assert not any("forward" in vars(module) for module in model.modules())


def test_blocks_without_a_part_that_could_be_tiled_are_refused() -> None:
    """With the reason, and where in the code it is."""

    class Attending(hand.Parts):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm1(x)
            return x + nn.functional.scaled_dot_product_attention(h, h, self.attention.out(h))

    with pytest.raises(ConversionError, match=r"no part of the blocks can be run a tile at a time \("):
        autorev.convert(small(3, Attending), batch=(TOKENS,), tile=2)
    blocks = Blocks(("blocks.0",), inline=False, draws_random=False)
    model = small(3, Attending)
    with (
        pytest.raises(NotApplicable, match="no part of the blocks"),
        in_place(model, Method("checkpoint", tile=2), blocks, ((TOKENS,), {})),
    ):
        pass
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("tile", [0, -1, 2.5, "all", True])
def test_a_tile_that_is_no_number_is_refused(tile: Any) -> None:
    """It names the option."""
    with pytest.raises(ConversionError, match="tile is 'auto' or a number of positions"):
        autorev.convert(small(), batch=(TOKENS,), tile=tile)


def test_the_summary_says_what_is_tiled_and_what_is_not() -> None:
    """And why not."""
    conversion = autorev.convert(small(), batch=(TOKENS,), tile=3)
    recomputed = 4 - conversion.chains[0].stored_blocks
    assert conversion.tiled == tuple(f"blocks.{n}" if n < recomputed else f"blocks.{n}.mlp" for n in range(4))
    assert [path for path, _ in conversion.not_tiled] == [f"blocks.{n}.attention" for n in range(recomputed, 4)]
    assert "4 modules (blocks.0, ...) run 3 positions at a time" in str(conversion)
    assert "Not tiled: blocks.3.attention: " in str(conversion)
