"""Hand-written models: every reason to refuse a block has one here, and so has every caveat.

python -m pytest tests/integration/test_handwritten.py
"""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import autorev
from autorev.analysis import Analysis, Block
from tests.helpers import handwritten as hand
from tests.helpers.one_step import gap, one_step

TOKENS = torch.arange(16).reshape(2, 8)
SEQUENCE = torch.linspace(-1, 1, 2 * 8 * hand.WIDTH).reshape(2, 8, hand.WIDTH)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def shared_blocks() -> nn.Module:
    """One block, called three times."""
    block = hand.Block()
    return hand.Stack(block, block, block)


def encoder(norm_first: bool) -> nn.Module:
    """torch's own."""
    layer = nn.TransformerEncoderLayer(hand.WIDTH, 2, 32, norm_first=norm_first, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def blocks(block: type[nn.Module], count: int) -> list[nn.Module]:
    """`count` blocks of one class."""
    return [block() for _ in range(count)]


# name -> (model, input, [(chain's name, steps of each block)], codes of caveats by block of all chains)
TWO = "attention + mlp"
ELIGIBLE: dict[str, tuple[Any, torch.Tensor, list[tuple[str, list[str]]]]] = {
    "nanogpt": (lambda: hand.stack_of(hand.Block), TOKENS, [("blocks", [TWO] * 3)]),
    "parallel": (lambda: hand.stack_of(hand.Parallel), TOKENS, [("blocks", ["parallel"] * 3)]),
    "rescaled branch": (lambda: hand.stack_of(hand.Rescaled), TOKENS, [("blocks", [TWO + " + mlp"] * 3)]),
    "subtracting": (lambda: hand.stack_of(hand.Subtracting), TOKENS, [("blocks", [TWO] * 3)]),
    "dropping": (lambda: hand.stack_of(hand.Dropping), TOKENS, [("blocks", [TWO] * 3)]),
    "flattening": (lambda: hand.stack_of(hand.Flattening), TOKENS, [("blocks", [TWO] * 3)]),
    "first token apart": (lambda: hand.stack_of(hand.FirstTokenApart), TOKENS, [("blocks", [TWO] * 3)]),
    "by keyword": (lambda: hand.KeywordStack(*blocks(hand.KeywordOnly, 3)), TOKENS, [("blocks", [TWO] * 3)]),
    "tuple": (lambda: hand.TakingApart(*blocks(hand.WithTuple, 3)), TOKENS, [("blocks", [TWO] * 3)]),
    "dataclass": (lambda: hand.TakingApart(*blocks(hand.WithDataclass, 3)), TOKENS, [("blocks", [TWO] * 3)]),
    "shared weights": (shared_blocks, TOKENS, [("blocks.0", [TWO] * 3)]),
    "half in a child": (lambda: hand.stack_of(hand.OfHalves), TOKENS, [("blocks", [TWO] * 3)]),
    "adding in double": (lambda: hand.stack_of(hand.AddingInDouble), TOKENS, [("blocks", [TWO] * 3)]),
    "side stream": (
        lambda: hand.TwoStreams(*blocks(hand.WithSideStream, 3)),
        TOKENS,
        [("blocks", [TWO + " + attention"] * 3)],
    ),
    "joint": (
        lambda: hand.ImageAndText(*blocks(hand.Joint, 3)),
        TOKENS,
        [("blocks", ["parallel + attention + mlp"] * 3)],
    ),
    "exchanging": (
        lambda: hand.TwoEmbeddings(*blocks(hand.Exchanging, 3)),
        TOKENS,
        [("blocks", ["parallel + attention"] * 3)],
    ),
    "at once": (
        lambda: hand.TwoEmbeddings(*blocks(hand.AtOnce, 3)),
        TOKENS,
        [("blocks", ["attention + mlp"] * 3)],
    ),
    "two streams": (
        lambda: hand.Alternating(*blocks(hand.Block, 6)),
        TOKENS,
        [("blocks", [TWO] * 3), ("blocks", [TWO] * 3)],
    ),
    **{
        block.__name__: (lambda block=block: hand.stack_of(block), TOKENS, [("blocks", ["mlp"] * 3)])
        for block in (
            hand.ScaledShortcut,
            hand.ScaledByAlpha,
            hand.NegatedShortcut,
            hand.HalvedSum,
            hand.Interpolated,
        )
    },
    "first stream": (hand.Injecting, SEQUENCE, [("parts", ["mlp"] * 5)]),
    "long skips": (lambda: hand.LongSkips(*blocks(hand.Block, 6)), TOKENS, [("blocks", [TWO] * 6)]),
    "layer scalar": (lambda: hand.stack_of(hand.LayerScalar), TOKENS, [("blocks", [TWO] * 3)]),
    "wavenet": (hand.WaveNet, SEQUENCE, [("parts", ["mlp"] * 6)]),
    "product first": (hand.Leaking, SEQUENCE, [("parts", ["mlp + attention"] * 6)]),
    "loop": (hand.Loop, SEQUENCE, [("(the model itself)", [TWO] * 3)]),
    "torch encoder": (lambda: encoder(norm_first=True), SEQUENCE, [("layers", [TWO] * 3)]),
    "pre-activation resnet": (
        hand.PreActivationResNet,
        IMAGES,
        [("stage1", ["convolution"] * 3), ("stage2", ["convolution"] * 2)],
    ),
}

# name -> (model, input, the class with the marked line, code, how many blocks carry it)
CAVEATS: dict[str, tuple[Any, torch.Tensor, type[nn.Module], str, int]] = {
    "layer-drop": (lambda: hand.Skipping(*blocks(hand.Block, 3)), TOKENS, hand.Skipping, "layer-drop", 3),
    "layer-drop in Python": (
        lambda: hand.SkippingInPython(*blocks(hand.Block, 3)),
        TOKENS,
        hand.SkippingInPython,
        "layer-drop",
        3,
    ),
    "layer-drop in the block": (
        lambda: hand.stack_of(hand.DroppingItself),
        TOKENS,
        hand.DroppingItself,
        "layer-drop",
        3,
    ),
    "batch norm": (hand.PreActivationResNet, IMAGES, hand.PreActivation, "buffer-write", 5),
    "in place": (lambda: hand.stack_of(hand.InPlace), TOKENS, hand.InPlace, "in-place-add", 3),
    "exchanging in place": (
        lambda: hand.TwoEmbeddings(*blocks(hand.ExchangingInPlace, 3)),
        TOKENS,
        hand.ExchangingInPlace,
        "in-place-add",
        3,
    ),
    "widened": (
        lambda: hand.HalfPrecision(*blocks(hand.Widening, 3)).bfloat16(),
        TOKENS,
        hand.Widening,
        "stream-cast",
        1,
    ),
    "closure": (lambda: hand.stack_of(hand.ReadingAClosure), TOKENS, hand.ReadingAClosure, "closure", 3),
    "replaced once": (
        lambda: hand.NormedOnce(*blocks(hand.Block, 4)),
        TOKENS,
        hand.NormedOnce,
        "stream-replaced",
        2,
    ),
    "deep supervision": (
        lambda: hand.DeeplySupervised(*blocks(hand.Block, 3)),
        TOKENS,
        hand.DeeplySupervised,
        "stream-read",
        2,
    ),
    "all states": (
        lambda: hand.Collecting(*blocks(hand.Block, 3)),
        TOKENS,
        hand.Collecting,
        "stream-read",
        2,
    ),
    "other streams": (
        lambda: hand.ImageAndText(*blocks(hand.Joint, 2), *blocks(hand.ReadingText, 2)),
        TOKENS,
        hand.ReadingText,
        "other-streams",
        1,
    ),
    "single": (lambda: hand.stack_of(hand.OnlyOne, 1), TOKENS, hand.OnlyOne, "single-block", 1),
}

# name -> (model, input, the class with the marked line, code)
REFUSED: dict[str, tuple[Any, torch.Tensor, type[nn.Module], str]] = {
    **{
        block.__name__: (lambda block=block: hand.stack_of(block), TOKENS, block, code)
        for block, code in [
            (hand.PostNorm, "post-norm"),
            (hand.PostGatedNorm, "post-norm"),
            (hand.PostActivation, "post-activation"),
            (hand.NormedShortcut, "normed-shortcut"),
            (hand.ProjectedShortcut, "projected-shortcut"),
            (hand.DetachedShortcut, "detached"),
            (hand.DroppedStream, "stream-dropout"),
            (hand.PostNormWrittenOut, "post-norm"),
            (hand.PermutedShortcut, "permuted-shortcut"),
            (hand.LearnedShortcut, "scaled-shortcut"),
            (hand.ZeroedShortcut, "scaled-shortcut"),
            (hand.DoubledShortcut, "scaled-shortcut"),
            (hand.Highway, "scaled-shortcut"),
            (hand.Broadcast, "broadcast"),
            (hand.Pooling, "shape-change"),
            (hand.DataDependent, "data-dependent"),
            (hand.OnceOnly, "not-repeatable"),
            (hand.Unseen, "unseen-code"),
            (hand.InPlaceActivation, "in-place"),
            (hand.HyperConnected, "projected-shortcut"),
        ]
    },
    "WritingItsMask": (
        lambda: hand.MaskedStack(*blocks(hand.WritingItsMask, 3)),
        TOKENS,
        hand.WritingItsMask,
        "argument-write",
    ),
    "AddingToItsSide": (
        lambda: hand.Unheard(*blocks(hand.AddingToItsSide, 3)),
        TOKENS,
        hand.AddingToItsSide,
        "argument-write",
    ),
    "Remembering": (
        lambda: hand.RememberingStack(*blocks(hand.Remembering, 3)),
        TOKENS,
        hand.Remembering,
        "argument-write",
    ),
    "Inside": (lambda: hand.ReversibleAlready(*blocks(hand.Inside, 3)), TOKENS, hand.Inside, "own-backward"),
    "WithInnerStream": (
        lambda: hand.TakingApart(*blocks(hand.WithInnerStream, 3)),
        TOKENS,
        hand.WithInnerStream,
        "aux-output",
    ),
    "WithObject": (
        lambda: hand.TakingApart(*blocks(hand.WithObject, 3)),
        TOKENS,
        hand.WithObject,
        "aux-output",
    ),
    "Between": (lambda: hand.Between(*blocks(hand.Block, 3)), TOKENS, hand.Between, "stream-replaced"),
    "SharedAdd": (hand.SharedAdd, SEQUENCE, hand.SharedAdd, "shared-add"),
    "PostNormLoop": (hand.PostNormLoop, SEQUENCE, hand.PostNormLoop, "post-norm"),
}


def marked_lines(where: type[nn.Module], code: str) -> set[str]:
    """`file.py:line` of the lines that a `# here: code` comment marks in a class or in what it inherits from."""
    found = set()
    for cls in where.__mro__:
        if cls.__module__ == hand.__name__:
            lines, first = inspect.getsourcelines(cls)
            found |= {first + i for i, line in enumerate(lines) if line.rstrip().endswith(f"# here: {code}")}
    assert found, f"{where.__name__} marks no line with {code}"
    return {f"tests/helpers/handwritten.py:{line}" for line in found}


def split(reason: str) -> tuple[str, str]:
    """(code, `file.py:line`) of a reason."""
    return reason.partition(":")[0], reason.rpartition("(")[2].rstrip(")")


def steps(block: Block) -> str:
    """The kinds of its steps."""
    return " + ".join(step.kind for step in block.steps)


def analyze(model: nn.Module, example: torch.Tensor) -> Analysis:
    """The analysis, from the folder that makes `tests/helpers/handwritten.py` the file's short name."""
    assert Path.cwd() == Path(__file__).parents[2], "run pytest in the repository's root"
    return autorev.analyze(model, example)


@pytest.mark.parametrize("name", ELIGIBLE)
def test_eligible_blocks_are_found(name: str) -> None:
    """Chains, their lengths and the kinds of their steps."""
    build, example, expected = ELIGIBLE[name]
    analysis = analyze(build(), example)
    assert [(chain.name, [steps(b) for b in chain.blocks]) for chain in analysis.chains] == expected
    assert all(block.verdict != "refused" for chain in analysis.chains for block in chain.blocks)


@pytest.mark.parametrize("name", CAVEATS)
def test_a_caveat_names_the_line(name: str) -> None:
    """The blocks stay in a chain, and the reason points to the marked line."""
    build, example, where, code, count = CAVEATS[name]
    found = [block for chain in analyze(build(), example).chains for block in chain.blocks if block.reasons]
    assert len(found) == count
    for block in found:
        assert block.verdict == "caveat"
        assert {split(reason)[0] for reason in block.reasons} == {code}
        assert {split(reason)[1] for reason in block.reasons} == marked_lines(where, code)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_line(name: str) -> None:
    """Every block is refused for the one reason, which points to the marked line."""
    build, example, where, code = REFUSED[name]
    analysis = analyze(build(), example)
    assert analysis.chains == ()
    assert len(analysis.refused) >= 2
    for block in analysis.refused:
        assert block.verdict == "refused"
        assert split(block.reasons[0]) in {(code, line) for line in marked_lines(where, code)}


class _RmsNorm(nn.Module):
    """The user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(("norm", "named"), [(nn.LayerNorm(hand.WIDTH), True), (_RmsNorm(), True), (nn.Tanh(), False)])
def test_a_norm_behind_each_block_is_called_post_norm(norm: nn.Module, named: bool) -> None:
    """Outside of the blocks it is the loop that stands in the way, and what to do is to move the norm."""
    model = hand.Between(*blocks(hand.Block, 3))
    model.norm = norm
    for block in analyze(model, TOKENS).refused:
        assert ("this is post-norm" in block.reasons[0]) is named
        assert ("put it into the branch, x + f(norm(x))" in block.reasons[0]) is named


class _Mixing(hand.Parts):
    """Hyper-connections, whose weights depend on the streams: these have an axis of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.beta = nn.Parameter(torch.eye(2)), nn.Parameter(torch.ones(2, 1))
        self.dynamic = nn.Linear(hand.WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mix = self.mix + torch.tanh(self.dynamic(self.norm1(x)))
        return mix @ x + self.mlp(self.norm2(x.mean(-2, keepdim=True))) * self.beta


class _Mixed(hand.Stack):
    """Hands two streams on in one tensor."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).unsqueeze(-2).expand(-1, -1, 2, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.sum(-2))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: hand.stack_of(hand.HyperConnected), True),
        (lambda: _Mixed(*blocks(_Mixing, 3)), True),
        (lambda: hand.stack_of(hand.ProjectedShortcut), False),
    ],
)
def test_hyper_connections_are_called_so(model: Any, named: bool) -> None:
    """A matrix that mixes streams is another thing than one that mixes features."""
    refused = analyze(model(), TOKENS).refused
    assert len(refused) >= 2
    for block in refused:
        assert split(block.reasons[0])[0] == "projected-shortcut"
        assert ("learned weights mix 2 parts of the stream" in block.reasons[0]) is named


def test_a_learned_factor_says_that_it_would_be_a_constant_if_it_were_frozen() -> None:
    """And so it is."""
    model = hand.stack_of(hand.LearnedShortcut)
    for block in analyze(model, TOKENS).refused:
        assert "by gain, which is learned (frozen, it would be a constant)" in block.reasons[0]
    for block in model.blocks:
        block.gain.requires_grad_(False)
    assert [len(chain) for chain in analyze(model, TOKENS).chains] == [3]


class _Loop(hand.Stack):
    """Blocks without modules of their own; `code` makes a turn of the loop."""

    def __init__(self, code: Callable[[_Loop, int, torch.Tensor], torch.Tensor], streams: int = 0) -> None:
        super().__init__(*(nn.Linear(hand.WIDTH, hand.WIDTH) for _ in range(3)))
        self.code, self.streams = code, streams
        self.gains = nn.Parameter(torch.ones(3))
        self.mixing = nn.Parameter(torch.eye(2).repeat(3, 1, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x.unsqueeze(-2).expand(-1, -1, self.streams, -1) if self.streams else x
        for turn in range(3):
            x = self.code(self, turn, x)
        return self.head(x.sum(-2) if self.streams else x)


@pytest.mark.parametrize(
    ("code", "streams", "reason"),
    [
        (
            lambda m, n, x: m.gains[n] * x + m.blocks[n](x),
            0,
            "scaled-shortcut: the skip is multiplied (`mul`) by gains",
        ),
        (lambda m, n, x: x.sigmoid() * x + m.blocks[n](x), 0, "scaled-shortcut: the skip is multiplied (`mul`) by a"),
        (
            lambda m, n, x: m.mixing[n] @ x + m.blocks[n](x.mean(-2, keepdim=True)),
            2,
            "projected-shortcut: learned weights mix 2 parts of the stream (`matmul`)",
        ),
        (lambda m, n, x: torch.relu(m.blocks[n](x) + m.blocks[n](x.tanh())), 0, None),
    ],
)
def test_a_loop_says_what_it_does_to_its_skip(code: Any, streams: int, reason: str | None) -> None:
    """As blocks that are modules do; where nothing is skipped, there is nothing to say."""
    analysis = analyze(_Loop(code, streams), TOKENS)
    assert analysis.chains == ()
    assert len(analysis.refused) == (3 if reason else 0)
    assert all(block.reasons[0].startswith(str(reason)) for block in analysis.refused)


@pytest.mark.parametrize("block", [hand.NotResidual, hand.Concatenating, hand.FirstTokenCut])
def test_a_model_without_residual_blocks_has_neither_chains_nor_refusals(block: type[nn.Module]) -> None:
    """Nothing is made up where no block adds its input to something."""
    analysis = analyze(hand.stack_of(block), TOKENS)
    assert (analysis.chains, analysis.refused) == ((), ())


def test_torch_s_post_norm_encoder_is_refused_in_its_own_line() -> None:
    """torch's source is user code where it holds the residual sum."""
    refused = analyze(encoder(norm_first=False), SEQUENCE).refused
    assert len(refused) == 3
    assert {split(reason)[0] for block in refused for reason in block.reasons} == {"post-norm"}
    assert all("torch/nn/modules/transformer.py:" in block.reasons[0] for block in refused)


def test_a_projected_first_block_is_refused_and_the_rest_is_a_chain() -> None:
    """A pre-activation ResNet's stage begins with a projection; its line and the shape change are named."""
    (block,) = analyze(hand.PreActivationResNet(), IMAGES).refused
    assert block.path == "stage2.0"
    assert [split(reason)[0] for reason in block.reasons] == ["projected-shortcut", "shape-change"]
    assert split(block.reasons[0])[1] in marked_lines(hand.PreActivation, "projected-shortcut")


def hooked() -> nn.Module:
    """Every block's result is squashed by a hook of the user."""
    model = hand.stack_of(hand.Block)
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: output.tanh())
    return model


def test_a_hook_that_changes_the_stream_is_seen() -> None:
    """A forward hook is no part of the block, and what it does to the stream lies between two blocks."""
    analysis = analyze(hooked(), TOKENS)
    assert analysis.chains == ()
    assert {split(reason)[0] for block in analysis.refused for reason in block.reasons} == {"stream-replaced"}


def test_blocks_behind_an_early_exit_are_told() -> None:
    """What the recorded call did not reach is refused, not forgotten."""
    analysis = analyze(hand.EarlyExit(*blocks(hand.Block, 4)), TOKENS)
    assert [len(chain) for chain in analysis.chains] == [2]
    assert [(b.path, split(b.reasons[0])[0]) for b in analysis.refused] == [
        ("blocks.2", "not-called"),
        ("blocks.3", "not-called"),
    ]


def test_calls_of_a_shared_block_are_numbered() -> None:
    """Shared weights: one path, three calls."""
    (chain,) = analyze(shared_blocks(), TOKENS).chains
    assert [(block.path, block.call) for block in chain.blocks] == [
        ("blocks.0", 0),
        ("blocks.0", 1),
        ("blocks.0", 2),
    ]


def test_every_code_of_the_detection_has_a_model_here() -> None:
    """A new reason needs a new model: the codes are read from the source of `autorev.detect`."""
    known = {code for _, _, _, code in REFUSED.values()} | {code for _, _, _, code, _ in CAVEATS.values()}
    assert known >= _codes_in_source() - {"not-residual", "not-called"}


def _codes_in_source() -> set[str]:
    folder = Path(inspect.getfile(autorev)).parent / "detect"
    found = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Obstacle"
            if called and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    assert len(found) > 10
    return found


OWN_WAYS: dict[str, dict[str, Any]] = {
    "single": {"blocks": ["blocks.0"]},
    "subtracting": {"granularity": "block"},  # torch adds up a Python list, on one line, from 0
    "exchanging in place": {"granularity": "block"},  # step by step, only one stream is reversed
}


def total(returned: Any) -> torch.Tensor:
    """A loss that depends on every tensor returned."""
    return torch.stack([leaf.square().mean() for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]).sum()


# The plain backward of the one that adds in place fails.
@pytest.mark.parametrize("name", sorted({*ELIGIBLE, *CAVEATS} - {"in place"}))
def test_without_velocity_the_steps_compute_what_the_model_computes(name: str) -> None:
    """With gamma = 0 the update is the residual sum itself: loss and gradients tell whether the steps are those."""
    build, example = (ELIGIBLE | CAVEATS)[name][:2]
    torch.manual_seed(0)
    model = build().double().train()
    example = example.double() if example.is_floating_point() else example
    random.seed(1)
    expected_loss, expected = one_step(model, example, loss=total)
    options = {"gamma": 0, "c": 1, "arithmetic": "float", "granularity": "sublayer"} | OWN_WAYS.get(name, {})
    autorev.convert(model, batch=(example,), **options)
    random.seed(1)
    loss, found = one_step(model, example, loss=total)
    assert torch.allclose(loss, expected_loss, rtol=1e-12)
    assert gap(found, expected) < 1e-9


class _Quantiser(nn.Module):
    """A loop whose branches are used outside of it, and whose last state is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(hand.WIDTH, hand.WIDTH), nn.Tanh()) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for layer in self.layers:
            part = layer(x)
            x, total = x - part, total + part
        return total


def test_a_step_that_cannot_be_simulated_is_no_obstacle() -> None:
    """What it saves is not known, and is said to be; its gradients are right."""
    model = _Quantiser()
    converted = autorev.convert(model, SEQUENCE)
    assert "what it saves was not counted" in str(converted)
    assert autorev.verify(model, SEQUENCE).passed


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_blocks_are_refused_in_words() -> None:
    """Their class has no forward that could be asked for; what fake tensors meet inside depends on its interpreter."""
    model = hand.Stack(*(torch.jit.script(nn.Sequential(nn.Linear(hand.WIDTH, hand.WIDTH))) for _ in range(3)))
    with pytest.raises(autorev.AutorevError, match=r"blocks\.0 was compiled by torch\.jit\.script"):
        autorev.convert(model, TOKENS)
