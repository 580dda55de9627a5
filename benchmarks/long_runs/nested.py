"""Nested checkpointing, the lowest peak of recomputation alone: segments of about sqrt(n) blocks, each block within.

About 2 sqrt(n) hidden states are kept instead of n, for one more forward run (Chen et al., arXiv 1604.06174).
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Segment(nn.Module):
    """Blocks that stand for one: only its input is kept, and in its second run the input of each block."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> Any:
        """As a block's forward."""
        return checkpoint(self._run, hidden, use_reentrant=False, **kwargs)

    def _run(self, hidden: torch.Tensor, **kwargs: Any) -> Any:
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False, **kwargs)
        return hidden


def nest(decoder: Any) -> None:
    """Put segments in the place of `decoder.layers`, whose `forward` runs them in a row."""
    layers = list(decoder.layers)
    size = isqrt(len(layers) - 1) + 1
    decoder.layers = nn.ModuleList(Segment(layers[at : at + size]) for at in range(0, len(layers), size))
