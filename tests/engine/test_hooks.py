"""Converted models against the same coupling under ordinary autograd: hooks.

python -m pytest tests/engine/test_hooks.py
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers import handwritten as hand
from tests.helpers.blocks import Results, Setting, assert_like_oracle, assert_same, converted, each_setting, small, step


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
