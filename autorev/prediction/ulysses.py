"""A sample's tokens divided among GPUs, as DeepSpeed-Ulysses does (arXiv 2309.14509).

Each GPU computes its own tokens. Around attention they exchange: every GPU is given all tokens of some of the heads,
and gives back its tokens of all heads; four all-to-alls (q, k, v and the result), and as many in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from autorev.errors import SettingError

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""Of attention, that may be given by place."""


class Ulysses(TorchFunctionMode):
    """While it lasts, the tokens that a model is called with are one GPU's, and its attention is one GPU's heads'."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree = degree
        self.calls = 0
        """Of attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        named: dict[str, Any] = dict(zip(ARGUMENTS, args, strict=False)) | (kwargs or {})
        if named.get("attn_mask") is not None:
            raise SettingError(
                "its attention is given a mask, and a mask of all tokens is not predicted among several GPUs; leave "
                "`sequence_parallel` out"
            )
        for name, of in (("query", "queries"), ("key", "keys")):
            heads = named[name].shape[-3]
            if heads % self.degree:
                raise SettingError(
                    f"its attention has {heads} heads of {of}, which `sequence_parallel={self.degree}` does not divide"
                )
        named |= {name: self._exchanged(named[name], -3, -2) for name in ("query", "key", "value")}
        out = F.scaled_dot_product_attention(**named)
        return self._exchanged(out, -2, -3)

    def _exchanged(self, tensor: torch.Tensor, less: int, more: int) -> torch.Tensor:
        """Of one axis a part, of the other one all."""
        shape = list(tensor.shape)
        shape[less] //= self.degree
        shape[more] *= self.degree
        result: torch.Tensor = _AllToAll.apply(tensor, shape)  # type: ignore[no-untyped-call]  # as torch leaves it
        return result


class _AllToAll(torch.autograd.Function):
    """Its memory alone: what is sent is copied together, and what comes is a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
        ctx.shape = list(tensor.shape)
        sent = tensor.new_empty(tensor.shape)
        return sent.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sent = grads[0].new_empty(grads[0].shape)
        return sent.new_empty(ctx.shape), None
