"""Models none of whose blocks can be reversed: their analysis ends with a plan, and the plan can be put in place.

python -m pytest tests/integration/test_without_chains.py
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import autorev
from autorev.analysis import Analysis
from autorev.models.from_config import config_workload
from autorev.report.render import render_html, render_markdown
from tests.helpers import handwritten as hand

TOKENS = torch.arange(16).reshape(2, 8)
BERT: dict[str, Any] = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
BERT |= {"intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 64}
BERT |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}


def bert() -> Any:
    """Post-norm."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**BERT))


class ResNetBlock(nn.Module):
    """Post-activation, as in ResNet v1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


MODELS: dict[str, tuple[Any, Any, str]] = {
    "bert": (bert, None, "post-norm"),
    "resnet": (lambda: nn.Sequential(*(ResNetBlock() for _ in range(4))), torch.ones(2, 8, 16, 16), "post-activation"),
    "by hand": (lambda: hand.stack_of(hand.PostNorm), TOKENS, "post-norm"),
}


def gradients(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """Of a step with one and the same dropout."""
    from autorev.detection import call_of

    args, kwargs = call_of(model, batch, "analyze")
    torch.manual_seed(1)
    model.zero_grad()
    returned = model.train()(*args, **kwargs)
    (returned if isinstance(returned, torch.Tensor) else returned.logits).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_an_analysis_ends_with_a_plan(name: str) -> None:
    """With figures, on the screen, in JSON, as Markdown and on the page."""
    make, batch, code = MODELS[name]
    analysis = autorev.analyze(make(), batch)
    assert {block.reasons[0].partition(":")[0] for block in analysis.refused} == {code}
    plan = analysis.recommendation
    assert plan is not None and plan.method == "checkpoint"
    assert Analysis.from_json(analysis.to_json()) == analysis
    shown = " ".join(str(analysis).split())
    for text in (shown, render_markdown([analysis]), render_html([analysis], "a test")):
        assert "blocks can be reversed, and a checkpoint can stand around each" in text
        assert "instead of" in text
        assert "offload" in text.lower()


@pytest.mark.parametrize("method", ["checkpoint", "offload", "plain:tile=auto", "checkpoint:tile=auto"])
def test_the_plan_can_be_put_in_place(method: str) -> None:
    """The gradients are the model's own, dropout included, and its blocks come back."""
    model = bert()
    expected = gradients(model, None)
    conversion = autorev.convert(model, method=method)
    assert len(conversion.checkpointed) == (0 if "plain" in method else 4)
    found = gradients(model, None)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert conversion.memory is not None
    if "plain" not in method:
        assert conversion.memory.converted.kept < conversion.memory.plain.kept / 3
    autorev.revert(model)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_fit_is_of_methods_for_any_block() -> None:
    """Little memory: checkpoints and tiles are what it plans with, and the plan is converted."""
    workload = config_workload(BERT, "bert", "a test")
    step: dict[str, Any] = {"batch": 8, "sequence": 64, "dtype": "fp32"}
    peaks = {each.method: each.peak_bytes for each in autorev.predict(workload, **step).predictions}
    plan = autorev.fit(workload, memory=peaks["checkpoint"] + 50_000, **step)
    assert plan.method is not None
    assert plan.method.name in {"checkpoint", "offload", "plain"}
    model = bert()
    autorev.convert(model, plan)
    assert autorev.revert(model) in {0, 4}


def test_blocks_that_run_once_are_not_run_twice() -> None:
    """No checkpoint is planned or put around blocks that fill what they are given; a loop's turns cannot have any."""
    model = hand.RememberingStack(*(hand.Remembering() for _ in range(3)))
    plan = autorev.analyze(model, TOKENS).recommendation
    assert plan is not None and plan.method is None
    assert "must not run twice" in plan.why
    with pytest.raises(autorev.AutorevError, match=r"blocks\.0: argument-write: it changes its argument cache"):
        autorev.convert(model, TOKENS, method="checkpoint")
    plan = autorev.analyze(hand.PostNormLoop(), torch.ones(2, 8, hand.WIDTH)).recommendation
    assert plan is not None and plan.method is None and "turns of a loop" in plan.why


def test_chains_need_no_such_plan() -> None:
    """What can be reversed is predicted for a workload, and not in an analysis of a live model."""
    assert autorev.analyze(hand.stack_of(hand.Block), TOKENS).recommendation is None
    assert json.loads(autorev.analyze(hand.stack_of(hand.Block), TOKENS).to_json())["recommendation"] is None
