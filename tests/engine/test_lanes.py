"""Blocks that carry several streams side by side: all of them are reversed together.

python -m pytest tests/engine/test_lanes.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import autorev
from autorev.engine.mode import running
from autorev.errors import ConversionError, ReconstructionError
from tests.engine.test_summary import measured
from tests.helpers import handwritten as hand
from tests.helpers.blocks import DOUBLE, EXACT, Setting, assert_like_oracle, assert_same, converted, gradients_of

PIXELS, WORDS = 9, 5


class Pairs(nn.Module):
    """Blocks that take and return (image, text), between maps of its own; the text is not read in the end."""

    def __init__(self, block: Callable[[], nn.Module], depth: int = 4) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(hand.WIDTH, hand.WIDTH), nn.Linear(hand.WIDTH, hand.WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(hand.WIDTH, 3)

    def begin(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first block is given."""
        return self.image(image), self.text(text)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image, text = self.begin(image, text)
        for block in self.blocks:
            image, text = block(image, text)
        return self.head(image)


class Both(Pairs):
    """Both streams are read in the end."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image, text = self.begin(image, text)
        for block in self.blocks:
            image, text = block(image, text)
        return self.head(torch.cat([image, text], 1))


class TextFirst(Pairs):
    """The text comes back first."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image, text = self.begin(image, text)
        for block in self.blocks:
            text, image = block(image, text)
        return self.head(image)


