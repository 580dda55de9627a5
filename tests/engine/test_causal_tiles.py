"""Blocks that run a tile of positions at a time with their attention: each position looks at those before it.

python -m pytest tests/engine/test_causal_tiles.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

import autorev
from autorev.engine.past import attending_as_a_gpu, lower_right
from autorev.errors import ConversionError
from autorev.in_place import Blocks, in_place
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
    no_collection,
    small,
    step,
    taken_half_way,
    two_backward_passes,
)

TILES = 3
"""Of eight positions, at three a tile."""
SETTINGS = [EXACT, DOUBLE, EXACT_LEAPFROG, Setting("sublayer", {"granularity": "sublayer"})]
with_tiles = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
PATHS = Blocks(tuple(f"blocks.{n}" for n in range(2)), inline=False, draws_random=False)


class Grouped(nn.Module):
    """Llama's attention: four heads, two of keys and values, norms of queries and keys, rotated by position."""

    repeats, causal = False, True

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.norm_q, self.norm_k = nn.RMSNorm(4), nn.RMSNorm(4)
        self.out = nn.Linear(16, 16)

    def forward(
        self, x: torch.Tensor, position: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (f(x).view(*x.shape[:-1], -1, 4) for f in (self.q, self.k, self.v))
        q, k, v = self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), v.transpose(1, 2)
        q, k = (_rotated(t, *(angle.unsqueeze(1) for angle in position)) for t in (q, k))
        if self.repeats:
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
        causal = self.causal and mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=not self.repeats)
        return self.out(out.transpose(1, 2).reshape(x.shape)), None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin


class Block(nn.Module):
    """A usual pre-norm block."""

    attending: type[Grouped] = Grouped

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(16), nn.RMSNorm(16)
        self.attention, self.mlp = self.attending(), hand.MLP()

    def forward(
        self, x: torch.Tensor, position: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), position, mask)[0]
        return x + self.mlp(self.norm2(x))


class Repeating(Block):
    """Keys and values are repeated for each head."""

    class Attention(Grouped):
        repeats = True

    attending = Attention


