"""Residual chains as they are written elsewhere: found, converted, verified, and the model's own function.

python -m pytest tests/integration/test_foreign.py
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

import autorev
from tests.helpers import foreign
from tests.helpers.handwritten import WIDTH, Attention, stack_of
from tests.helpers.one_step import gap, one_step

TOKENS = torch.arange(16).reshape(2, 8)
SEQUENCE = torch.linspace(-1, 1, 2 * 8 * WIDTH).reshape(2, 8, WIDTH)
VECTOR = torch.linspace(-1, 1, WIDTH)


# name -> (model, input, steps of each block by chain)
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[list[int]]]] = {
    **{
        block.__name__: (lambda block=block: stack_of(block), TOKENS, [[steps] * 3])
        for block, steps in [
            (foreign.Scripted, 2),
            (foreign.MatrixProduct, 1),
            (foreign.EverySecond, 1),
            (foreign.Chosen, 1),
            (foreign.Stacked, 1),
            (foreign.PerSequence, 1),
            (foreign.TimesOne, 2),
            (foreign.CastBack, 2),
            (foreign.Guarded, 2),
            (foreign.Windows, 2),
            (foreign.DroppingItself, 2),
            (foreign.DroppingByTorch, 2),
            (foreign.OwnGenerator, 1),
        ]
    },
    "added by modules": (foreign.AddedByModules, SEQUENCE, [[1] * 4]),
    "loop of stacks": (foreign.StackedLoop, SEQUENCE, [[1] * 4]),
    "of vectors": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), foreign.LoopOfTwo()), VECTOR, [[2] * 3]),
    "loop in a sequence": (
        lambda: nn.Sequential(nn.Embedding(50, WIDTH), foreign.LoopOfTwo(), nn.Linear(WIDTH, WIDTH)),
        TOKENS,
        [[2] * 3],
    ),
    "loops beside each other": (
        lambda: nn.Sequential(foreign.LoopOfTwo(), nn.LayerNorm(WIDTH), foreign.LoopOfTwo()),
        SEQUENCE,
        [[2] * 3, [2] * 3],
    ),
    "loops that end in a norm": (
        lambda: nn.Sequential(foreign.LoopOfTwo(normed=True), foreign.LoopOfTwo(normed=True)),
        SEQUENCE,
        [[2] * 3, [2] * 3],
    ),
    "chains in blocks": (
        lambda: nn.Sequential(foreign.Outer(), nn.Linear(WIDTH, WIDTH), foreign.Outer()),
        SEQUENCE,
        [[2] * 2, [2] * 2],
    ),
    "around residual modules": (lambda: foreign.Around(Attention, foreign.Convolving), SEQUENCE, [[3] * 3]),
    "around other sums": (lambda: foreign.Around(foreign.Projecting, None), SEQUENCE, [[2] * 3]),
    "vectors between": (foreign.Between, TOKENS, [[2] * 3]),
    "steps between": (foreign.StepBetween, TOKENS, [[3] * 3]),
    "rearranged between": (foreign.Rearranged, TOKENS, [[2] * 4]),
    "viewed between": (foreign.Viewed, TOKENS, [[2] * 3]),
    "repeated": (foreign.Repeated, TOKENS, [[2] * 6]),
    "reading the first": (foreign.ReadingTheFirst, SEQUENCE, [[2, 2, 2]]),
    "of states": (foreign.OfStates, TOKENS, [[2] * 3]),
    "told": (foreign.Told, SEQUENCE, [[1] * 4]),
    "growing": (foreign.Growing, TOKENS, [[1] * 3]),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_found_and_converted_with_right_gradients(name: str) -> None:
    """Chains and steps are those that a reader of the code counts; backward rebuilds them."""
    build, example, expected = MODELS[name]
    model = build().train()
    chains = autorev.analyze(model, example).chains
    assert [[len(block.steps) for block in chain.blocks] for chain in chains] == expected
    converted = autorev.convert(model, example, keep_last=0)
    assert [len(chain.blocks) for chain in converted.chains] == [len(blocks) for blocks in expected]
    random.seed(3)
    torch.manual_seed(0)
    found = autorev.verify(model, example)
    assert found.passed, found
    assert all(found.rebuilt.values())


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"Guarded"}))  # whose guard does not run in double
def test_without_velocity_it_computes_what_its_code_does(name: str, granularity: str) -> None:
    """With gamma = 0 a step is the residual sum itself, so that the original code and autograd are the oracle."""
    build, example, _ = MODELS[name]
    model = build().double().train()
    example = example.double() if example.is_floating_point() else example
    before = [
        (module.generator, module.generator.get_state())
        for module in model.modules()
        if isinstance(module, foreign.OwnGenerator)
    ]
    random.seed(3)
    expected_loss, expected = one_step(model, example)
    autorev.convert(model, example, gamma=0, c=1, arithmetic="float", granularity=granularity)
    for generator, state in before:
        generator.set_state(state)
    random.seed(3)
    loss, found = one_step(model, example)
    assert torch.allclose(loss, expected_loss, rtol=1e-12)
    assert gap(found, expected) < 1e-9


def test_what_a_step_draws_from_a_generator_is_drawn_again() -> None:
    """Taken apart into steps, too: there the code's own calls are repeated."""
    model = stack_of(foreign.OwnGenerator).train()
    autorev.convert(model, TOKENS, granularity="sublayer", keep_last=0)
    assert autorev.verify(model, TOKENS).passed
