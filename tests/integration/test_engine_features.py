"""Converted models in use: each feature of PyTorch's training loop, against the same coupling under ordinary autograd.

The oracle stores every activation and lets autograd do the rest; one test here holds the oracle itself against a loop
written by hand.

python -m pytest tests/integration/test_engine_features.py
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import autorev
from autorev.engine.chain import running
from autorev.errors import AutorevError, ConversionError, ReconstructionError
from tests import handwritten as hand

TOKENS = torch.arange(16).reshape(2, 8)
OTHER_TOKENS = TOKENS + 20
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """How a model is converted, and how near to the oracle it then has to be."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5


EXACT = Setting("momentum-exact")
EXACT_LEAPFROG = Setting("leapfrog-exact", {"coupling": "leapfrog"})
DOUBLE = Setting("leapfrog-float64", {"coupling": "leapfrog", "arithmetic": "float"}, torch.float64, 1e-9)

each_setting = pytest.mark.parametrize("setting", [EXACT, DOUBLE], ids=lambda s: s.name)


def converted(setting: Setting, make: Callable[[], nn.Module], *args: Any, **options: Any) -> Any:
    """A model from fixed random numbers, all of whose blocks are converted."""
    torch.manual_seed(0)
    model = make().to(setting.dtype)
    autorev.convert(model, example_args=args or (TOKENS,), **{**setting.options, **options})
    return model


def mean_square(output: Any) -> torch.Tensor:
    """A loss of whatever a model returned."""
    return sum(t.double().square().mean() for t in tree_leaves(output) if isinstance(t, torch.Tensor))


def gradients_of(model: nn.Module) -> Results:
    """By parameter name, where there is one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, *args: Any, **kwargs: Any) -> Results:
    """The loss and every gradient of one training step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = mean_square(model(*(args or (TOKENS,)), **kwargs))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def oracle(model: nn.Module, run: Callable[[], Results]) -> Results:
    """What `run` returns where nothing is reconstructed; buffers are as before."""
    before = copy.deepcopy(dict(model.named_buffers()))
    with running("oracle"):
        results = run()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return results


def assert_same(actual: Results, expected: Results, tolerance: float) -> None:
    """Relative errors, in norm; tensors that are next to nothing beside the others are measured on those."""
    assert actual.keys() == expected.keys()
    largest = max(float(t.double().norm()) for t in expected.values())
    assert largest > 0
    for name, right in expected.items():
        error = float((actual[name].double() - right.double()).norm())
        assert error <= tolerance * max(float(right.double().norm()), 0.01 * largest), (name, error, right.norm())


def assert_like_oracle(model: nn.Module, setting: Setting, run: Callable[[], Results] | None = None) -> Results:
    """`run`, by default one step, gives the oracle's results; returns them."""
    run = run or (lambda: step(model))
    expected = oracle(model, run)
    actual = run()
    assert_same(actual, expected, setting.tolerance)
    return actual


def assert_right_or_refused(model: nn.Module, setting: Setting, run: Callable[[], Results] | None = None) -> None:
    """Never silently wrong."""
    run = run or (lambda: step(model))
    expected = oracle(model, run)
    try:
        actual = run()
    except AutorevError:
        return
    assert_same(actual, expected, setting.tolerance)


class Storages(TorchDispatchMode):
    """Every storage that an operator makes while this is active: how much of it is still alive?"""

    def __init__(self) -> None:
        super().__init__()
        # A weak reference keeps the address taken, so that no two storages are one here.
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.given: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._storages((args, kwargs)):
            if storage._cdata not in self.made:
                self.given.setdefault(storage._cdata, StorageWeakRef(storage))
        returned = func(*args, **(kwargs or {}))
        for storage in self._storages(returned):
            if storage._cdata not in self.given:
                self.made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return returned

    def _storages(self, structure: Any) -> list[torch.UntypedStorage]:
        return [t.untyped_storage() for t in tree_leaves(structure) if isinstance(t, torch.Tensor)]

    def alive(self) -> list[int]:
        """Bytes of each storage that is still there."""
        return [nbytes for reference, nbytes in self.made.values() if not reference.expired()]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """What only the garbage collector would free counts as alive."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def small(depth: int = 4, block: Callable[[], nn.Module] | None = None) -> hand.Stack:
    """A stack of hand-written blocks."""
    return hand.Stack(*((block or hand.Block)() for _ in range(depth)))


class Mlp(hand.Parts):
    """One residual add, of a branch without attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm1(x))


class Chain(nn.Module):
    """Blocks whose input is the model's own."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def states(setting: Setting, seed: int = 5) -> torch.Tensor:
    """An input of such a chain."""
    return torch.randn(2, 8, hand.WIDTH, generator=torch.Generator().manual_seed(seed)).to(setting.dtype)


# -- the oracle itself

BY_HAND: dict[str, tuple[dict[str, Any], float, tuple[float, ...]]] = {
    "leapfrog": ({"coupling": "leapfrog"}, 1.0, (1, 1, 1, 1)),
    "midpoint": ({"coupling": "midpoint"}, -1.0, (2, 2, 2, 2)),
    "momentum": ({}, 1 / 8, (1, 15 / 16, 15 / 16, 1)),
    "momentum-other": ({"gamma": -0.375, "c": 0.5}, -0.375, (0.5, 0.5, 0.5, 0.5)),
}


def by_hand(model: hand.Stack, gamma: float, c: tuple[float, ...]) -> Results:
    """One step of the coupling, written as a loop in ordinary autograd."""
    model.zero_grad(set_to_none=True)
    with running("original"):
        h = model.embedding(TOKENS)
        v = torch.zeros_like(h)
        for block, factor in zip(model.blocks, c, strict=True):
            v = gamma * v + factor * (block(h) - h)
            h = h + v
        loss = mean_square(model.head(model.norm(h)))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


def by_hand_in_pieces(model: hand.Stack, coupling: str) -> Results:
    """The same, with a step for each half of a block, for one stream and for two."""
    model.zero_grad(set_to_none=True)
    halves = [
        half
        for block in model.blocks
        for half in (
            lambda x, block=block: block.attention(block.norm1(x)),
            lambda x, block=block: block.mlp(block.norm2(x)),
        )
    ]
    first, second = model.embedding(TOKENS), model.embedding(TOKENS)
    velocity = torch.zeros_like(first)
    for half in halves:
        if coupling == "leapfrog":
            velocity = velocity + half(first)
            first = first + velocity
        else:
            first, second = second + half(first), first
    loss = mean_square(model.head(model.norm((first + second) / 2 if coupling == "revnet" else first)))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


@pytest.mark.parametrize("coupling", ["leapfrog", "hamiltonian", "revnet"])
@pytest.mark.parametrize("keep_last", [0, 1])
def test_float64_training_in_pieces_is_the_loop_written_by_hand(coupling: str, keep_last: int) -> None:
    """With a step for each residual add, one stream or two, reversible and oracle are ordinary autograd's loop."""
    options = {"coupling": coupling, "arithmetic": "float", "granularity": "sublayer"}
    model = converted(Setting(coupling, options, torch.float64, 1e-9), small, keep_last=keep_last)
    expected = by_hand_in_pieces(model, coupling)

    assert_same(oracle(model, lambda: step(model)), expected, 1e-9)
    assert_same(step(model), expected, 1e-9)


@pytest.mark.parametrize("coupling", ["momentum", "leapfrog", "midpoint", "hamiltonian", "revnet"])
@pytest.mark.parametrize("block", [hand.Block, hand.Dropping, hand.Rescaled])
def test_exact_training_in_pieces(block: type[nn.Module], coupling: str) -> None:
    """With a step for each residual add, in exact arithmetic, with dropout, gates and scales."""
    options = {"coupling": coupling, "granularity": "sublayer"}
    model = converted(Setting(coupling, options), lambda: small(block=block))
    assert_like_oracle(model, EXACT)
    assert autorev.drift(model) == {"blocks": 0.0}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("keep_last", [0, 1])
def test_float64_training_is_the_loop_written_by_hand(name: str, keep_last: int) -> None:
    """Reversible and oracle both give the gradients of `v = gamma v + c f(h); h = h + v` under ordinary autograd."""
    options, gamma, c = BY_HAND[name]
    setting = Setting(name, {**options, "arithmetic": "float"}, torch.float64, 1e-9)
    model = converted(setting, small, keep_last=keep_last)
    expected = by_hand(model, gamma, c)

    assert_same(oracle(model, lambda: step(model)), expected, 1e-9)
    assert_same(step(model), expected, 1e-9)


