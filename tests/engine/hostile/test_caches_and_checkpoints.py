"""A key-value cache that the user hands over means in training what it meant; an outer checkpoint draws the same signs.

python -m pytest tests/engine/hostile/test_caches_and_checkpoints.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import autorev
from autorev.engine.mode import running
from autorev.errors import ConversionError
from tests.engine.hostile.by_hand import Results, assert_close

TOKENS = torch.arange(24).reshape(2, 12) % 61


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()


def two_segments(model: nn.Module, cache: Any, **how: Any) -> Results:
    """Loss and gradients of the second of two segments that share a cache, through both."""
    model.zero_grad(set_to_none=True)
    first = model(input_ids=TOKENS[:, :6], past_key_values=cache, **how)
    cache = cache if cache is not None else first.past_key_values
    loss = model(input_ids=TOKENS[:, 6:], past_key_values=cache, labels=TOKENS[:, 6:], **how).loss
    loss.backward()
    assert cache.get_seq_length() == TOKENS.shape[1]
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("how", [{}, {"granularity": "sublayer"}, {"method": "hamiltonian"}], ids=str)
@pytest.mark.parametrize("given", [True, False])
def test_the_second_segment_sees_the_first(given: bool, how: dict[str, Any]) -> None:
    """A cache of the user's own, or one asked for by `use_cache=True`: gradients flow through it as by the oracle, and
    with a gamma next to nothing the numbers are the plain model's."""
    model = llama()
    plain = two_segments(model, DynamicCache(config=model.config))
    gamma = {} if "method" in how else {"gamma": 1 / 256}
    autorev.convert(model, **how, **gamma)
    call = {} if given else {"use_cache": True}
    found = two_segments(model, DynamicCache(config=model.config) if given else None, **call)
    with running("oracle"):
        assert_close(found, two_segments(model, DynamicCache(config=model.config)))
    if gamma:
        assert float(found["loss"]) == pytest.approx(float(plain["loss"]), abs=2e-3)


def test_a_cache_that_was_left_empty_is_not_gone_on_with() -> None:
    """By default the model's own cache is not filled in training; who feeds it again is told."""
    model = llama()
    autorev.convert(model)
    cache = model(input_ids=TOKENS[:, :6]).past_key_values
    assert cache.get_seq_length() == 0
    with pytest.raises(ConversionError, match="was left empty by the call that returned it"):
        model(input_ids=TOKENS[:, 6:], past_key_values=cache)


class Block(nn.Module):
    """With dropout, so that an outer checkpoint has a generator to put back."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(d, d), nn.Linear(d, d), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(torch.tanh(self.a(x)))
        return x + self.drop(torch.tanh(self.b(x)))


@pytest.mark.parametrize("coupling", ["bdia", "momentum", "leapfrog", "midpoint_a", "hamiltonian"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_chain(coupling: str, reentrant: bool) -> None:
    """Its second forward draws what the first one drew, the signs of BDIA included."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(6))), torch.randn(3, 8)
    autorev.convert(model, method=coupling, batch=(x,))

    def step(around: bool) -> Results:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        given = x.clone().requires_grad_()
        out = checkpoint(model, given, use_reentrant=reentrant) if around else model(given)
        loss = out.square().mean()
        loss.backward()
        left = torch.rand(3)
        return {
            "loss": loss.detach(),
            "x": given.grad,
            "left": left,
            **{n: p.grad for n, p in model.named_parameters()},
        }

    assert_close(step(True), step(False), 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_bdia_under_a_checkpoint_that_does_not_put_generators_back(reentrant: bool) -> None:
    """A model without random numbers of its own needs no `preserve_rng_state`: the signs are the input's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(6))).train(), torch.randn(3, 8)
    for block in model:
        block.drop = nn.Identity()
    autorev.convert(model, method="bdia", batch=(x,))
    for seed in (1, 2, 3):
        results = []
        for around in (False, True):
            model.zero_grad(set_to_none=True)
            torch.manual_seed(seed)
            given = x.clone().requires_grad_()
            how = {"use_reentrant": reentrant, "preserve_rng_state": False}
            out = checkpoint(model, given, **how) if around else model(given)
            out.square().mean().backward()
            results.append({"x": given.grad, **{n: p.grad.clone() for n, p in model.named_parameters()}})
        assert_close(results[1], results[0], 1e-6)


def test_bdia_draws_other_signs_in_every_step() -> None:
    """And the same ones from the same state of torch's generator, by the oracle, too."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block() for _ in range(6))), torch.randn(3, 8)
    autorev.convert(model, method="bdia", batch=(x,))
    losses = []
    for seed in (1, 2, 3, 1):
        torch.manual_seed(seed)
        losses.append(float(model(x).detach().square().mean()))
        with running("oracle"):
            torch.manual_seed(seed)
            assert float(model(x).detach().square().mean()) == pytest.approx(losses[-1], rel=1e-5)
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3
