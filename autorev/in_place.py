"""Putting a method in place: while it lasts, a model trains that way, and afterwards it is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch._functorch.config as functorch
from torch import nn

from autorev.chunked_loss import chunk_loss, unchunk_loss
from autorev.conversion.convert import chains_of, convert, revert
from autorev.conversion.summary import Conversion
from autorev.detect.chains import Detection
from autorev.detection import detect_in
from autorev.engine.host_store import HostStore
from autorev.errors import ConversionError
from autorev.methods import Method
from autorev.prediction.training import NO_LABELS
from autorev.rewrite.checkpointed_forward import CHECKPOINTS, checkpointed_forwards, run_twice
from autorev.rewrite.replacement import installed
from autorev.rewrite.tiled_forward import blocks_run_twice, tiled_forwards
from autorev.workload import Call


class NotApplicable(Exception):  # noqa: N818 - no error: a method that this model has no use for
    """The method cannot be had of this model, for the reason it holds."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The residual blocks of a model, as analysis found them."""

    paths: tuple[str, ...]
    """Module paths in calling order, each once."""
    inline: bool
    """Is there one that is a turn of a loop and no module of its own?"""
    draws_random: bool


@dataclass(eq=False)
class InPlace:
    """What putting a method in place brought with it."""

    side_bits: int = 0
    host: HostStore | None = None
    conversion: Conversion | None = None
    """What `convert` did, for a coupling."""


@contextmanager
def in_place(
    model: nn.Module, method: Method, blocks: Blocks, call: Call, fraction_bits: dict[str, int] | None = None
) -> Iterator[InPlace]:
    """While it lasts, `model` trains by `method`. Its modules, weights and `state_dict` keys stay what they are.

    `fraction_bits`: the grids of a coupling's chains by name, where they are known already.

    Raises:
        NotApplicable: the method cannot be had of this model; it is as it was.
    """
    placed = InPlace()
    with ExitStack() as stack:
        try:
            if method.loss == "chunked":
                if call[1].get("labels") is None:
                    raise NotApplicable(NO_LABELS)
                chunk_loss(model)
                stack.callback(unchunk_loss, model)
            if method.reversible:
                how = replace(method, loss="full", fraction_bits=fraction_bits or method.fraction_bits)
                done = convert(model, call, method=how)
                stack.callback(revert, model)
                placed.conversion = done
                placed.host = chains_of(model)[0].host  # of all of them
                if done.arithmetic == "exact":
                    placed.side_bits = max(bits for chain in done.chains for bits in chain.side_bits)
        except ConversionError as error:
            raise NotApplicable(str(error)) from error
        if not method.reversible and (method.tile is not None or method.name in CHECKPOINTS):
            detection, _ = detect_in(model, *call)
            if method.tile is not None:
                stack.enter_context(_tiled(model, blocks, detection, method))
            in_chains = {finding.path for chain in detection.chains for finding in chain}
            found = run_twice(method, detection.chains, (path for path in blocks.paths if path not in in_chains))
            twice = {path: keeps for path, keeps in found.items() if path in blocks.paths}
        if method.name == "compile":
            stack.enter_context(_compiled(model, blocks, method.budget or 0.0))
        elif method.name in CHECKPOINTS:
            if blocks.inline:
                raise NotApplicable("its blocks are turns of a loop: there is no module to put a checkpoint around")
            forwards, placed.host = checkpointed_forwards(model, twice, detection.chains, method)
            stack.enter_context(installed(forwards))
        yield placed


@contextmanager
def _tiled(model: nn.Module, blocks: Blocks, detection: Detection, method: Method) -> Iterator[None]:
    assert method.tile is not None
    judged = (*(finding for chain in detection.chains for finding in chain), *detection.refused)
    stored = [method.stored_of(number) for number in range(len(detection.chains))]
    twice = blocks_run_twice(method, detection.chains, stored, detection.refused)
    try:
        ours = (finding for finding in judged if finding.path in blocks.paths)
        tiled = tiled_forwards(model, ours, method.tile, twice=twice)
    except ConversionError as error:
        raise NotApplicable(str(error)) from error
    with installed(tiled.forwards):
        yield


@contextmanager
def _compiled(model: nn.Module, blocks: Blocks, budget: float) -> Iterator[None]:

    if blocks.inline:
        raise NotApplicable("its blocks are turns of a loop: there is no module to compile")
    if blocks.draws_random and budget < 1:
        raise NotApplicable(
            "its blocks draw random numbers (dropout), which torch.compile replays wrongly under a budget below 1"
        )
    modules = [model.get_submodule(path) for path in blocks.paths]
    torch._dynamo.reset()
    before = functorch.activation_memory_budget
    functorch.activation_memory_budget = budget
    calls = [module.__dict__.get("_compiled_call_impl") for module in modules]
    try:
        for module in modules:
            module.compile()
        yield
    finally:
        functorch.activation_memory_budget = before
        for module, call in zip(modules, calls, strict=True):
            module.__dict__.pop("_compiled_call_impl", None)
            if call is not None:
                module._compiled_call_impl = call