@pytest.mark.parametrize("name", BY_HAND)
def test_exact_training_is_the_loop_written_by_hand_up_to_the_grid(name: str) -> None:
    """On the grid the loss and the gradients differ by as much as float32 rounding would make them."""
    options, gamma, c = BY_HAND[name]
    model = converted(Setting(name, options), small)
    expected = by_hand(model.double(), gamma, c)
    model.float()

    assert_same(step(model), expected, 1e-4)
    assert autorev.drift(model) == {"blocks": 0.0}


# -- random numbers, modes and precisions


@each_setting
def test_dropout_and_drop_path_masks_are_drawn_once(setting: Setting) -> None:
    """The second run of a branch sees the first one's masks, and the user's random stream goes on as in the plain
    model."""
    plain = small(block=hand.Dropping).to(setting.dtype)
    model = converted(setting, lambda: small(block=hand.Dropping))
    assert_like_oracle(model, setting)

    step(model)
    after = torch.rand(4)
    step(plain)

    assert torch.equal(torch.rand(4), after)


def test_random_numbers_drawn_between_forward_and_backward_do_not_matter() -> None:
    """The masks are those of the forward pass, whatever the user drew since, and the user's stream is not moved."""
    model = converted(EXACT, lambda: small(block=hand.Dropping))

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = mean_square(model(TOKENS))
        drawn = torch.rand(3)
        torch.manual_seed(7)
        loss.backward()
        return {"loss": loss.detach(), "drawn": drawn, "next": torch.rand(3), **gradients_of(model)}

    assert_like_oracle(model, EXACT, run)


@each_setting
def test_backward_in_eval_mode(setting: Setting) -> None:
    """Gradients of a model in eval mode, where dropout is off."""
    model = converted(setting, lambda: small(block=hand.Dropping)).eval()
    first = assert_like_oracle(model, setting)

    assert_same(step(model), first, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("setting", [EXACT, EXACT_LEAPFROG], ids=lambda s: s.name)
def test_autocast(setting: Setting, dtype: torch.dtype) -> None:
    """Branches run again in the precision of the forward pass, though backward is outside of the context."""
    model = converted(setting, small)

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype):
            loss = mean_square(model(TOKENS))
        loss.backward()
        return {"loss": loss.detach(), **gradients_of(model)}

    expected = oracle(model, run)
    assert_same(run(), expected, 1e-2)
    assert autorev.drift(model) == {"blocks": 0.0}
    full = step(model)
    assert any(not torch.equal(full[name], gradient) for name, gradient in expected.items())


class PartlyAutocast(hand.Stack):
    """One of its blocks runs in full precision."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            with torch.autocast("cpu", torch.bfloat16, enabled=number != 1):
                x = block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("setting", [EXACT, EXACT_LEAPFROG], ids=lambda s: s.name)
def test_every_block_has_the_autocast_that_it_had(setting: Setting) -> None:
    """A block in full precision among others in half: also when backward goes through the chain twice."""
    model = converted(setting, lambda: PartlyAutocast(*(hand.Block() for _ in range(4))))

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        loss = mean_square(model(TOKENS))
        loss.backward(retain_graph=True)
        loss.backward()
        return gradients_of(model)

    expected = oracle(model, run)
    assert_same(run(), expected, 1e-2)
    assert autorev.drift(model) == {"blocks": 0.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"coupling": "leapfrog"}, {"coupling": "leapfrog", "arithmetic": "float"}])
def test_half_precision_weights(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Weights, stream and gradients in half precision; the chain's own state is wider."""
    setting = Setting("half", options, dtype, 3e-2)
    model = converted(setting, small)
    results = assert_like_oracle(model, setting)

    assert results["blocks.0.mlp.up.weight"].dtype is dtype
    assert autorev.drift(model)["blocks"] == 0 or options.get("arithmetic") == "float"


class Images(nn.Module):
    """One stage of a pre-activation ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.stage = nn.Sequential(*(hand.PreActivation(8, 8) for _ in range(4)))
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(self.stem(images)).mean((2, 3)))


@each_setting
def test_batch_norm_statistics_are_updated_once_per_step(setting: Setting) -> None:
    """Running the branch again normalises with the batch once more, and leaves the running averages alone."""
    images = IMAGES.to(setting.dtype)
    model = converted(setting, Images, images)

    def run() -> Results:
        step(model, images)
        return {**step(model, images), **{name: buffer.clone() for name, buffer in model.named_buffers()}}

    results = assert_like_oracle(model, setting, run)
    counts = [int(t) for name, t in results.items() if name.endswith("num_batches_tracked")]

    assert counts == [2] * 8


def test_batch_norm_statistics_are_those_of_the_plain_model() -> None:
    """With a coupling that hardly differs from the plain network, so do the running statistics."""
    torch.manual_seed(0)
    plain = Images()
    model = converted(EXACT, Images, IMAGES, gamma=1 / 256)
    step(plain, IMAGES)
    step(model, IMAGES)
    for (name, expected), (_, buffer) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=0.02, atol=0.02, msg=name)


# -- arguments and results


class Crossing(hand.Parts):
    """Reads encoder states by keyword, and a bias that belongs to the model."""

    def forward(self, x: torch.Tensor, *, memory: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        h = self.mlp(self.norm1(x) * memory.mean(1, keepdim=True))
        return x + (h if bias is None else h * bias)


class Decoder(hand.Stack):
    """Hands encoder states and a learned bias to all blocks."""

    def __init__(self) -> None:
        super().__init__(*(Crossing() for _ in range(4)))
        self.encoder = nn.Linear(hand.WIDTH, hand.WIDTH)
        self.bias = nn.Parameter(torch.randn(hand.WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        memory = self.encoder(x.flip(0))
        for block in self.blocks:
            x = block(x, memory=memory, bias=self.bias)
        return self.head(self.norm(x))


@each_setting
def test_tensor_keywords_get_their_gradients(setting: Setting) -> None:
    """Encoder states and a learned bias that all blocks read are trained, frozen encoder or not."""
    model = converted(setting, Decoder)
    results = assert_like_oracle(model, setting)
    assert results["bias"].any()
    assert results["encoder.weight"].any()

    model.encoder.requires_grad_(False)
    model.embedding.requires_grad_(False)
    assert_like_oracle(model, setting)


class Rotating(hand.Parts):
    """Is given a tuple of tensors, and None for a mask."""

    def forward(
        self, x: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert mask is None
        cosine, sine = positions
        h = self.norm1(x)
        return x + self.mlp(h * cosine + h.roll(1, -1) * sine)


class Rotary(hand.Stack):
    """Makes them."""

    def __init__(self) -> None:
        super().__init__(*(Rotating() for _ in range(4)))
        self.frequency = nn.Parameter(torch.linspace(0, 1, hand.WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        angles = torch.arange(tokens.shape[1], dtype=x.dtype)[:, None] * self.frequency
        for block in self.blocks:
            x = block(x, (angles.cos(), angles.sin()), None)
        return self.head(self.norm(x))


@each_setting
def test_tuples_and_none_as_arguments(setting: Setting) -> None:
    """A block is handed what it was called with, and tensors inside of a tuple get gradients."""
    model = converted(setting, Rotary)
    assert assert_like_oracle(model, setting)["frequency"].any()


class OneTuple(hand.Block):
    """Returns a tuple of one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (super().forward(x),)


class Named(NamedTuple):
    """What `WithNamed` returns."""

    score: torch.Tensor
    hidden: torch.Tensor


class WithNamed(hand.Parts):
    """Returns its stream in second place."""

    def forward(self, x: torch.Tensor) -> Named:
        h = self.mlp(self.norm1(x))
        return Named(h.mean((1, 2)), x + h)