class HalfText(Pairs):
    """The text is in bfloat16, the image is not."""

    def begin(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.image(image), self.text(text).bfloat16()


class FrozenText(Pairs):
    """No gradient goes to the text that the first block is given."""

    def begin(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.image(image), self.text(text).detach()


class Returned(hand.Joint):
    """The other order, in a dict."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> Any:
        image, text = super().forward(image, text)
        return text, image


class Mixed(hand.Joint):
    """Each stream in a dtype of its own."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.attention(self.norm1(torch.cat([text.to(image.dtype), image], 1)))
        text = text + h[:, : text.shape[1]].to(text.dtype)
        text = text + self.mlp(self.norm2(text.to(image.dtype))).to(text.dtype)
        image = image + h[:, text.shape[1] :]
        return image + self.mlp(self.norm2(image)), text


class Dropping(hand.Joint):
    """Dropout on what each stream is given."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        after, words = super().forward(image, text)
        return image + F.dropout(after - image, 0.3), text + F.dropout(words - text, 0.3)


class Joined(hand.Parts):
    """Both are one tensor inside of the block (Flux's and HunyuanVideo's single blocks)."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([text, image], dim=1)
        both = both + self.attention(self.norm1(both))
        both = both + self.mlp(self.norm2(both))
        return both[:, text.shape[1] :], both[:, : text.shape[1]]


class Split(hand.Parts):
    """The same, taken apart by a split."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([image, text], -2)
        both = both + self.attention(self.norm1(both)) + self.mlp(self.norm2(both))
        image, text = both.split([image.shape[1], text.shape[1]], dim=1)
        return image, text


class FedByTheOther(hand.Parts):
    """What the text is given depends on the image alone."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        text = text + self.mlp(self.norm2(image)).mean(1, keepdim=True).expand_as(text)
        return image + self.attention(self.norm1(image)), text


class AtOnce(hand.Parts):
    """Each is given what depends on the other alone."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        words = text + self.mlp(self.norm2(image)).mean(1, keepdim=True)
        return image + self.attention(self.norm1(text)).mean(1, keepdim=True), words


class Exchanging(hand.Parts):
    """The same one after the other: RevNet's."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = image + self.attention(self.norm1(text)).mean(1, keepdim=True)
        return image, text + self.mlp(self.norm2(image)).mean(1, keepdim=True)


class ExchangingInPlace(hand.Parts):
    """The same in place: it trains, as its branches save nothing of what they are given."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image += self.attention(torch.tanh(text)).mean(1, keepdim=True)
        text.add_(self.mlp(torch.tanh(image)).mean(1, keepdim=True))
        return image, text


class Exchanged(hand.Parts):
    """Returns the text first, which the next block is given as its image."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([text, image], 1)
        both = both + self.attention(self.norm1(both))
        both = both + self.mlp(self.norm2(both)) * both[:, :1]
        return both[:, : text.shape[1]], both[:, text.shape[1] :]


class Shifted(hand.Parts):
    """What is returned as the image begins one place before the image."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([text, image], 1)
        both = both + self.attention(self.norm1(both))
        return both[:, WORDS - 1 : -1], both[:, :WORDS]


class Three(hand.Parts):
    """Three streams."""

    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = a + self.attention(self.norm1(a + b.mean(1, keepdim=True)))
        b = b + self.mlp(self.norm2(b + c.mean(1, keepdim=True)))
        return a, b, c + self.mlp(self.norm2(c + a.mean(1, keepdim=True)))


class InThrees(Pairs):
    """Hands three streams from block to block."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image, text = self.begin(image, text)
        third = text[:, :2] - 1
        for block in self.blocks:
            image, text, third = block(image, text, third)
        return self.head(torch.cat([image, third], 1))


class Turned(hand.Parts):
    """The joined tensor, which is square, is transposed before it is taken apart."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([text, image], 1)
        both = (both + self.mlp(self.norm1(both))).transpose(1, 2)
        return both[:, WORDS:], both[:, :WORDS]


class LastOfJoint(hand.Parts):
    """The last block of SD3: nobody reads its text."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, None]:
        h = self.attention(self.norm1(torch.cat([text, image], 1)))
        image = image + h[:, text.shape[1] :]
        return image + self.mlp(self.norm2(image)), None


def batch(setting: Setting = EXACT) -> tuple[torch.Tensor, torch.Tensor]:
    """(image, text)."""
    generator = torch.Generator().manual_seed(3)
    sizes = (2, PIXELS, hand.WIDTH), (2, WORDS, hand.WIDTH)
    image, text = (torch.randn(size, generator=generator).to(setting.dtype) for size in sizes)
    return image, text


def step(model: nn.Module, setting: Setting = EXACT) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one training step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = model(*batch(setting)).double().square().mean()
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "joint": partial(Pairs, hand.Joint),
    "both are read": partial(Both, hand.Joint),
    "the other order": partial(TextFirst, Returned),
    "dropout": partial(Pairs, Dropping),
    "joined inside": partial(Both, Joined),
    "split inside": partial(Both, Split),
    "exchanged": partial(Both, Exchanged),
    "fed by the other": partial(Both, FedByTheOther),
    "exchanging": partial(Both, Exchanging),
    "at once": partial(Both, AtOnce),
    "exchanging in place": partial(Both, ExchangingInPlace),
    "frozen text": partial(FrozenText, hand.Joint),
    "three": partial(InThrees, Three),
}


@pytest.mark.parametrize("setting", [EXACT, DOUBLE], ids=lambda s: s.name)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_oracle_s(name: str, setting: Setting) -> None:
    """Every stream of every block is in the one chain, and gradients are those of the equations."""
    model = converted(setting, MODELS[name], *batch(setting))
    (chain,) = autorev.analyze(MODELS[name]().to(setting.dtype), batch(setting)).chains
    assert {len(block.stream.split(", ")) for block in chain.blocks} == {3 if name == "three" else 2}
    assert_like_oracle(model, setting, lambda: step(model, setting))
    assert autorev.drift(model)["blocks"] <= (0 if setting is EXACT else 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_last": 2},
        {"method": "bdia"},
        {"method": "midpoint"},
        {"gamma": {"blocks.0": 0, "*": 0.25}},
        {"host": "side_bits"},
        {"keep": "attention"},
        {"tile": 4},
        {"granularity": "sublayer"},
        {"method": "revnet"},
    ],
    ids=str,
)
def test_every_setting_is_like_its_oracle(options: dict[str, Any]) -> None:
    """What is stored, random, on the host, kept, tiled, or taken in steps (of the first stream alone)."""
    model = converted(EXACT, MODELS["both are read"], *batch(), **options)
    assert_like_oracle(model, EXACT, lambda: step(model))


