"""Converted models against the same coupling under ordinary autograd: backward, in every way that autograd offers.

python -m pytest tests/engine/test_backward.py
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    DOUBLE,
    EXACT,
    EXACT_LEAPFROG,
    OTHER_TOKENS,
    TOKENS,
    Mlp,
    Results,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    each_setting,
    gradients_of,
    mean_square,
    small,
)


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