class WithDict(hand.Parts):
    """Returns its stream under a key."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.mlp(self.norm1(x))
        return {"hidden": x + h, "score": h.mean()}


class Unpacking(hand.Stack):
    """Takes apart what its blocks return, and returns the side values too."""

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.embedding(tokens)
        scores = []
        for block in self.blocks:
            out = block(x)
            if isinstance(out, torch.Tensor):
                x = out
                continue
            if isinstance(out, dict):
                out = hand.BlockOutput(**out)
            x = out.hidden if hasattr(out, "hidden") else out[0]
            if hasattr(out, "score"):
                scores.append(out.score)
        return self.head(self.norm(x)), *scores


@each_setting
@pytest.mark.parametrize("block", [hand.Block, OneTuple, hand.WithTuple, hand.WithDataclass, WithNamed, WithDict])
def test_whatever_a_block_returns(block: type[nn.Module], setting: Setting) -> None:
    """Tensors, tuples, dataclasses, named tuples and dicts come back as they were, side values with their gradients."""
    model = converted(setting, lambda: Unpacking(*(block() for _ in range(4))))
    inner = model.blocks[1]
    with running("original"):
        plain = inner(states(setting))
    assert type(inner(states(setting))) is type(plain)

    assert_like_oracle(model, setting)


class ReadingATensor(hand.Parts):
    """Reads a trained tensor that is nobody's parameter."""

    reached: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm1(x)) * type(self).reached


@each_setting
def test_a_tensor_reached_by_closure_gets_its_gradient(setting: Setting) -> None:
    """A leaf, and a tensor with a history of its own, that no argument holds."""
    leaf = torch.linspace(0.5, 1, hand.WIDTH, dtype=setting.dtype).requires_grad_()
    ReadingATensor.reached = leaf
    model = converted(setting, lambda: small(block=ReadingATensor))

    def run() -> Results:
        leaf.grad = None
        ReadingATensor.reached = leaf * 2
        results = step(model)
        assert leaf.grad is not None
        return {**results, "leaf": leaf.grad.clone()}

    assert assert_like_oracle(model, setting, run)["leaf"].any()


# -- what is trained

FROZEN: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding.",),
    "some-of-a-block": ("blocks.1.norm", "blocks.2.mlp.up", "blocks.3.attention.out.bias"),
    "one-block": ("blocks.1.",),
    "last-block": ("blocks.3.",),
    "lower-half": ("embedding.", "blocks.0.", "blocks.1."),
    "lower-half-not-the-embedding": ("blocks.0.", "blocks.1."),
    "upper-half": ("blocks.2.", "blocks.3."),
    "all-blocks": ("blocks.",),
    "all-but-the-head": ("embedding.", "blocks.", "norm."),
    "all-but-one-block": ("embedding.", "blocks.0.", "blocks.1.", "blocks.3.", "norm.", "head."),
}


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parameters(name: str, keep_last: int, setting: Setting) -> None:
    """Whatever is frozen, the rest has the gradients it should have, and what is frozen has none."""
    model = converted(setting, small, keep_last=keep_last)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(not path.startswith(FROZEN[name]))
    results = assert_like_oracle(model, setting)

    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == results.keys() - {"loss"}


def test_frozen_lower_blocks_are_not_run_again() -> None:
    """With nothing to train below block 2, blocks 0 and 1 run once a step, the others twice."""
    model = converted(EXACT, small, keep_last=0)
    model.embedding.requires_grad_(False)
    model.blocks[:2].requires_grad_(False)
    runs = [0] * 4
    for number, block in enumerate(model.blocks):
        block.norm1.register_forward_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    step(model)

    assert runs == [1, 1, 2, 2]


def alternating_blocks() -> hand.Stack:
    """Two blocks in turn, three times."""
    a, b = hand.Block(), hand.Block()
    return hand.Stack(a, b, a, b, a, b)


def one_block() -> hand.Stack:
    """One block, five times."""
    return hand.Stack(*[hand.Block()] * 5)


def tied() -> hand.Stack:
    """Blocks that share their MLP, and a head that is the embedding."""
    model = small()
    for block in model.blocks[1:]:
        block.mlp = model.blocks[0].mlp
    model.head.weight = model.embedding.weight
    return model


@each_setting
@pytest.mark.parametrize("make", [alternating_blocks, one_block, tied])
@pytest.mark.parametrize("keep_last", [0, 2])
def test_shared_weights(make: Callable[[], nn.Module], keep_last: int, setting: Setting) -> None:
    """A module used several times, and parameters in several modules, collect the gradients of all their uses."""
    model = converted(setting, make, keep_last=keep_last)
    assert_like_oracle(model, setting)


# -- backward, in every way that autograd offers


@each_setting
def test_gradient_accumulation(setting: Setting) -> None:
    """Two batches, one after the other, add up."""
    model = converted(setting, small)

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        for tokens in (TOKENS, OTHER_TOKENS):
            mean_square(model(tokens)).backward()
        return gradients_of(model)

    assert_like_oracle(model, setting, run)


@each_setting
def test_two_forwards_before_one_backward(setting: Setting) -> None:
    """Each forward has a state of its own, with random numbers of its own."""
    model = converted(setting, lambda: small(block=hand.Dropping))

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        first, second = model(TOKENS), model(OTHER_TOKENS)
        (mean_square(first) + 3 * mean_square(second)).backward()
        return gradients_of(model)

    assert_like_oracle(model, setting, run)


@each_setting
def test_two_forwards_then_their_backwards_in_the_other_order(setting: Setting) -> None:
    """Backward of the first forward after that of the second, and the other way round."""
    model = converted(setting, lambda: small(block=hand.Dropping))

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        losses = [mean_square(model(tokens)) for tokens in (TOKENS, OTHER_TOKENS, TOKENS)]
        for index in (1, 0, 2):
            (losses[index] * (index + 1)).backward()
        return gradients_of(model)

    assert_like_oracle(model, setting, run)


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1, 4])
def test_retain_graph(keep_last: int, setting: Setting) -> None:
    """Backward three times through one graph gives three times the gradient."""
    model = converted(setting, lambda: small(block=hand.Dropping), keep_last=keep_last)

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = mean_square(model(TOKENS))
        loss.backward(retain_graph=True)
        once = gradients_of(model)
        loss.backward(retain_graph=True)
        loss.backward()
        results = gradients_of(model)
        assert_same({name: g / 3 for name, g in results.items()}, once, setting.tolerance)
        return results

    assert_like_oracle(model, setting, run)


@each_setting
@pytest.mark.parametrize("upper_first", [False, True])
def test_two_losses_from_one_forward(upper_first: bool, setting: Setting) -> None:
    """One loss on the output and one on a state in the middle, each with a backward of its own, in either order."""
    model = converted(setting, lambda: hand.Collecting(*(hand.Dropping() for _ in range(5))))

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        outputs = model(TOKENS)
        losses = [mean_square(outputs[2]), mean_square(outputs[5]) * 3]
        for loss in reversed(losses) if upper_first else losses:
            loss.backward(retain_graph=True)
        return gradients_of(model)

    assert_like_oracle(model, setting, run)


@each_setting
def test_autograd_grad(setting: Setting) -> None:
    """`torch.autograd.grad` of all parameters, and of the embedding's output alone."""
    model = converted(setting, small)
    kept: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda _, __, output: kept.append(output))

    def run() -> Results:
        kept.clear()
        loss = mean_square(model(TOKENS))
        (entered,) = torch.autograd.grad(loss, kept, retain_graph=True)
        names, parameters = zip(*model.named_parameters(), strict=True)
        return {"entered": entered, **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}

    assert_like_oracle(model, setting, run)


@each_setting
@pytest.mark.parametrize("number", [0, 2, 3])
def test_backward_for_some_inputs_only(number: int, setting: Setting) -> None:
    """`backward(inputs=...)` fills these and no others, and a whole backward can follow."""
    model = converted(setting, small)

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        loss = mean_square(model(TOKENS))
        loss.backward(inputs=list(model.blocks[number].mlp.parameters()), retain_graph=True)
        some = gradients_of(model)
        assert len(some) == 4
        loss.backward()
        return {**{f"some.{name}": g for name, g in some.items()}, **gradients_of(model)}

    assert_like_oracle(model, setting, run)


@pytest.mark.parametrize("setting", [EXACT, EXACT_LEAPFROG, DOUBLE], ids=lambda s: s.name)
@pytest.mark.parametrize("keep_last", [0, 1])
def test_double_backward(keep_last: int, setting: Setting) -> None:
    """Gradients of a gradient penalty (`create_graph=True`)."""
    model = converted(setting, lambda: small(block=Mlp), keep_last=keep_last)

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        loss = mean_square(model(TOKENS))
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
        (loss + sum(g.square().sum() for g in first if g is not None)).backward()
        return gradients_of(model)

    assert_like_oracle(model, setting, run)


