"""What stands in for a block's `forward` where PyTorch's own checkpoint is put around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from autorev.engine.host_store import HostStore
from autorev.engine.kept import ATTENTION
from autorev.errors import ConversionError
from autorev.integrations.transformers import is_cache
from autorev.methods import Method
from autorev.rewrite.replacement import Replacement


@dataclass(eq=False)
class CheckpointedForward(Replacement):
    """A block's own forward, run again in backward."""

    around: Callable[..., Any]
    """Runs a forward under a checkpoint."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward.

        Raises:
            ConversionError: it is to fill a key-value cache, and would fill it once more in backward.
        """
        if torch.is_grad_enabled() and any(is_cache(value) for value in (*args, *kwargs.values())):
            raise ConversionError(
                f"{self.path} is checkpointed and is given a key-value cache, which its second run would fill once "
                "more; train with use_cache=False, or model.config.use_cache = False"
            )
        return self.around(self.own(), *args, **kwargs)


def checkpointed_forwards(
    model: nn.Module, paths: tuple[str, ...], method: Method
) -> tuple[tuple[CheckpointedForward, ...], HostStore | None]:
    """What checkpoints the blocks at `paths` as `method` does (checkpoint, sac or offload), and the host's memory that
    it uses; nothing is installed."""
    around: Callable[..., Any] = partial(checkpoint_of(method), use_reentrant=False)
    store: HostStore | None = None
    if method.name == "offload":
        store = HostStore()
        around = partial(store.around, around)
    made = (CheckpointedForward(model.get_submodule(path), path, around) for path in dict.fromkeys(paths))
    return tuple(made), store


def checkpoint_of(method: Method) -> Callable[..., Any]:
    """PyTorch's checkpoint, with what `method` keeps besides the input."""
    if method.name == "sac":
        return partial(checkpoint, context_fn=lambda: create_selective_checkpoint_contexts(selective_policy()))
    if method.keep == "attention":
        return partial(checkpoint, context_fn=partial(create_selective_checkpoint_contexts, [*ATTENTION]))
    return checkpoint


def selective_policy() -> Callable[..., CheckpointPolicy]:
    """A policy as large training runs use it: attention's output is kept, and every second matrix product."""
    aten = torch.ops.aten
    products = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default}
    counts = {False: 0, True: 0}  # in the first run and in the second

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in products:
            counts[context.is_recompute] += 1
            if counts[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
