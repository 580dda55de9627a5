"""Converted models against the same coupling under ordinary autograd: random numbers, modes and precisions.

python -m pytest tests/engine/test_random_and_precision.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autorev
from tests.helpers import handwritten as hand
from tests.helpers.blocks import (
    EXACT,
    EXACT_LEAPFROG,
    IMAGES,
    TOKENS,
    Images,
    Results,
    Setting,
    assert_like_oracle,
    assert_same,
    converted,
    each_setting,
    gradients_of,
    mean_square,
    oracle,
    small,
    step,
)


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
@pytest.mark.parametrize("options", [{}, {"method": "leapfrog"}, {"method": "leapfrog", "arithmetic": "float"}])
def test_half_precision_weights(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Weights, stream and gradients in half precision; the chain's own state is wider."""
    setting = Setting("half", options, dtype, 3e-2)
    model = converted(setting, small)
    results = assert_like_oracle(model, setting)

    assert results["blocks.0.mlp.up.weight"].dtype is dtype
    assert autorev.drift(model)["blocks"] == 0 or options.get("arithmetic") == "float"


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
