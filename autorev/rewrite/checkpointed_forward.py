"""What stands in for a block's `forward` where PyTorch's own checkpoint is put around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from autorev.capture.record import named_arguments
from autorev.detect.ends import find_stream, flatten_with_path, replace_leaf
from autorev.detect.finding import Finding
from autorev.engine.host_store import HostStore
from autorev.engine.kept import ATTENTION, KeptOutputs
from autorev.errors import ConversionError
from autorev.integrations.transformers import is_cache
from autorev.keeps import Keeps
from autorev.methods import Method
from autorev.own_mode import OwnMode
from autorev.rewrite.replacement import Replacement

CHECKPOINTS = ("checkpoint", "sac", "offload")
"""The methods that put a checkpoint around blocks."""


@dataclass(eq=False)
class CheckpointedForward(Replacement):
    """A block's own forward, run again in backward."""

    around: Callable[..., Any]
    """Runs a forward under a checkpoint."""
    host: HostStore
    """What that moves to the host."""
    overwritten: tuple[str, ...] = ()
    """The arguments that are streams, and that it adds to in place: it is given copies of them."""
    moved: bool = False
    """Do its inputs wait on the host, where what it writes to the originals does not reach them?"""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward.

        Raises:
            ConversionError: it is to fill a key-value cache, or has written to an argument, and would do so once more
                in backward.
        """
        if torch.is_grad_enabled() and any(is_cache(value) for value in (*args, *kwargs.values())):
            raise ConversionError(
                f"{self.path} is checkpointed and is given a key-value cache, which its second run would fill once "
                "more; train with use_cache=False, or model.config.use_cache = False"
            )
        given = [leaf for _, leaf in flatten_with_path((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = [tensor._version for tensor in given if not tensor.is_inference()]
        returned = self.around(on_copies(self.block, self.own(), self.overwritten), *args, **kwargs)
        after = [tensor._version for tensor in given if not tensor.is_inference()]
        if torch.is_grad_enabled() and before != after and not self.moved:
            raise ConversionError(
                f"{self.path} writes to a tensor that it is given, and is to run on it once more in backward; leave it "
                "out (exclude=), or let it write to a copy"
            )
        return returned


def on_copies(module: nn.Module, forward: Callable[..., Any], overwritten: Sequence[str]) -> Callable[..., Any]:
    """`module`'s forward, which adds in place to copies of those of its arguments."""
    if not overwritten:
        return forward

    def run(*args: Any, **kwargs: Any) -> Any:
        for argument in overwritten:
            place, stream = find_stream(named_arguments(module, args, kwargs), argument, args, kwargs)
            args, kwargs = replace_leaf((args, kwargs), place, stream.clone())
        return forward(*args, **kwargs)

    return run


def checkpointed_forwards(
    model: nn.Module, blocks: Mapping[str, Keeps], chains: Iterable[Sequence[Finding]], method: Method
) -> tuple[tuple[CheckpointedForward, ...], HostStore]:
    """What checkpoints `blocks`, those of `chains` among them, as `method` does (checkpoint, sac or offload), and the
    host's memory that it uses; nothing is installed."""
    host = HostStore()
    overwritten = {
        finding.call.path: finding.overwritten for chain in chains for finding in chain if not finding.inline
    }
    made = (
        CheckpointedForward(
            model.get_submodule(path),
            path,
            checkpoint_of(method, keeps, host),
            host,
            overwritten.get(path, ()),
            "inputs" in keeps.on_host,
        )
        for path, keeps in blocks.items()
    )
    return tuple(made), host


def run_twice(method: Method, chains: Iterable[Sequence[Finding]], others: Iterable[str]) -> dict[str, Keeps]:
    """The paths of the blocks that `method` checkpoints, and what each keeps: but for what is stored of `chains`."""
    found: dict[str, Keeps] = {}
    for number, chain in enumerate(chains):
        recomputed = max(len(chain) - method.stored_of(number), 0)
        for position, finding in enumerate(chain[:recomputed]):
            if not finding.inline:
                found.setdefault(finding.call.path, method.keeps(position, recomputed))
    return found | {path: method.keeps(0, 1) for path in others if path not in found}


def checkpoint_of(method: Method, keeps: Keeps, host: HostStore) -> Callable[..., Any]:
    """PyTorch's checkpoint, with what `method` and `keeps` say besides the input."""
    around: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    if method.name == "sac":
        around = partial(around, context_fn=lambda: create_selective_checkpoint_contexts(selective_policy()))
    if keeps.attention:
        around = partial(around, context_fn=partial(_keeping, host if "attention" in keeps.on_host else None))
    return partial(host.around, around) if "inputs" in keeps.on_host else around


def _keeping(host: HostStore | None) -> tuple[OwnMode, OwnMode]:
    kept = KeptOutputs(host)
    return kept.first(), kept.later()


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
