"""Plans, run: do they fit in the memory that they were made for?

    python -m benchmarks.fit > benchmarks/fit_MACHINE_DATE.md

Four models, three memories each (beside weights and optimiser state), AdamW on all weights or LoRA. Each plan is run in
a process of its own, and its peak is the allocator's.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import autorev
from autorev.format import format_bytes


def llama(blocks: int, width: int, tokens: int) -> tuple[Any, dict[str, Any]]:
    """With a batch of one row."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    ids = torch.arange(tokens)[None] % 4096
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids, "use_cache": False}


def gpt2(tokens: int) -> tuple[Any, dict[str, Any]]:
    """With dropout."""
    ids = torch.arange(2 * tokens).reshape(2, tokens) % 4096
    config = GPT2Config(n_layer=12, n_embd=256, n_head=8, vocab_size=4096, n_positions=tokens)
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids, "use_cache": False}


def vit() -> tuple[Any, dict[str, Any]]:
    """Sixteen pictures."""
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=10
    )
    images = torch.linspace(-1, 1, 16 * 3 * 224 * 224).reshape(16, 3, 224, 224)
    return ViTForImageClassification(config), {"pixel_values": images, "labels": torch.arange(16) % 10}


CASES: tuple[tuple[str, Any, tuple[str, ...], dict[str, Any]], ...] = (
    ("Llama, 12 x 256, LoRA", lambda: llama(12, 256, 1024), ("+200MiB", "+60MiB", "+30MiB"), {"lora_rank": 8}),
    ("Llama, 24 x 128, all weights", lambda: llama(24, 128, 1024), ("+250MiB", "+80MiB", "+45MiB"), {}),
    ("GPT-2, 12 x 256, LoRA", lambda: gpt2(512), ("+300MiB", "+100MiB", "+40MiB"), {"lora_rank": 8}),
    ("ViT, 12 x 192, all weights", vit, ("+900MiB", "+300MiB", "+120MiB"), {}),
)


def main() -> None:
    """Print a Markdown table."""
    warnings.filterwarnings("ignore")
    print("| model | memory | plan | predicted | measured | holds |")
    print("|---|---:|---|---:|---:|---|", flush=True)
    for name, make, memories, how in CASES:
        for memory in memories:
            print(f"{name}, {memory}", file=sys.stderr)
            torch.manual_seed(0)
            model, batch = make()
            plan = autorev.fit(model, batch, memory=memory, device="cpu", measure=True, **how)
            if plan.method is None or plan.measured is None or plan.option is None:
                print(f"| {name} | {memory} | {plan.why} | - | - | - |", flush=True)
                continue
            figures = [format_bytes(size) for size in (plan.option.peak_bytes, plan.measured.peak_bytes)]
            held = "yes" if plan.measured.holds else "NO"
            total = f"{memory} = {format_bytes(plan.memory_bytes)}"
            print(f"| {name} | {total} | `{plan.method.spec}` | {figures[0]} | {figures[1]} | {held} |", flush=True)


if __name__ == "__main__":
    main()
