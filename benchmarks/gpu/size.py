"""How large the models are that a device trains: Llamas whose depth and width follow from its memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from autorev.analysis import RESERVE_BYTES
from autorev.models.from_config import config_workload
from autorev.prediction.training import DTYPES
from autorev.workload import Call, Workload
from benchmarks.gpu.device import Device

SHAPES = ((32, 4096), (28, 3072), (16, 2048), (12, 1024), (8, 512))
"""Blocks and width, largest first: those of Llama-3.1-8B, 3.2-3B and 3.2-1B, and two for small cards."""
PER_BLOCK = 13
"""Weights of a block, in squares of its width: Llama-3.1's proportions."""
BYTES = {"bf16": 2.0, "fp32": 4.0, "nf4": 0.52}
OF_MEMORY = 0.25
"""What weights may take of the memory. They are made on the device, and take none of the host's."""
STORED = 23
"""Hidden states that a block of plain training stores, about (benchmarks/context_predicted_*.md)."""
QUICK = 32
"""Tokens of a quick run."""
PLAYED = 2 * 2**30
"""Bytes of the card that a CPU plays: what does not fit there has to fit into the machine."""


@dataclass(frozen=True)
class Size:
    """What a section trains."""

    blocks: int
    width: int
    vocabulary: int
    tokens: int
    """Of its one sample: about half of the memory is activations where plain autograd keeps all of them."""
    dtype: str
    """Of the weights, which are frozen; adapters of `rank` train."""
    rank: int
    memory: int
    """Bytes that may be allocated: on a CPU they are counted."""
    rounds: int
    """Of what takes turns, at most."""
    threads: int

    @property
    def config(self) -> LlamaConfig:
        """Llama-3.1's proportions; of an end that is not larger than the blocks."""
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.width * 7 // 2,
            num_hidden_layers=self.blocks,
            num_attention_heads=max(self.width // 128, 2),
            num_key_value_heads=max(self.width // 512, 1),
            vocab_size=self.vocabulary,
            max_position_embeddings=2**20,
            pad_token_id=0,
        )

    @property
    def workload(self) -> Workload:
        """For predictions."""
        data: dict[str, Any] = self.config.to_diff_dict()
        return config_workload(data, f"llama-{self.blocks}x{self.width}", "benchmarks.gpu", None)

    def built(self, device: Device) -> tuple[nn.Module, Call]:
        """With random weights, made where it trains, and a call of it."""
        torch.manual_seed(0)
        with device.torch:
            model = LlamaForCausalLM._from_config(self.config, dtype=DTYPES[self.dtype])
        return model.train(), self.call(device)

    def call(self, device: Device, tokens: int | None = None) -> Call:
        """Of so many tokens, or the usual ones."""
        ids = self.text(tokens or self.tokens).view(1, -1).to(device.torch)
        return (), {"input_ids": ids, "labels": ids, "use_cache": False}

    def text(self, tokens: int) -> torch.Tensor:
        """Token ids [tokens], the same each time."""
        return torch.randint(self.vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))


def size_for(device: Device, weights: str | None = None) -> Size:
    """The largest shape whose weights leave room; `weights`: nf4, or the dtype that the device computes in."""
    threads = 1 if device.quick else os.cpu_count() or 1
    if device.quick:
        return Size(2, 32, 256, QUICK, "fp32", 4, 2**21, 3, threads)
    on_cpu = device.kind == "cpu"
    dtype, card = ("fp32", PLAYED) if on_cpu else ("bf16", device.memory_bytes)
    stored = weights or dtype
    fitting = [shape for shape in SHAPES if _weights(*shape) * BYTES[stored] <= OF_MEMORY * card]
    blocks, width = fitting[0] if fitting else SHAPES[-1]
    memory = card if on_cpu else card - RESERVE_BYTES
    left = memory - _weights(blocks, width) * BYTES[stored]
    tokens = int(left / 2 / (STORED * blocks * width * BYTES[dtype])) // 256 * 256
    return Size(blocks, width, 32768, min(max(tokens, 256), 8192), dtype, 16, memory, 15, threads)


def _weights(blocks: int, width: int) -> int:
    return PER_BLOCK * blocks * width**2
