"""What `convert` tells the user beside its figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from autorev.detect.chains import chain_name
from autorev.detect.ends import argument_of
from autorev.detect.finding import Finding
from autorev.engine.chain import ReversibleChain
from autorev.engine.kept import KeptOutputs
from autorev.integrations.accelerate import fetched
from autorev.plan import Plan
from autorev.rewrite.block_forward import ReversibleForward, WholeBlock
from autorev.rewrite.compiled import IN_STEPS


def without_kernel(finding: Finding) -> list[str]:
    """A note where the block has no attention whose result could be kept."""
    call, kept = finding.call, KeptOutputs()
    owned = next((p for p in call.module.parameters() if hasattr(p, "fake_mode")), None)
    if finding.inline or owned is None:
        return []
    mode: Any = owned.fake_mode
    with suppress(Exception), mode, kept.first():
        call.module.forward(*call.args, **call.kwargs)
    if kept.outputs:
        return []
    return [
        f"keep=attention: none of PyTorch's fused kernels ran in {finding.path} when it was looked at on a CPU; where "
        "none runs in training either (attn_implementation='eager', dropout on a CPU), nothing is kept"
    ]


def stored_beside(chains: Iterable[list[Finding]], in_pieces: bool) -> list[str]:
    """A note on each chain whose blocks carry further streams, where steps are smaller than a block (`in_pieces`)."""
    notes = []
    for chain in chains:
        streams = [argument_of(lane.start) for lane in chain[0].lanes if lane.start is not None]
        if in_pieces and len(streams) > 1 and not chain[0].deferred:
            notes.append(
                f"{chain_name(chain)}: step by step, only the stream {streams[0]} is reversed; "
                f"{' and '.join(streams[1:])} beside it keeps the states between its blocks. A coupling of one stream "
                "with granularity='block' reverses all of them"
            )
    return notes


def left_to_do(plan: Plan | None) -> list[str]:
    """What `plan` says beside how the model trains: an optimiser is not part of a model."""
    if plan is None or plan.setting.optimizer == "adamw":
        return []
    made = f'autorev.integrations.optimizers.make_optimizer(model, "{plan.setting.optimizer}", learning_rate)'
    return [f"the plan's optimizer is not part of the model: make it by {made}, or train by `finetune --plan`"]


def notes_on(
    model: nn.Module, chains: Iterable[ReversibleChain], forwards: Iterable[ReversibleForward]
) -> Iterator[str]:
    """Of a model that was converted just now: its `chains`, and the `forwards` of their blocks."""
    for chain in chains:
        for path, why in chain.restarts.items():
            yield f"{chain.name} starts a new chain at {path}, with velocity 0: {why}; each piece keeps two streams"
    compiled = {f.chain.name: isinstance(f, WholeBlock) for f in forwards if f.is_compiled}
    for name, whole in compiled.items():
        yield f"the blocks of {name} were compiled, and {'their branches are' if whole else IN_STEPS}"
    trained = {path for path, tensor in fetched(model) if tensor.requires_grad}
    if trained:
        yield (
            f"accelerate fetches {len(trained)} trained parameters for each call ({min(trained)}, ...), and their "
            "gradients go to tensors that it drops, converted or not: freeze them, or keep them in memory"
        )
