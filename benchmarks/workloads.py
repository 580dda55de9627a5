"""The models that the benchmarks train, and how one step's peak is read."""

from __future__ import annotations

import pydoc_data.topics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autorev.integrations.quirks import quiet
from autorev.models.resolve import embedded_file
from autorev.profiler.passes.watch import PeakWatch

TEXT = "".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
"""Prose without a download: the language reference that CPython carries."""


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with its weights, in fp32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = embedded_file()
    how = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(**how, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(**how)


def tokens_of(tokenizer: Any, start: int, count: int) -> torch.Tensor:
    """`count` token ids [1, count] of the text, from its character `start` on."""
    ids: torch.Tensor = tokenizer(TEXT[start : start + 8 * count], return_tensors="pt").input_ids[:, :count]
    return ids


def wide_llama(blocks: int = 24, width: int = 1024) -> Any:
    """A Llama of `blocks` blocks of `width`, with random weights and a small vocabulary, so that its blocks count."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=1024,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def step_of(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of one training step, from no gradients."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def peak_of(model: nn.Module, step: Callable[[], None]) -> int:
    """The most bytes that a warm step allocates at once, gradients included, by the allocator's events."""
    step()
    model.zero_grad(set_to_none=True)  # or their memory, freed within the profile, would be taken off
    watch = PeakWatch(torch.device("cpu"))
    watch.begin([])
    step()
    return watch.end()
