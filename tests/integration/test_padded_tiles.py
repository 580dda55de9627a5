"""Padded batches of `transformers` models whose blocks run a tile of positions at a time, attention and all.

python -m pytest tests/integration/test_padded_tiles.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

import autorev
from autorev.in_place import Blocks, in_place
from autorev.methods import Method
from tests.engine.test_causal_tiles import attention_of
from tests.helpers.blocks import Results, assert_same, gradients_of

TOKENS = torch.arange(42).reshape(2, 21) % 41 + 1
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "use_cache": False,
}
ONCE = [(5, 5), (5, 10), (5, 15), (6, 21)]
"""Queries and keys; one at the end by itself would attend in another way."""
MODELS: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=6)),
}


def model_of(name: str) -> Any:
    """The same each time."""
    torch.manual_seed(0)
    return MODELS[name]().train()


def padded(side: str) -> dict[str, torch.Tensor]:
    """Two texts, one of them shorter; `none`: both of a length, without a mask."""
    if side == "none":
        return {"input_ids": TOKENS, "labels": TOKENS}
    mask = torch.ones_like(TOKENS)
    mask[0, slice(7) if side == "left" else slice(14, None)] = 0
    labels = TOKENS.masked_fill(mask == 0, -100)
    return {"input_ids": TOKENS.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def step(model: Any, side: str) -> Results:
    """The loss and every gradient."""
    model.zero_grad()
    loss = model(**padded(side)).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model)}


@pytest.mark.parametrize("options", [{}, {"method": "leapfrog"}, {"granularity": "sublayer"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_reversible(name: str, options: dict[str, Any]) -> None:
    """Converted with padding on the right; batches have it on either side, or none."""
    model = model_of(name)
    autorev.convert(model, batch=padded("right"), tile=5, keep_last=0, **options)
    for side in ("right", "left", "none"):
        assert autorev.verify(model, padded(side)).passed
        assert attention_of(lambda side=side: step(model, side)) == 2 * ONCE + 2 * ONCE[::-1]


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed(name: str) -> None:
    """The gradients are those of the model as it is; put in place without padding."""
    model = model_of(name)
    sides = ("right", "left", "none")
    expected = {side: step(model, side) for side in sides}
    blocks = Blocks(("model.layers.0", "model.layers.1"), inline=False, draws_random=False)
    with in_place(model, Method("checkpoint", tile=5), blocks, ((), padded("none"))):
        for side in sides:
            assert_same(step(model, side), expected[side], 1e-5)
            assert attention_of(lambda side=side: step(model, side)) == 2 * ONCE + 2 * ONCE[::-1]
