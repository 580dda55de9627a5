"""Conversion of every family of `transformers` that autorev promises to know: one training step, and clean refusals.

python -m pytest tests/integration/test_convert_zoo.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import autorev
from autorev.errors import ConversionError
from autorev.integrations.example_call import example_call_for
from tests.helpers import zoo
from tests.helpers.one_step import gap, one_step

REFUSED = {
    "opt-post": "post-norm",
    "bert": "post-norm",
    "roberta": "post-norm",
    "bart": "post-norm",
    "resnet-basic": "post-activation",
    "resnet-bottleneck": "post-activation",
}
CONVERTED = zoo.others_slow(name for name in zoo.FAMILIES if name not in REFUSED)
# A recurrence in Python takes a second for 128 tokens; the others are converted without an example.
EXAMPLES: dict[str, dict[str, Any]] = {"mamba": {"batch": {"input_ids": torch.arange(3, 19)[None]}}}


@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("name", CONVERTED)
def test_a_training_step_has_the_oracles_loss_and_gradients(name: str, keep_last: int) -> None:
    """The reversible step's loss equals the oracle's, and every trainable parameter keeps its gradient."""
    model = zoo.build(name)
    _, call = example_call_for(model, 2, 16)
    _, plain = one_step(model, **call)

    conversion = autorev.convert(model, keep_last=keep_last, **EXAMPLES.get(name, {}))
    assert conversion.not_converted == ()
    expected_loss, expected = one_step(model, mode="oracle", **call)
    loss, found = one_step(model, **call)

    assert torch.equal(loss, expected_loss)
    assert gap(found, expected) < 1e-5
    assert [n for n, g in plain.items() if g is not None] == [n for n, g in found.items() if g is not None]
    drifts = {d for forward in converted_blocks(model) for d in forward.chain.drifts.values()}
    assert drifts == {0.0}, "some chain was not rebuilt to its first state"


@pytest.mark.parametrize(
    "options", [{"granularity": "sublayer"}, {"method": "hamiltonian"}], ids=["sublayer", "two streams"]
)
@pytest.mark.parametrize("name", CONVERTED)
def test_a_training_step_in_pieces_has_the_oracles_loss_and_gradients(name: str, options: dict[str, Any]) -> None:
    """The same with a step for each residual add."""
    model = zoo.build(name)
    _, call = example_call_for(model, 2, 16)
    autorev.convert(model, **options, **EXAMPLES.get(name, {}))
    expected_loss, expected = one_step(model, mode="oracle", **call)
    loss, found = one_step(model, **call)

    assert torch.equal(loss, expected_loss)
    assert gap(found, expected) < 1e-5
    assert {d for forward in converted_blocks(model) for d in forward.chain.drifts.values()} == {0.0}


@pytest.mark.parametrize("name", CONVERTED)
def test_without_velocity_the_steps_compute_what_the_model_computes(name: str) -> None:
    """With gamma = 0 the update is the residual sum itself: loss and gradients tell whether the steps are those."""
    model = zoo.build(name)
    _, call = example_call_for(model, 2, 16)
    expected_loss, expected = one_step(model, **call)
    options = {"gamma": 0, "c": 1, "arithmetic": "float", "granularity": "sublayer"}
    autorev.convert(model, **options, **EXAMPLES.get(name, {}))
    loss, found = one_step(model, **call)
    assert torch.allclose(loss, expected_loss, rtol=1e-5)
    assert gap(found, expected) < 1e-3


@pytest.mark.parametrize("name", CONVERTED)
def test_a_reverted_family_takes_the_plain_step(name: str) -> None:
    """After `revert` loss and gradients are the plain model's bit for bit."""
    model = zoo.build(name)
    _, call = example_call_for(model, 2, 16)
    plain_loss, plain = one_step(model, **call)

    conversion = autorev.convert(model, **EXAMPLES.get(name, {}))
    _, otherwise = one_step(model, **call)
    assert autorev.revert(model) == sum(len(chain.blocks) for chain in conversion.chains)
    loss, found = one_step(model, **call)

    assert gap(otherwise, plain) > 0, "the conversion changed nothing"
    assert torch.equal(loss, plain_loss)
    assert gap(found, plain) == 0


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_a_family_without_chains_is_refused_and_stays_as_it_was(name: str, reason: str) -> None:
    """The error names the first obstacle, and weights, attributes, flags, config and random numbers are untouched."""
    model = zoo.build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    config = model.config.to_dict()
    random = torch.get_rng_state()

    with pytest.raises(ConversionError, match=f"can be converted: .*{reason}"):
        autorev.convert(model)

    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [module.training for module in model.modules()] == flags
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)


def converted_blocks(model: torch.nn.Module) -> list[Any]:
    """The forwards that conversion put into the blocks."""
    from autorev.conversion.convert import forwards_of

    found = list(forwards_of(model))
    assert found
    return found


def test_gemma_4_with_what_multiplies_its_layers() -> None:
    """Its `layer_scalar`s are buffers. (Where layers share keys and values, those that write them are refused.)"""
    import transformers as hf

    sizes = {k: v for k, v in zoo.HEADS.items() if k != "num_hidden_layers"}
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 0}
    sizes |= {"num_hidden_layers": 4, "global_head_dim": 8, "layer_types": kinds}
    torch.manual_seed(0)
    model = hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**sizes)).train()
    for number, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.6 + 0.1 * number)
    call = {"input_ids": torch.arange(3, 19)[None], "labels": torch.arange(3, 19)[None]}

    conversion = autorev.convert(model, batch=call, keep_last=0)
    assert [len(chain.blocks) for chain in conversion.chains] == [4]
    expected_loss, expected = one_step(model, mode="oracle", **call)
    loss, found = one_step(model, **call)
    assert torch.equal(loss, expected_loss)
    assert gap(found, expected) < 1e-5
    assert autorev.drift(model) == {"model.layers": 0.0}
