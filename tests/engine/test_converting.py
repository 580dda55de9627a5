"""Converted models against the same coupling under ordinary autograd: converting and reverting.

python -m pytest tests/engine/test_converting.py
"""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.errors import AutorevError, ConversionError
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    EXACT,
    TOKENS,
    Chain,
    Mlp,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    each_setting,
    gradients_of,
    no_collection,
    small,
    states,
    step,
)


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

    autorev.convert(model, batch=(TOKENS,), **setting.options)
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
        autorev.convert(model, batch=(TOKENS,))
    assert_like_oracle(model, EXACT)
    autorev.revert(model)
    autorev.convert(model, method="leapfrog", batch=(TOKENS,))
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
    autorev.convert(model, batch=(TOKENS,), keep_last=0)
    calls.clear()
    assert_like_oracle(model, EXACT)
    assert len(calls) == 3
    autorev.revert(model)

    assert vars(model.blocks[1])["forward"] is forward


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "verlet"}, "verlet"),
    "arithmetic": ({"arithmetic": "int8"}, "'exact' or 'float'"),
    "granularity": ({"granularity": "model"}, "'block' or 'sublayer'"),
    "keep_last": ({"keep_last": -1}, "keep_last"),
    "keep_last-bool": ({"keep_last": "all"}, "keep_last"),
    "fraction_bits": ({"fraction_bits": 99}, "fraction_bits"),
    "fraction_bits-float": ({"method": "leapfrog", "arithmetic": "float", "fraction_bits": 9}, "fraction_bits"),
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
        autorev.convert(model, batch=(TOKENS,), **options)

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
        autorev.convert(model, batch=(TOKENS,))

    assert contents_of(model) == contents


def test_a_model_without_an_example_is_refused() -> None:
    """The message says what to pass."""
    with pytest.raises(AutorevError, match="needs a batch"):
        autorev.convert(small())
    with pytest.raises(ConversionError, match=r"torch\.nn\.Module"):
        autorev.convert(small)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [hand.PostNorm, hand.PermutedShortcut, hand.DataDependent])
def test_models_whose_blocks_cannot_be_reversed_are_refused(block: type[nn.Module]) -> None:
    """The reason that analysis found is in the message, and the model is as it was."""
    model = small(block=block)
    contents = contents_of(model)
    with pytest.raises(ConversionError, match=r"no chain of blocks of Stack can be converted: blocks\.0: "):
        autorev.convert(model, batch=(TOKENS,))

    assert contents_of(model) == contents


@pytest.mark.parametrize("depth", [8, 16])
def test_momentum_in_float_arithmetic_is_refused_at_depth(depth: int) -> None:
    """The error that would have grown is named, and so is the remedy, which works."""
    model = small(depth, Mlp)
    with pytest.raises(ConversionError, match=r"rounding errors of blocks.*use arithmetic='exact'.*\|gamma\| = 1"):
        autorev.convert(model, arithmetic="float", batch=(TOKENS,))
    autorev.convert(model, arithmetic="exact", batch=(TOKENS,))
    assert_like_oracle(model, EXACT)


@each_setting
def test_blocks_and_exclude_patterns(setting: Setting) -> None:
    """Only what matches is converted; the rest is left as it is and listed with a reason."""
    torch.manual_seed(0)
    model = small(6).to(setting.dtype)
    options = {"batch": (TOKENS,), **setting.options}
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
    options = {"batch": (TOKENS,), **setting.options}
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
        model, gamma={"blocks.0": 0.5, "blocks.*": -0.25}, c={"blocks.3": 2.0, "blocks.0": 0.75}, batch=(TOKENS,)
    )

    assert conversion.chains[0].gamma == (0.5, -0.25, -0.25, -0.25)
    assert conversion.chains[0].c == (0.75, 1.125, 1.125, 2.0)
    assert conversion.chains[0].side_bits == (1, 2, 2, 2)
    assert not conversion.preserves_function
    assert_like_oracle(model, EXACT)


@pytest.mark.parametrize("coupling", ["midpoint_a", "bdia"])
def test_couplings_with_random_numbers_are_like_their_oracle(coupling: str) -> None:
    """The gammas of a call are drawn once, and are the oracle's where torch's generator stands where it did."""
    model = converted(Setting(coupling, {"method": coupling}), small)
    assert_like_oracle(model, EXACT)
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