def test_that_steps_reverse_the_first_stream_alone_is_said() -> None:
    """Which one, and what reverses all of them."""
    for options in ({"granularity": "sublayer"}, {"method": "hamiltonian"}):
        torch.manual_seed(0)
        notes = autorev.convert(MODELS["both are read"](), batch=batch(), **options).notes
        assert any("only the stream image is reversed; text beside it keeps" in note for note in notes)
    assert not any("beside it" in note for note in autorev.convert(MODELS["both are read"](), batch=batch()).notes)


def test_steps_of_one_stream_write_to_no_other() -> None:
    """Step by step the second stream is an argument, which a second run would add to once more."""
    with pytest.raises(ConversionError, match=r"blocks\.0 adds in place to image, its second stream.*granularity"):
        converted(EXACT, MODELS["exchanging in place"], *batch(), granularity="sublayer")


def test_what_was_saved_before_an_add_in_place_is_named() -> None:
    """PyTorch's own backward fails on it, too."""

    class Saved(hand.Parts):
        def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            image += self.attention(self.norm1(text)).mean(1, keepdim=True)
            text += self.mlp(self.norm2(image)).mean(1, keepdim=True)
            return image, text

    model = converted(EXACT, partial(Both, Saved), *batch(), keep_last=0)
    with running("original"), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(model)
    with pytest.raises(ReconstructionError, match=r"blocks\.3 adds to its stream in place.*saved before that"):
        step(model)


def test_streams_of_two_dtypes() -> None:
    """Each lane has the dtype that the model gives it."""
    model = converted(EXACT, partial(HalfText, Mixed), *batch())
    assert_like_oracle(model, EXACT, lambda: step(model))
    assert autorev.drift(model) == {"blocks": 0.0}


def test_the_loop_written_by_hand() -> None:
    """A velocity for each stream, all of them fed by one run of the block's own code."""
    model = converted(DOUBLE, MODELS["both are read"], *batch(DOUBLE))
    model.zero_grad(set_to_none=True)
    with running("original"):
        streams = model.begin(*batch(DOUBLE))
        velocities = [torch.zeros_like(x) for x in streams]
        for block in model.blocks:
            returned = block(*streams)
            velocities = [v + out - x for v, out, x in zip(velocities, returned, streams, strict=True)]
            streams = [x + v for x, v in zip(streams, velocities, strict=True)]
        loss = model.head(torch.cat(streams, 1)).square().mean()
    loss.backward()
    assert_same(step(model, DOUBLE), {"loss": loss.detach(), **gradients_of(model)}, 1e-9)


def test_every_stream_is_rebuilt_bit_for_bit() -> None:
    """What a block's branch reads in its second run is what it read in the first, image and text."""
    model = converted(EXACT, MODELS["both are read"], *batch(), keep_last=0)
    read: dict[int, list[torch.Tensor]] = {}
    for number, block in enumerate(model.blocks):
        seen = read.setdefault(number, [])
        block.norm1.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].detach().clone()))
        block.norm2.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].detach().clone()))
    step(model)
    for seen in read.values():
        assert len(seen) == 6  # three calls in each run
        assert all(torch.equal(first, second) for first, second in zip(seen[:3], seen[3:], strict=True))


def test_a_gradient_may_be_asked_for_twice() -> None:
    """And the gradient that reaches one stream alone is right: the tape goes back for either."""
    model = converted(EXACT, MODELS["both are read"], *batch())
    out = model(*batch())
    first = torch.autograd.grad(out[:, :PIXELS].sum(), model.image.weight, retain_graph=True)[0]
    text = torch.autograd.grad(out[:, PIXELS:].sum(), model.image.weight, retain_graph=True)[0]
    again = torch.autograd.grad(out[:, :PIXELS].sum(), model.image.weight)[0]
    assert torch.equal(first, again)
    with running("oracle"):
        right = torch.autograd.grad(model(*batch())[:, PIXELS:].sum(), model.image.weight)[0]
    assert torch.allclose(text, right, rtol=1e-5)