class Drawing(Block):
    """Dropout before attention and behind it."""

    def forward(
        self, x: torch.Tensor, position: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = x + F.dropout(self.attention(F.dropout(self.norm1(x), 0.2), position, mask)[0], 0.3)
        return x + self.mlp(self.norm2(x))


class Model(hand.Stack):
    """Its positions are computed once, for the whole batch."""

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embedding(tokens)
        angles = torch.arange(tokens.shape[1], dtype=x.dtype)[None, :, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        position = angles.to(x.dtype).cos(), angles.to(x.dtype).sin()
        for block in self.blocks:
            x = block(x, position, mask)
        return self.head(self.norm(x))


def model_of(block: Callable[[], nn.Module] = Block) -> Model:
    """Two blocks."""
    return Model(*(block() for _ in range(2)))


def tiled(setting: Setting, block: Callable[[], nn.Module] = Block, **options: Any) -> Any:
    """Converted, and nothing is stored."""
    return converted(setting, lambda: model_of(block), tile=TILES, **{"keep_last": 0, **options})


def attention_of(run: Callable[[], object]) -> list[tuple[int, int]]:
    """(queries, keys) of every run of attention's kernel."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
                seen.append((args[0].shape[2], args[1].shape[2]))
            return func(*args, **(kwargs or {}))

    with Watch():
        run()
    return seen


ONCE = [(3, 3), (3, 6), (2, 8)]
"""Queries and keys of eight positions in tiles of three."""


@with_tiles
@pytest.mark.parametrize("block", [hand.Block, Block, Repeating, Drawing], ids=lambda block: block.__name__)
def test_gradients_are_those_of_the_original_code(block: Callable[[], nn.Module], setting: Setting) -> None:
    """Whatever stands around attention, under every kind of coupling, and rebuilt bit for bit."""
    model = converted(setting, lambda: small(2, block), tile=TILES, keep_last=0) if block is hand.Block else None
    model = model or tiled(setting, block)
    assert_like_oracle(model, setting)
    assert autorev.drift(model) == {"blocks": 0.0} or "float" in setting.name


@with_tiles
def test_a_gpu_is_told_where_the_queries_are(setting: Setting) -> None:
    """The same gradients; what it is told is no mask, which the CPU's kernel makes of it here."""
    with attending_as_a_gpu():
        model = tiled(setting)
        assert_like_oracle(model, setting)


@with_tiles
def test_attention_runs_once_in_each_direction(setting: Setting) -> None:
    """A tile looks at the keys up to its end, and at no more; in backward the last tile comes first."""
    model = tiled(setting)
    runs = attention_of(lambda: step(model))
    assert runs[:6] == 2 * ONCE
    assert runs[6:] == 2 * ONCE[::-1]


@pytest.mark.parametrize("method", ["checkpoint", "offload"])
def test_checkpoints(method: str) -> None:
    """PyTorch's own: attention runs as often as under any checkpoint, and gradients add up over two passes."""
    torch.manual_seed(0)
    model: Any = model_of()
    expected = two_passes(model)
    with in_place(model, Method(method, tile=TILES), PATHS, ((TOKENS,), {})):
        assert_same(two_passes(model), expected, 1e-5)
        assert attention_of(lambda: step(model)) == 2 * ONCE + 2 * ONCE[::-1]
    assert "forward" not in vars(model.blocks[0])
    assert_same(two_passes(model), expected, 0)


def two_passes(model: nn.Module) -> Results:
    """Of two batches, whose gradients add up."""
    model.zero_grad()
    mean_square(model(TOKENS)).backward()
    mean_square(model(TOKENS + 9)).backward()
    return gradients_of(model)


def test_what_is_not_run_twice_anyway_attends_whole() -> None:
    """Plain training, and blocks that are stored, would pay with another run of attention."""
    torch.manual_seed(0)
    model: Any = model_of()
    with in_place(model, Method("plain", tile=TILES), PATHS, ((TOKENS,), {})):
        assert attention_of(lambda: step(model)) == 2 * [(8, 8)]
    model = tiled(EXACT, keep_last=1)
    assert attention_of(lambda: step(model)) == [*ONCE, (8, 8), *ONCE[::-1]]
    assert_like_oracle(model, EXACT)


def test_attention_that_is_kept_is_not_tiled() -> None:
    """It shall not run a second time."""
    model = tiled(EXACT, keep="attention")
    assert attention_of(lambda: step(model)) == 2 * [(8, 8)]
    assert_like_oracle(model, EXACT)


@with_tiles
def test_the_function_is_the_same_up_to_rounding(setting: Setting) -> None:
    """With gradients and without."""
    whole, model = converted(setting, model_of, keep_last=0), tiled(setting)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(whole(TOKENS), model(TOKENS), atol=1e-6)


@pytest.mark.parametrize("frozen", ["attention", "attention.k", "mlp", "embedding", "norm", "all but the last block"])
def test_frozen_parameters(frozen: str) -> None:
    """Keys and values that need no gradient leave none."""
    model = tiled(EXACT)
    frozen_but(model, frozen)
    assert_like_oracle(model, EXACT)


@with_tiles
def test_two_backward_passes_of_one_forward(setting: Setting) -> None:
    """`retain_graph`: keys and values are made again for each."""
    model = tiled(setting)
    assert_like_oracle(model, setting, lambda: two_backward_passes(model))


def test_a_gradient_taken_half_way() -> None:
    """Tiles of blocks that nobody asked for are run all the same, and then asked for."""
    model = tiled(EXACT)
    assert_like_oracle(model, EXACT, lambda: taken_half_way(model, model.blocks[1].attention.k.weight))


def test_other_lengths() -> None:
    """One tile, tiles that fit, and a last position that would be alone, and attend as a single query does."""
    model = tiled(EXACT)
    for tokens in (TOKENS[:, :3], TOKENS[:, :4], TOKENS[:, :6], TOKENS[:1], torch.arange(40).reshape(2, 20)):
        assert_like_oracle(model, EXACT, lambda tokens=tokens: step(model, tokens))


def test_attention_of_later_positions_is_not_tiled() -> None:
    """The reason says where; the MLP is tiled."""

    class Both(Block):
        class Attention(Grouped):
            causal = False

        attending = Attention

    torch.manual_seed(0)
    model: Any = model_of(Both)
    conversion = autorev.convert(model, batch=(TOKENS,), tile=TILES, keep_last=0)
    assert conversion.tiled == tuple(f"blocks.{n}.mlp" for n in range(2))
    (path, reason), *_ = conversion.not_tiled
    assert path == "blocks.0.attention"
    assert reason.startswith("attention at")
    assert reason.endswith("looks at later positions, too")
    assert_like_oracle(model, EXACT)


def test_a_hook_within_a_block_sees_all_positions() -> None:
    """As long as it is there, the block runs whole."""
    model, seen = tiled(EXACT), []
    handle = model.blocks[1].attention.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[1]))
    assert_like_oracle(model, EXACT)
    assert set(seen) == {8}
    handle.remove()
    assert attention_of(lambda: step(model)) == 2 * ONCE + 2 * ONCE[::-1]


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attention without a kernel."""
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ k.mT / 2).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v


def test_attention_by_other_code_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched after the conversion, where nothing of the module shows it: never a wrong gradient."""
    model = tiled(EXACT)
    step(model)
    monkeypatch.setattr(F, "scaled_dot_product_attention", written_out)
    with pytest.raises(ConversionError, match=r"called scaled_dot_product_attention 0 times.*convert again"):
        step(model)