@each_setting
def test_a_graph_is_kept_by_create_graph_and_used_again(setting: Setting) -> None:
    """Two second-order backwards through the same first-order graph agree."""
    model = converted(setting, lambda: small(block=Mlp))

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        loss = mean_square(model(TOKENS))
        weight = model.blocks[1].mlp.up.weight
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        first.square().sum().backward(retain_graph=True)
        once = gradients_of(model)
        model.zero_grad(set_to_none=True)
        first.square().sum().backward()
        assert_same(gradients_of(model), once, setting.tolerance)
        return once

    assert_like_oracle(model, setting, run)


# -- hooks


@each_setting
def test_parameter_hooks(setting: Setting) -> None:
    """A hook on a parameter sees its whole gradient once, and may change it."""
    model = converted(setting, small)
    seen: list[torch.Tensor] = []

    def halve(grad: torch.Tensor) -> torch.Tensor:
        seen.append(grad)
        return grad / 2

    full = step(model)
    handle = model.blocks[1].mlp.up.weight.register_hook(halve)
    results = step(model)
    assert len(seen) == 1
    assert_same({"up": results["blocks.1.mlp.up.weight"] * 2}, {"up": full["blocks.1.mlp.up.weight"]}, 1e-6)
    assert_like_oracle(model, setting)
    handle.remove()


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1])
def test_an_optimiser_inside_backward(keep_last: int, setting: Setting) -> None:
    """SGD that steps each parameter as soon as its gradient is there, for three steps."""
    model = converted(setting, lambda: small(block=hand.Dropping), keep_last=keep_last)
    start = copy.deepcopy(model.state_dict())

    def sgd(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(sgd)

    def run() -> Results:
        model.load_state_dict(start)
        for _ in range(3):
            step(model)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    assert_like_oracle(model, setting, run)


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1])
def test_backward_hooks_of_a_block_do_not_break_the_chain(keep_last: int, setting: Setting) -> None:
    """A full backward hook puts alias tensors between the blocks: the loss stays what it is without hooks, the
    gradients are right, and the hook sees the oracle's."""
    model = converted(setting, small, keep_last=keep_last)
    without = step(model)
    seen: Results = {}
    for number, block in enumerate(model.blocks):
        block.register_full_backward_hook(
            lambda _, grads_in, grads_out, n=number: seen.update({f"in{n}": grads_in[0], f"out{n}": grads_out[0]})
        )
        block.register_full_backward_pre_hook(lambda _, grads, n=number: seen.update({f"pre{n}": grads[0]}))

    def run() -> Results:
        seen.clear()
        results = step(model)
        return {**results, **seen}

    with_hooks = assert_like_oracle(model, setting, run)

    assert len(seen) == 12
    assert torch.equal(with_hooks["loss"], without["loss"])
    assert_same({name: with_hooks[name] for name in without}, without, setting.tolerance)


@each_setting
def test_forward_hooks_of_a_block_run_once_a_step(setting: Setting) -> None:
    """Hooks see the stream as the model hands it on, and are not called again when a branch is."""
    model = converted(setting, small)
    without = step(model)
    calls: list[str] = []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    model.blocks[1].register_forward_hook(lambda *_: calls.append("after"))
    model.blocks[2].register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
    results = assert_like_oracle(model, setting)

    assert calls == ["before", "after"] * 2
    assert_same(results, without, setting.tolerance)


# -- what the model's own loop may do


@each_setting
@pytest.mark.parametrize("keep_last", [0, 2])
def test_states_in_the_middle_are_part_of_the_loss(keep_last: int, setting: Setting) -> None:
    """All states are collected, and all have a gradient of their own."""
    model = converted(setting, lambda: hand.Collecting(*(hand.Block() for _ in range(5))), keep_last=keep_last)
    assert_like_oracle(model, setting)


@each_setting
def test_a_head_on_every_state(setting: Setting) -> None:
    """Deep supervision."""
    model = converted(setting, lambda: hand.DeeplySupervised(*(hand.Block() for _ in range(4))))
    assert_like_oracle(model, setting)


class Flexible(hand.Stack):
    """What its loop does is chosen from outside, after the conversion."""

    skipped: tuple[int, ...] = ()
    between: Any = None
    depth = 99

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        seen = []
        for number, block in enumerate(self.blocks[: self.depth]):
            if number not in self.skipped:
                x = block(x)
                seen.append(x)
                if self.between is not None:
                    x = self.between(number, x, seen)
        return self.head(self.norm(x))


def flexible() -> Flexible:
    """Five blocks."""
    return Flexible(*(hand.Block() for _ in range(5)))