def test_memory_is_counted_and_does_not_grow_with_the_depth() -> None:
    """Beyond side bits: 3 an element of either stream for each block. What `convert` tells is what is alive."""
    streams = 4 * (512 + 256) * hand.WIDTH
    real, told = {}, {}
    for depth in (4, 8):
        model = _Wide(depth)
        done = autorev.convert(model, batch=(torch.randn(512, hand.WIDTH),), keep_last=0)
        assert done.memory is not None
        real[depth], told[depth] = measured(model, torch.randn(512, hand.WIDTH)), done.memory.converted
        # The last block's inputs and outputs are alive behind it, and no longer behind the loss.
        assert told[depth].kept == real[depth].kept + 2 * streams - LOSS
        assert told[depth].peak == pytest.approx(real[depth].peak, rel=0.06)
        assert done.chains[0].streams == 2
    assert real[8].kept - real[4].kept == told[8].kept - told[4].kept == 4 * streams * 3 // 32


LOSS = 4


class _TwoMlps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = hand.MLP(), hand.MLP()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.first(x) * y.mean()
        return x, y + self.second(y) * x.mean()


class _Wide(nn.Module):
    """Streams of two sizes, and one input."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_TwoMlps() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x[:256]
        for block in self.blocks:
            x, y = block(x, y)
        return x.mean() + y.mean()


def test_keys_and_function_come_back() -> None:
    """`state_dict` has the same keys while converted, and `revert` the same outputs."""
    torch.manual_seed(0)
    model = Both(hand.Joint)
    keys, before = list(model.state_dict()), model(*batch())
    autorev.convert(model, batch=batch())
    assert list(model.state_dict()) == keys
    assert autorev.verify(model, batch()).passed
    autorev.revert(model)
    assert torch.equal(model(*batch()), before)


def test_a_last_block_that_returns_one_stream_is_left_as_it_is() -> None:
    """With the reason; the others are a chain of both streams, and their gradients are right."""
    torch.manual_seed(0)
    model = Pairs(hand.Joint)
    model.blocks[3] = LastOfJoint()
    done = autorev.convert(model, batch=batch())
    assert [chain.blocks for chain in done.chains] == [("blocks.0", "blocks.1", "blocks.2")]
    ((path, reason),) = done.not_converted
    assert (path, reason.partition(":")[0]) == ("blocks.3", "other-streams")
    assert "image, and blocks.2 before it image, text" in reason
    assert_like_oracle(model, EXACT, lambda: step(model))


@pytest.mark.parametrize(("block", "pixels"), [(Shifted, PIXELS), (Turned, hand.WIDTH - WORDS)])
def test_a_part_in_another_place_is_no_stream(block: type[nn.Module], pixels: int) -> None:
    """Shapes alone do not tell which part of a joined tensor is which."""
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(2, length, hand.WIDTH, generator=generator) for length in (pixels, WORDS)]
    analysis = autorev.analyze(Both(block), tuple(inputs))
    assert {b.stream for chain in analysis.chains for b in chain.blocks} == ({"text"} if block is Shifted else set())


def test_a_call_that_returns_fewer_streams_is_an_error() -> None:
    """Rather than a stream in the place of another."""

    class Sometimes(hand.Joint):
        alone = False

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> Any:
            image, text = super().forward(image, text)
            return image if self.alone else (image, text)

    model = converted(EXACT, partial(Pairs, Sometimes), *batch())
    Sometimes.alone = True
    with pytest.raises(ConversionError, match="returns 2 streams, and returns fewer"):
        model(*batch())


def test_outputs_of_an_evaluation_are_the_same() -> None:
    """Without gradients the state goes along, too."""
    model = converted(EXACT, MODELS["both are read"], *batch())
    trained = model(*batch())
    with torch.no_grad():
        assert torch.equal(model(*batch()), trained)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(model(*batch())), tree_leaves(trained), strict=True))