def test_gradients_of_keys_are_added_up_in_float32() -> None:
    """In bfloat16 they are as right as those of attention at once."""
    torch.manual_seed(0)
    tokens = torch.arange(256).remainder(50).reshape(1, 256)
    model: Any = model_of()
    exact = step(model.double(), tokens)
    whole = step(model.to(torch.bfloat16), tokens)
    with in_place(model, Method("checkpoint", tile=8), PATHS, ((tokens,), {})):
        tiles = step(model, tokens)
    for name in (f"blocks.{n}.attention.{one}.weight" for n in range(2) for one in "kv"):
        errors = [float((one[name].double() - exact[name]).norm()) for one in (whole, tiles)]
        assert errors[1] < 1.5 * errors[0], (name, errors)


LONG = torch.arange(512).remainder(50).reshape(1, 512)


def test_a_step_holds_keys_and_values_and_one_tile() -> None:
    """Beside the chain's streams and their gradients."""

    def peak(tile: int | None) -> int:
        torch.manual_seed(0)
        model = model_of()
        for parameter in model.blocks.parameters():
            parameter.requires_grad_(False)
        autorev.convert(model, batch=(LONG,), method="leapfrog", keep_last=0, tile=tile)
        model(LONG).sum().backward()
        with no_collection(), PeakBytes() as live:
            model(LONG).sum().backward()
        return live.peak

    unit = 512 * 16 * 4
    # Two streams; three gradients of them; input, its gradient and the result; keys, values and their gradients (two);
    # masks that the kernel makes on a CPU.
    assert peak(16) < 12.5 * unit
    assert peak(None) > 18 * unit


def test_what_tells_the_kernel_takes_no_memory() -> None:
    """Torch's own takes 128 TiB of it here; the kernel hears the same from both."""
    assert lower_right(2**20, 2**24).numel() == 0
    found = []
    for bias in (lower_right(5, 9), causal_lower_right(5, 9)):
        torch.manual_seed(0)
        query, key, value = (torch.randn(1, 2, length, 8, requires_grad=True) for length in (5, 9, 9))
        out = F.scaled_dot_product_attention(query, key, value, bias)
        found.append((out, *torch.autograd.grad(out.sin().sum(), (query, key, value))))
    assert all(map(torch.equal, *found))