@each_setting
@pytest.mark.parametrize("skipped", [(0,), (2,), (4,), (1, 3), (0, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_layer_drop(skipped: tuple[int, ...], setting: Setting) -> None:
    """Any of the blocks may be left out of a step."""
    model = converted(setting, flexible)
    model.skipped = skipped
    assert_like_oracle(model, setting)


def test_layer_drop_by_random_numbers() -> None:
    """A loop that skips by torch's generator, and one that skips by Python's, over several steps."""
    for make in (hand.Skipping, hand.SkippingInPython):
        model = converted(EXACT, lambda make=make: make(*(hand.Block() for _ in range(6))))

        def run(model: nn.Module = model) -> Results:
            model.zero_grad(set_to_none=True)
            random.seed(3)
            torch.manual_seed(3)
            for _ in range(4):
                mean_square(model(TOKENS)).backward()
            return gradients_of(model)

        assert_like_oracle(model, EXACT, run)


@each_setting
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_early_exit(depth: int, setting: Setting) -> None:
    """The last blocks are not reached."""
    model = converted(setting, flexible)
    model.depth = depth
    results = assert_like_oracle(model, setting)

    assert not any(name.startswith(f"blocks.{depth}") for name in results)


def add_the_first(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    """A long skip from the first block to behind the fourth."""
    return x + seen[0] if number == 3 else x


def add_the_first_at_the_end(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    """A long skip to the head."""
    return x + seen[0] if number == 4 else x


def go_back_to_the_second(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    """The last block reads what the third did."""
    return seen[1] if number == 3 else x


@each_setting
@pytest.mark.parametrize("between", [add_the_first, add_the_first_at_the_end])
def test_a_long_skip(between: Callable[..., torch.Tensor], setting: Setting) -> None:
    """An activation that is read again later, in the loop or behind it."""
    model = converted(setting, flexible)
    model.between = between
    assert_like_oracle(model, setting)


@each_setting
def test_a_state_with_two_readers(setting: Setting) -> None:
    """A state that two blocks read: training, inference and oracle compute the same, and the gradients are right."""
    model = converted(setting, flexible)
    model.between = go_back_to_the_second
    results = step(model)
    with torch.no_grad():
        assert_same({"loss": mean_square(model(TOKENS))}, {"loss": results["loss"]}, setting.tolerance)
    assert_same(results, oracle(model, lambda: step(model)), setting.tolerance)


INPLACE: dict[str, Callable[[torch.Tensor], Any]] = {
    "mul_": lambda x: x.mul_(0.5),
    "add_": lambda x: x.add_(torch.linspace(-1, 1, hand.WIDTH, dtype=x.dtype)),
    "setitem": lambda x: x.__setitem__((slice(None), 0), 0),
    "masked_fill_": lambda x: x.masked_fill_(x > 1, 0),
    "alias": lambda x: x.detach().mul_(0.5),
}


@each_setting
@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("name", INPLACE)
def test_writing_to_a_state_between_blocks_is_right_or_refused(name: str, at: int, setting: Setting) -> None:
    """An in-place operation on a block's output never makes a wrong gradient."""
    model = converted(setting, flexible)

    def between(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        if number == at:
            INPLACE[name](x)
        return x

    model.between = between
    assert_right_or_refused(model, setting)


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("name", ["mul_", "add_", "setitem", "masked_fill_"])
def test_writing_to_a_state_between_blocks_is_right_in_exact_arithmetic(name: str, at: int) -> None:
    """There the chain's state is not the tensor that the model was given."""
    model = converted(EXACT, flexible)

    def between(number: int, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        if number == at:
            INPLACE[name](x)
        return x

    model.between = between
    assert_like_oracle(model, EXACT)


@each_setting
def test_a_detached_state_cuts_the_gradient(setting: Setting) -> None:
    """`x.detach()` between two blocks stops the gradient there; what is below gets none."""
    model = converted(setting, flexible)
    model.between = lambda number, x, seen: x.detach() if number == 2 else x
    results = assert_like_oracle(model, setting)

    assert "blocks.3.norm1.weight" in results
    assert "blocks.2.norm1.weight" not in results


@each_setting
def test_the_callers_tensors_are_untouched(setting: Setting) -> None:
    """Input, mask and states that the caller holds are bit-identical after a step, and so is the output."""
    model = converted(setting, lambda: Chain(*(hand.Block() for _ in range(4))), states(setting))
    x = states(setting, 7).requires_grad_()
    before = x.detach().clone()
    out = model(x)
    returned = out.detach().clone()
    mean_square(out).backward()

    assert torch.equal(x, before)
    assert torch.equal(out, returned)
    assert x.grad is not None
    assert x.grad.any()


class AddingInPlace(hand.Parts):
    """Writes to its argument, which its branch has not saved: so it trains in plain PyTorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.mlp(self.norm1(torch.tanh(x)))
        return x


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1])
def test_blocks_that_add_in_place(keep_last: int, setting: Setting) -> None:
    """`x += f(x)` inside a block is a step like any other."""
    model = converted(setting, lambda: small(block=AddingInPlace), keep_last=keep_last)
    assert_like_oracle(model, setting)


# -- lifetimes


class WithBias(hand.Parts):
    """The first block makes a bias that the others are given: T5's position bias."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm1(x)
        bias = self.mlp(h).mean(0, keepdim=True) if bias is None else bias
        return x + self.attention(h) * bias, bias


class HandingOn(hand.Stack):
    """Hands the bias from block to block."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, bias = self.embedding(tokens), None
        for block in self.blocks:
            x, bias = block(x, bias)
        return self.head(self.norm(x))


LIVES: dict[str, Callable[[], nn.Module]] = {
    "plain": small,
    "dropout": lambda: small(block=hand.Dropping),
    "shared": one_block,
    "tuples": lambda: Unpacking(*(hand.WithDataclass() for _ in range(4))),
    "position-bias": lambda: HandingOn(*(WithBias() for _ in range(4))),
    "collecting": lambda: hand.Collecting(*(hand.Block() for _ in range(4))),
    "cross-attention": Decoder,
}


@each_setting
@pytest.mark.parametrize("name", LIVES)
@pytest.mark.parametrize("backward", [True, False], ids=["step", "forward-only"])
def test_nothing_stays_alive_after_a_step(name: str, backward: bool, setting: Setting) -> None:
    """After a step, or a forward pass whose backward never runs, no tensor is left, without the garbage collector's
    help."""
    model = converted(setting, LIVES[name])
    with no_collection(), Storages() as storages:
        output = model(TOKENS)
        loss = mean_square(output)
        if backward:
            loss.backward()
            model.zero_grad(set_to_none=True)
        assert storages.alive()
        del output, loss

        assert storages.alive() == []


@each_setting
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("exit_at", [1, 3, 4])
def test_nothing_stays_alive_after_an_early_exit(exit_at: int, grad: bool, setting: Setting) -> None:
    """Where the chain's last block is not reached, no state waits for it."""
    model = converted(setting, flexible)
    model.depth = exit_at
    with no_collection(), Storages() as storages:
        with torch.set_grad_enabled(grad):
            model(TOKENS)

        assert storages.alive() == []


@each_setting
def test_nothing_stays_alive_while_a_loss_is_kept(setting: Setting) -> None:
    """After backward, a loss that is kept for a printout holds on to no activation."""
    model = converted(setting, small)
    with no_collection(), Storages() as storages:
        loss = mean_square(model(TOKENS))
        loss.backward()
        model.zero_grad(set_to_none=True)

        assert sum(storages.alive()) <= 16


@each_setting
def test_the_position_bias_has_its_gradient(setting: Setting) -> None:
    """An output of the first block that later blocks read brings their gradients back to it."""
    model = converted(setting, LIVES["position-bias"])
    assert assert_like_oracle(model, setting)["blocks.0.mlp.up.weight"].any()


class Failing(hand.Block):
    """Raises when it is told to."""

    armed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self).armed and self.fails:
            type(self).armed -= 1
            if not type(self).armed:
                raise OverflowError("on purpose")
        return super().forward(x)

    fails = False


@each_setting
@pytest.mark.parametrize("when", [1, 2], ids=["in-forward", "in-backward"])
def test_an_exception_in_the_middle_leaves_no_trace(when: int, setting: Setting) -> None:
    """After a step that fails in a block, in forward or when the block is run again, the next one is as ever."""
    model = converted(setting, lambda: small(block=Failing), keep_last=0)
    model.blocks[2].fails = True
    expected = oracle(model, lambda: step(model))
    with no_collection(), Storages() as storages:
        Failing.armed = when
        try:
            with contextlib.suppress(OverflowError):
                step(model)
            assert Failing.armed == 0
        finally:
            Failing.armed = 0
        model.zero_grad(set_to_none=True)
        assert storages.alive() == []

    assert_same(step(model), expected, setting.tolerance)


@each_setting
def test_an_exception_in_a_hook_during_backward(setting: Setting) -> None:
    """A hook that raises leaves a chain half-way back; the next step begins anew."""
    model = converted(setting, lambda: small(block=hand.Dropping))
    expected = oracle(model, lambda: step(model))

    def fail(grad: torch.Tensor) -> None:
        raise OverflowError("on purpose")

    handle = model.blocks[1].mlp.up.weight.register_hook(fail)
    with pytest.raises(OverflowError):
        step(model)
    handle.remove()
    after = torch.get_rng_state()
    assert_same(step(model), expected, setting.tolerance)
    assert torch.get_rng_state().shape == after.shape


# -- nested chains


class Outer(nn.Module):
    """A residual block whose branch is a chain of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hand.WIDTH)
        self.inner = nn.Sequential(*(Mlp() for _ in range(3)))
        self.out = nn.Linear(hand.WIDTH, hand.WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.inner(self.norm(x)))


OUTER = [f"blocks.{i}" for i in range(3)]


@each_setting
@pytest.mark.parametrize(
    ("blocks", "expected"),
    [("blocks.?", OUTER), ("blocks.*", OUTER)],
    ids=["outer", "all"],
)
def test_patterns_choose_among_nested_chains(blocks: str, expected: list[str], setting: Setting) -> None:
    """Of a block that itself contains a chain the outer one is converted; the inner one is a model of its own."""
    torch.manual_seed(0)
    model = small(3, Outer).to(setting.dtype)
    conversion = autorev.convert(model, blocks=blocks, example_args=(TOKENS,), **setting.options)
    assert sorted(path for chain in conversion.chains for path in chain.blocks) == expected

    assert_like_oracle(model, setting)


@each_setting
@pytest.mark.parametrize("outer", [True, False], ids=["both", "inner"])
@pytest.mark.parametrize("keep_last", [0, 1])
def test_chains_inside_of_a_block(keep_last: int, outer: bool, setting: Setting) -> None:
    """The inner chains are converted as models of their own, and run again within an outer block's second run."""
    torch.manual_seed(0)
    model = small(3, Outer).to(setting.dtype)
    options = {"keep_last": keep_last, **setting.options}
    if outer:
        autorev.convert(model, example_args=(TOKENS,), **options)
    for block in model.blocks:
        autorev.convert(block.inner, example_args=(states(setting),), **options)
    assert sum("forward" in vars(module) for module in model.modules()) == 9 + 3 * outer

    assert_like_oracle(model, setting)


# -- copies and files


def roundtrip(model: nn.Module) -> nn.Module:
    """Through `torch.save`."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": roundtrip,
}


@each_setting
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_a_converted_model_of_its_own(name: str, setting: Setting) -> None:
    """The copy is reversible, runs its own blocks, and does not touch the original."""
    model = converted(setting, small)
    before = step(model)
    twin = COPIES[name](model)
    assert_same(step(twin), before, 0)
    assert autorev.drift(twin).keys() == {"blocks"}

    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        twin.blocks[1].mlp.up.weight.mul_(2)
    assert not torch.equal(assert_like_oracle(twin, setting)["loss"], before["loss"])
    assert not gradients_of(model)
    assert_same(step(model), before, 0)

    assert autorev.revert(twin) == 4
    assert "forward" in vars(model.blocks[0])
    assert_same(step(model), before, 0)


def test_a_copy_made_between_forward_and_backward() -> None:
    """A graph that is under way is the original's."""
    model = converted(EXACT, small)
    expected = step(model)
    model.zero_grad(set_to_none=True)
    loss = mean_square(model(TOKENS))
    twin = copy.deepcopy(model)
    loss.backward()

    assert_same({"loss": loss.detach(), **gradients_of(model)}, expected, 0)
    assert not gradients_of(twin)


# -- without gradients, and with other transforms


@pytest.mark.parametrize("setting", [EXACT, EXACT_LEAPFROG, DOUBLE], ids=lambda s: s.name)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_computes_what_training_does(mode: Callable[[], Any], setting: Setting) -> None:
    """The output without gradients is bit-equal to that of the training forward."""
    model = converted(setting, small)
    trained = model(TOKENS)
    with mode():
        inferred = model(TOKENS)

    assert torch.equal(inferred, trained)
    with running("original"):
        assert not torch.equal(model(TOKENS), trained)


@each_setting
@pytest.mark.parametrize("scaled", [False, True], ids=["leaves", "computed"])
def test_functional_call_with_other_parameters(scaled: bool, setting: Setting) -> None:
    """Parameters lent for one call are there again in backward, which runs when they are gone from the model."""
    model = converted(setting, small)
    torch.manual_seed(4)
    leaves = {name: torch.randn_like(p).div_(4).requires_grad_() for name, p in model.named_parameters()}

    def run() -> Results:
        for leaf in leaves.values():
            leaf.grad = None
        lent = {name: leaf * 2 if scaled else leaf for name, leaf in leaves.items()}
        loss = mean_square(torch.func.functional_call(model, lent, (TOKENS,)))
        lent.clear()
        loss.backward()
        return {"loss": loss.detach(), **{name: leaf.grad.clone() for name, leaf in leaves.items()}}

    assert_like_oracle(model, setting, run)
    assert not gradients_of(model)


def _vmap(model: nn.Module) -> Any:
    return torch.func.vmap(model)(states(EXACT)[:, None])


def _jvp(model: nn.Module) -> Any:
    return torch.func.jvp(model, (states(EXACT),), (states(EXACT),))


def _jvp_of_parameters(model: nn.Module) -> Any:
    parameters = dict(model.named_parameters())
    return torch.func.jvp(
        lambda lent: torch.func.functional_call(model, lent, (states(EXACT),)), (parameters,), (parameters,)
    )


def _func_grad(model: nn.Module) -> Any:
    return torch.func.grad(lambda x: model(x).sum())(states(EXACT))


def _func_grad_of_parameters(model: nn.Module) -> Any:
    return torch.func.grad(lambda lent: torch.func.functional_call(model, lent, (states(EXACT),)).sum())(
        dict(model.named_parameters())
    )


def _dual_input(model: nn.Module) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return model(torch.autograd.forward_ad.make_dual(states(EXACT), states(EXACT)))


def _dual_parameter(model: nn.Module, number: int = 1) -> Any:
    with torch.autograd.forward_ad.dual_level():
        weight = model.get_parameter(f"blocks.{number}.norm1.weight").detach()
        lent = {f"blocks.{number}.norm1.weight": torch.autograd.forward_ad.make_dual(weight, weight)}
        return torch.func.functional_call(model, lent, (states(EXACT),))


def _dual_parameter_of_the_last_block(model: nn.Module) -> Any:
    return _dual_parameter(model, 3)


def _dual_parameter_without_gradients(model: nn.Module) -> Any:
    with torch.no_grad():
        return _dual_parameter(model, 3)


@pytest.mark.parametrize(
    "transform",
    [
        _vmap,
        _jvp,
        _jvp_of_parameters,
        _func_grad,
        _func_grad_of_parameters,
        _dual_input,
        _dual_parameter,
        _dual_parameter_of_the_last_block,
        _dual_parameter_without_gradients,
    ],
)
@pytest.mark.parametrize("setting", [EXACT, EXACT_LEAPFROG], ids=lambda s: s.name)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own use of it in forward mode
def test_function_transforms_are_refused(transform: Callable[[nn.Module], Any], setting: Setting) -> None:
    """vmap, forward mode and torch.func.grad raise an error that names the block and the way out."""
    model = converted(setting, lambda: Chain(*(Mlp() for _ in range(4))), states(setting))
    with pytest.raises(AutorevError, match=r"blocks\..*autorev\.revert"):
        transform(model)
    step(model, states(setting))


# -- what cannot be reconstructed


def _add_one(model: Any) -> None:
    with torch.no_grad():
        model.blocks[1].mlp.up.weight.add_(1)


def _step_optimiser(model: Any) -> None:
    torch.optim.SGD(model.blocks.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", [_add_one, _step_optimiser])
@each_setting
def test_a_parameter_changed_in_place_is_an_error(change: Callable[[Any], None], setting: Setting) -> None:
    """An optimiser step between forward and backward is seen, and the message says what was changed."""
    model = converted(setting, small, keep_last=0)
    step(model)
    loss = mean_square(model(TOKENS))
    change(model)
    with pytest.raises(ReconstructionError, match=r"blocks\.\d.*changed in place between forward and backward"):
        loss.backward()
    model.zero_grad(set_to_none=True)
    assert_like_oracle(model, setting)


def test_a_parameter_changed_behind_autograds_back_is_an_error() -> None:
    """Through `.data` no version counts up; the integrity check of exact arithmetic sees it all the same."""
    model = converted(EXACT, small)
    loss = mean_square(model(TOKENS))
    model.blocks[1].mlp.up.weight.data.add_(1)
    with pytest.raises(ReconstructionError, match="not rebuilt exactly"):
        loss.backward()


def test_a_parameter_that_was_replaced_is_still_the_old_one_for_backward() -> None:
    """A new tensor in a parameter's place does not matter to a graph that is under way."""
    model = converted(EXACT, small)
    expected = step(model)
    model.zero_grad(set_to_none=True)
    old = model.blocks[1].mlp.up.weight
    loss = mean_square(model(TOKENS))
    model.blocks[1].mlp.up.weight = nn.Parameter(torch.zeros_like(old))
    loss.backward()

    assert old.grad is not None
    assert_same({"old": old.grad}, {"old": expected["blocks.1.mlp.up.weight"]}, 0)


@each_setting
def test_an_argument_changed_in_place_is_an_error(setting: Setting) -> None:
    """Encoder states that are overwritten between forward and backward are seen."""

    class Given(Chain):
        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x, memory=memory)
            return x

    memory = states(setting, 9)
    model = converted(setting, lambda: Given(*(Crossing() for _ in range(4))), states(setting), memory)
    loss = mean_square(model(states(setting), memory))
    memory.mul_(2)
    with pytest.raises(ReconstructionError, match=r"argument of blocks\.\d.*changed in place"):
        loss.backward()


@each_setting
@pytest.mark.parametrize("make", [lambda: small(block=hand.Dropping), Images], ids=["dropout", "batch-norm"])
def test_eval_mode_between_forward_and_backward(make: Callable[[], nn.Module], setting: Setting) -> None:
    """`model.eval()` after the forward pass does not change its gradients, and is still in force afterwards."""
    args = (IMAGES.to(setting.dtype),) if make is Images else (TOKENS,)
    model = converted(setting, make, *args)

    def run() -> Results:
        model.train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = mean_square(model(*args))
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
        return {"loss": loss.detach(), **gradients_of(model)}

    assert_like_oracle(model, setting, run)


class Noisy(hand.Parts):
    """Its noise comes from a generator of its own, once the test turns it on."""

    source: Callable[[], float] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = 1.0 if Noisy.source is None else Noisy.source()
        return x + self.mlp(self.norm1(x)) * factor


GENERATOR = torch.Generator().manual_seed(0)
SOURCES: dict[str, Callable[[], float]] = {
    "torch-generator": lambda: float(torch.rand([], generator=GENERATOR)),
    "python": random.random,
    "numpy": lambda: __import__("numpy").random.rand(),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("keep_last", [0, 1])
def test_noise_that_cannot_be_repeated_is_an_error_in_exact_arithmetic(name: str, keep_last: int) -> None:
    """A block that computes something else the second time is found out, or its generator is put back."""
    model = converted(EXACT, lambda: small(block=Noisy), keep_last=keep_last)
    Noisy.source = SOURCES[name]
    try:
        with pytest.raises(ReconstructionError, match="not rebuilt exactly"):
            step(model)
    finally:
        Noisy.source = None
    assert_like_oracle(model, EXACT)


def test_noise_is_an_error_below_frozen_weights_too() -> None:
    """Where backward does not reach the chain's beginning, what it did rebuild is right or refused."""
    model = converted(EXACT, small)
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    loss = mean_square(model(TOKENS))
    model.blocks[2].mlp.up.weight.data.add_(1)
    with pytest.raises(ReconstructionError):
        loss.backward()


# -- gradient checkpointing around converted modules


@each_setting
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_the_whole_model(reentrant: bool, setting: Setting) -> None:
    """`torch.utils.checkpoint` of a converted model, both kinds."""
    model = converted(setting, lambda: Chain(*(hand.Dropping() for _ in range(4))), states(setting))
    x = states(setting, 3).requires_grad_()

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        x.grad = None
        torch.manual_seed(1)
        loss = mean_square(checkpoint(model, x, use_reentrant=reentrant))
        loss.backward()
        assert x.grad is not None
        return {"loss": loss.detach(), "x": x.grad.clone(), **gradients_of(model)}

    assert_like_oracle(model, setting, run)


class CheckpointingSome(Chain):
    """Checkpoints these of its blocks."""

    checkpointed: tuple[int, ...] = ()
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            if number in self.checkpointed:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        return x


@each_setting
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("checkpointed", [(0,), (1,), (3,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("keep_last", [0, 1])
def test_checkpointing_around_one_block_is_never_silently_wrong(
    keep_last: int, checkpointed: tuple[int, ...], reentrant: bool, setting: Setting
) -> None:
    """A checkpoint between the blocks of a chain is right, or refused."""
    model = converted(
        setting, lambda: CheckpointingSome(*(hand.Block() for _ in range(4))), states(setting), keep_last=keep_last
    )
    x = states(setting, 3).requires_grad_()

    def run() -> Results:
        x.grad = None
        results = step(model, x)
        assert x.grad is not None
        return {**results, "x": x.grad.clone()}

    expected = oracle(model, run)
    model.checkpointed, model.reentrant = checkpointed, reentrant
    try:
        actual = run()
    except AutorevError:
        return
    assert_same(actual, expected, setting.tolerance)


# -- what is stored and what is computed


@each_setting
@pytest.mark.parametrize("keep_last", [0, 1, 3, 4, 9])
def test_keep_last(keep_last: int, setting: Setting) -> None:
    """Any number of blocks at the end may be stored; the gradients are the same."""
    torch.manual_seed(0)
    model = small().to(setting.dtype)
    conversion = autorev.convert(model, keep_last=keep_last, example_args=(TOKENS,), **setting.options)
    assert [chain.stored_steps for chain in conversion.chains] == [min(keep_last, 4)]

    assert_like_oracle(model, setting)


def kept_after_forward(make: Callable[[int], Any], depth: int, **options: Any) -> int:
    """Bytes of all tensors but parameters that are alive between forward and backward, the output's included."""
    x = states(EXACT).requires_grad_()
    model = make(depth)
    if options:
        autorev.convert(model, example_args=(x,), **options)
    model(x)
    with no_collection(), Storages() as storages:
        out = model(x)
        assert out.requires_grad
        return sum(storages.alive())


class Checkpointing(Chain):
    """Checkpoints every block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def chain_of(depth: int) -> Chain:
    """To be converted."""
    return Chain(*(hand.Block() for _ in range(depth)))


def checkpointing(depth: int) -> Checkpointing:
    """To compare with."""
    return Checkpointing(*(hand.Block() for _ in range(depth)))


ELEMENTS = 2 * 8 * hand.WIDTH
DEPTHS = (3, 5, 7)
SLOPES: dict[str, tuple[dict[str, Any], int]] = {
    "leapfrog": ({"coupling": "leapfrog"}, 0),
    "midpoint": ({"coupling": "midpoint"}, 0),
    "leapfrog-float": ({"coupling": "leapfrog", "arithmetic": "float"}, 0),
    "momentum-1/8": ({}, 3 * ELEMENTS // 8),
    "momentum-1/2": ({"gamma": 0.5}, ELEMENTS // 8),
    "momentum-77/256": ({"gamma": 77 / 256}, ELEMENTS),
}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("keep_last", [0, 1])
def test_memory_grows_by_the_side_bits_and_nothing_else(name: str, keep_last: int) -> None:
    """For each added block, forward leaves exactly k/8 bytes an element behind: nothing for leapfrog."""
    options, slope = SLOPES[name]
    kept = [kept_after_forward(chain_of, depth, keep_last=keep_last, **options) for depth in DEPTHS]

    assert [b - a for a, b in itertools.pairwise(kept)] == [2 * slope, 2 * slope]


def test_dropout_keeps_no_mask() -> None:
    """A second run draws its masks again; the generator's state, which no operator makes, is not counted here."""

    def dropping(depth: int) -> Chain:
        return Chain(*(hand.Dropping() for _ in range(depth)))

    kept = [kept_after_forward(dropping, depth, coupling="leapfrog") for depth in DEPTHS]

    assert [b - a for a, b in itertools.pairwise(kept)] == [0, 0]


@pytest.mark.parametrize("name", SLOPES)
def test_memory_is_below_checkpointing_from_eight_blocks_on(name: str) -> None:
    """Per-block checkpointing keeps every block's input; a reversible chain its last state and fewer bytes a block."""
    reversible = kept_after_forward(chain_of, 8, keep_last=0, **SLOPES[name][0])
    per_block = 4 * ELEMENTS - SLOPES[name][1]

    assert reversible < kept_after_forward(checkpointing, 8)
    assert per_block > 0


class Matmuls(TorchDispatchMode):
    """Counts matrix products."""

    counted = frozenset({"mm", "addmm", "bmm", "baddbmm"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.counted
        return func(*args, **(kwargs or {}))


def matmuls_of_a_step(model: nn.Module) -> int:
    """In forward and backward."""
    x = states(EXACT).requires_grad_()
    with Matmuls() as matmuls, set_checkpoint_early_stop(False):
        mean_square(model(x)).backward()
    return matmuls.count


@pytest.mark.parametrize("keep_last", [0, 1, 3, 6])
@pytest.mark.parametrize("setting", [EXACT, EXACT_LEAPFROG, Setting("float", {**DOUBLE.options})], ids=lambda s: s.name)
def test_a_step_computes_no_more_than_checkpointing(keep_last: int, setting: Setting) -> None:
    """Each block runs twice, less those that are stored; reconstruction comes with the second run for free."""
    depth = 6
    with Matmuls() as matmuls, torch.no_grad():
        hand.Block()(states(EXACT))
    model = converted(setting, lambda: chain_of(depth), states(EXACT), keep_last=keep_last)

    assert matmuls.count == 4
    assert matmuls_of_a_step(model) == matmuls_of_a_step(checkpointing(depth)) - keep_last * matmuls.count


# -- converting and reverting


def shape_of(model: nn.Module) -> list[Any]:
    """Everything about a model that conversion must not touch."""
    tree = [(name, type(module), module.training) for name, module in model.named_modules()]
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()]
    owned = [(name, id(t), t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    return [tree, hooks, owned, list(model.state_dict())]


def contents_of(model: nn.Module) -> list[dict[str, Any]]:
    """Each module's `__dict__`."""
    return [{k: (v if k == "forward" else id(v)) for k, v in vars(module).items()} for module in model.modules()]


@each_setting
def test_convert_keeps_the_model_and_revert_restores_it(setting: Setting) -> None:
    """Class, module tree, parameters, state_dict keys and random state stay; revert leaves no trace."""
    torch.manual_seed(0)
    model = small(block=hand.Dropping).to(setting.dtype)
    model.blocks[1].register_forward_hook(lambda *_: None)
    model.blocks[2].eval()
    shape, contents, plain = shape_of(model), contents_of(model), step(model)
    model.zero_grad(set_to_none=True)
    state, drawn = torch.get_rng_state(), random.getstate()

    autorev.convert(model, example_args=(TOKENS,), **setting.options)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == drawn
    assert shape_of(model) == shape
    assert not gradients_of(model)
    assert_like_oracle(model, setting)
    assert shape_of(model) == shape

    assert autorev.revert(model) == 4
    assert contents_of(model) == contents
    assert shape_of(model) == shape
    assert_same(step(model), plain, 0)
    assert autorev.revert(model) == 0


def test_converting_twice_is_an_error() -> None:
    """The message says to revert first, and the model stays converted."""
    model = converted(EXACT, small)
    with pytest.raises(ConversionError, match=r"converted already; call autorev\.revert\(model\)"):
        autorev.convert(model, example_args=(TOKENS,))
    assert_like_oracle(model, EXACT)
    autorev.revert(model)
    autorev.convert(model, coupling="leapfrog", example_args=(TOKENS,))
    assert_like_oracle(model, EXACT)


def test_a_forward_of_the_users_own_comes_back() -> None:
    """A `forward` that was assigned to a block is what runs, and what revert restores."""
    torch.manual_seed(0)
    model = small()
    own = model.blocks[1].forward
    calls: list[int] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return own(x)

    model.blocks[1].forward = forward
    autorev.convert(model, example_args=(TOKENS,), keep_last=0)
    calls.clear()
    assert_like_oracle(model, EXACT)
    assert len(calls) == 3
    autorev.revert(model)

    assert vars(model.blocks[1])["forward"] is forward


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "coupling": ({"coupling": "verlet"}, "verlet"),
    "arithmetic": ({"arithmetic": "int8"}, "'exact' or 'float'"),
    "granularity": ({"granularity": "model"}, "'block' or 'sublayer'"),
    "keep_last": ({"keep_last": -1}, "keep_last"),
    "keep_last-bool": ({"keep_last": "all"}, "keep_last"),
    "fraction_bits": ({"fraction_bits": 99}, "fraction_bits"),
    "fraction_bits-float": ({"coupling": "leapfrog", "arithmetic": "float", "fraction_bits": 9}, "fraction_bits"),
    "gamma": ({"gamma": 0.3}, "gamma = 0.3"),
    "blocks": ({"blocks": "layers.*"}, r"layers\.\*.*matches no residual block; they are blocks\.0"),
    "exclude": ({"exclude": ["blocks.9"]}, r"blocks\.9.*matches no residual block"),
    "nothing-left": ({"exclude": "blocks.*"}, "excluded"),
    "float-at-depth": ({"arithmetic": "float"}, "use arithmetic='exact'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_why_and_leaves_the_model_untouched(name: str) -> None:
    """Every argument is checked before anything is changed."""
    options, text = REFUSALS[name]
    torch.manual_seed(0)
    model = small(8)
    shape, contents, plain = shape_of(model), contents_of(model), step(model)
    model.zero_grad(set_to_none=True)
    with pytest.raises(ConversionError, match=text):
        autorev.convert(model, example_args=(TOKENS,), **options)

    assert contents_of(model) == contents
    assert shape_of(model) == shape
    assert_same(step(model), plain, 0)


def test_activations_that_are_not_finite_are_refused_and_the_model_is_untouched() -> None:
    """The probe that chooses the grid undoes the conversion when it fails."""
    torch.manual_seed(0)
    model = small()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = torch.nan
    contents = contents_of(model)
    with pytest.raises(ConversionError, match="not finite"):
        autorev.convert(model, example_args=(TOKENS,))

    assert contents_of(model) == contents


def test_a_model_without_an_example_is_refused() -> None:
    """The message says what to pass."""
    with pytest.raises(AutorevError, match="example_args"):
        autorev.convert(small())
    with pytest.raises(ConversionError, match=r"torch\.nn\.Module"):
        autorev.convert(small)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [hand.PostNorm, hand.ScaledShortcut, hand.PermutedShortcut, hand.DataDependent])
def test_models_whose_blocks_cannot_be_reversed_are_refused(block: type[nn.Module]) -> None:
    """The reason that analysis found is in the message, and the model is as it was."""
    model = small(block=block)
    contents = contents_of(model)
    with pytest.raises(ConversionError, match=r"no chain of blocks of Stack can be converted: blocks\.0: "):
        autorev.convert(model, example_args=(TOKENS,))

    assert contents_of(model) == contents


@pytest.mark.parametrize("depth", [8, 16])
def test_momentum_in_float_arithmetic_is_refused_at_depth(depth: int) -> None:
    """The error that would have grown is named, and so is the remedy, which works."""
    model = small(depth, Mlp)
    with pytest.raises(ConversionError, match=r"rounding errors of blocks.*use arithmetic='exact'.*\|gamma\| = 1"):
        autorev.convert(model, arithmetic="float", example_args=(TOKENS,))
    autorev.convert(model, arithmetic="exact", example_args=(TOKENS,))
    assert_like_oracle(model, EXACT)


@each_setting
def test_blocks_and_exclude_patterns(setting: Setting) -> None:
    """Only what matches is converted; the rest is left as it is and listed with a reason."""
    torch.manual_seed(0)
    model = small(6).to(setting.dtype)
    options = {"example_args": (TOKENS,), **setting.options}
    conversion = autorev.convert(model, blocks="blocks.[0-4]", exclude=["blocks.2"], **options)

    assert [chain.blocks for chain in conversion.chains] == [("blocks.0", "blocks.1"), ("blocks.3", "blocks.4")]
    assert {path: reason.split(":")[0] for path, reason in conversion.not_converted} == {
        "blocks.2": "excluded",
        "blocks.5": "not-asked-for",
    }
    assert ["forward" in vars(block) for block in model.blocks] == [True, True, False, True, True, False]
    assert_like_oracle(model, setting)


@each_setting
def test_every_chain_has_a_name_of_its_own(setting: Setting) -> None:
    """`drift`, `fraction_bits` and saved models know chains by name: two streams, and two stretches of one."""
    torch.manual_seed(0)
    options = {"example_args": (TOKENS,), **setting.options}
    for model, exclude in ((hand.Alternating(*(hand.Block() for _ in range(6))), None), (small(6), "blocks.2")):
        conversion = autorev.convert(model.to(setting.dtype), exclude=exclude, **options)
        names = [chain.name for chain in conversion.chains]
        assert len(names) == 2
        step(model)
        assert autorev.drift(model).keys() == set(names)
        assert len(set(names)) == 2


@each_setting
def test_two_chains_in_one_model(setting: Setting) -> None:
    """Streams that alternate between their blocks do not get into each other's way."""
    model = converted(setting, lambda: hand.Alternating(*(hand.Dropping() for _ in range(6))))
    assert_like_oracle(model, setting)


def test_gamma_and_c_by_block() -> None:
    """A dict gives each block its own numbers."""
    torch.manual_seed(0)
    model = small()
    conversion = autorev.convert(
        model, gamma={"blocks.0": 0.5, "blocks.*": -0.25}, c={"blocks.3": 2.0, "blocks.0": 0.75}, example_args=(TOKENS,)
    )

    assert conversion.chains[0].gamma == (0.5, -0.25, -0.25, -0.25)
    assert conversion.chains[0].c == (0.75, 1.125, 1.125, 2.0)
    assert conversion.chains[0].side_bits == (1, 2, 2, 2)
    assert not conversion.preserves_function
    assert_like_oracle(model, EXACT)


@pytest.mark.parametrize("coupling", ["midpoint_a", "bdia"])
def test_couplings_with_random_numbers_are_like_their_oracle(coupling: str) -> None:
    """The gammas of a call are drawn once, and are the oracle's where the generator stands where it did."""
    model = converted(Setting(coupling, {"coupling": coupling}), small)
    generator = model.blocks[0].forward.chain.generator
    start = generator.getstate()

    def run() -> Results:
        generator.setstate(start)
        return step(model)

    assert_like_oracle(model, EXACT, run)
    model.eval()
    assert_like_oracle(model, EXACT)


def test_a_chain_forgets_its_streams() -> None:
    """Nothing but the caller holds a stream that was handed on."""
    model = converted(EXACT, lambda: Chain(*(hand.Block() for _ in range(4))), states(EXACT))
    with no_collection(), torch.no_grad():
        out = model(states(EXACT))
        reference = weakref.ref(out)
        del out

        assert reference() is None
