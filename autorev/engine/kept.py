"""Attention that is not computed twice: what its kernel returned is kept, and returned in the second run.

At long sequences attention is most of what a second run costs (its work grows with their square), and its result is one
hidden state a block. The kernels are PyTorch's fused ones; attention that is written out of matrix products has none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from autorev.engine.host_store import HostStore, OnHost
from autorev.own_mode import OwnMode

_NAMES = (
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_flash_attention_forward"),
)
ATTENTION = frozenset(getattr(torch.ops.aten, name).default for name in _NAMES if hasattr(torch.ops.aten, name))
"""Operators whose results are kept."""


@dataclass(eq=False)
class KeptOutputs:
    """What the attention of one run of a block returned, in order."""

    host: HostStore | None = None
    """Where it waits; None: on its device."""
    outputs: list[Any] | None = field(default_factory=list)
    """None: a second run had them, and a further one (a second backward) computes anew."""

    def first(self) -> OwnMode:
        """Around the first run."""
        return _Keeping(self)

    def later(self) -> OwnMode:
        """Around the second."""
        return _Returning(self)


class _Keeping(OwnMode):
    def __init__(self, kept: KeptOutputs) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ATTENTION and self.kept.outputs is not None:
            keep = torch.Tensor.detach if self.kept.host is None else self.kept.host.put
            self.kept.outputs.append(tree_map_only(torch.Tensor, keep, result))
        return result


class _Returning(OwnMode):
    def __init__(self, kept: KeptOutputs) -> None:
        super().__init__()
        self.kept, self.count = kept, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = self.kept.outputs
        if func in ATTENTION and outputs is not None and self.count < len(outputs):
            self.count += 1
            return tree_map_only((torch.Tensor, OnHost), _back, outputs[self.count - 1])
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.kept.outputs = None


def _back(kept: torch.Tensor | OnHost) -> torch.Tensor:
    return kept.back() if isinstance(kept, OnHost) else kept.detach()
